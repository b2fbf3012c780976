"""Text on disk: the files that a path stands for, and the documents in them."""
