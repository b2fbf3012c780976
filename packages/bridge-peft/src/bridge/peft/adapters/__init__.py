"""The adapters of linear layers, and the wrapper that adds one to its layer."""
