"""Data of GPT models: text, token files and training samples, on megatron-core's datasets.

    dataset_config      the section of a pretraining run's configuration
    text/               the files of a path, and their documents
    tokenization/       tokenizers, and documents to token ids
    token_files         .bin/.idx files
    corpora             the token files of a set, made from its text where needed
    cache               the folder of tokens and indices
    named_sets          the sets of a run, and the files of each
    split_plan          documents to training, validation and test
    next_token_samples  samples of token files
    random_tokens       samples without data
    sft/                the data of fine-tuning

The submodules are imported by name (`bridge.gpt.data.dataset_config`): `command` is loaded whenever
the `bridge` command starts, so this package imports nothing by itself.
"""
