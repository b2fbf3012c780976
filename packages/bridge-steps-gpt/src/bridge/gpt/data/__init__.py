"""Data of GPT models: text, token files and training samples, on megatron-core's datasets.

    dataset_config    the section of a pretraining run's configuration
    text/             the files of a path, and their documents
    tokenization/     tokenizers, and documents to token ids
    token_files       .bin/.idx files
    cache             the folder of tokens and indices
    pretraining/      the sets of a run, their corpora, and samples of them
    sft/              the data of fine-tuning
    command           `bridge data build`
    show_batch        `bridge show-batch`

The submodules are imported by name (`bridge.gpt.data.dataset_config`): `command` is loaded whenever
the `bridge` command starts, so this package imports nothing by itself.
"""
