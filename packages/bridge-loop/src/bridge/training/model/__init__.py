"""A rank's part of any model: building, initial weights, wrapping in DDP, hooks, frozen weights."""
