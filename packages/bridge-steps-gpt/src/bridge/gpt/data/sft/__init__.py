"""Data of supervised fine-tuning: rows of prompts and answers, or of chats.

    dataset_config    the section of a run's configuration
    rows/             rows on disk, and the conversation in each
    rendering         a conversation to tokens, and which of them count in the loss
    corpus            all samples of a split, tokenized once and cached
    packing           several samples to one sequence
    batches           samples as the forward step takes them
    sample_lengths    lengths that the parallel layout needs
    startup_messages  notes and warnings about the data

Nothing is imported here: see `bridge.gpt.data`.
"""
