"""Data of pretraining: next-token samples of text, of token files or of random tokens.

named_sets          the sets of a run, and the files of each
corpora             the token files of a set, made from its text where needed
split_plan          documents to training, validation and test
next_token_samples  samples of token files
random_tokens       samples without data
"""
