"""Data for multimodal models: microbatches of samples with images or without."""
