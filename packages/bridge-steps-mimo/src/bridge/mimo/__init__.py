"""Multimodal models: placement of modules, model configuration, data, recipes."""
