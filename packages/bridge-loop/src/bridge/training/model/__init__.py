"""The model: building, initial weights, DDP, hooks, and the modules that transformers share."""
