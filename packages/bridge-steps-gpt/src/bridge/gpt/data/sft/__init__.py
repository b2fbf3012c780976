"""Supervised fine-tuning: rows of prompts and answers, or of chats, to samples with a loss mask.

    rows        where rows are, and what is in one: turns of a conversation
    rendering   a conversation to tokens, and which of them count in the loss
    corpus      all samples of a split, tokenized once and cached
    packing     several samples to one sequence
    batches     samples as the forward step takes them
    docstrings  real rows on any machine
    dataset_config  the section of a run's configuration

Nothing is imported here: see `bridge.gpt.data`.
"""
