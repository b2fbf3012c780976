"""Text on disk: the files of a path, and the documents in them."""
