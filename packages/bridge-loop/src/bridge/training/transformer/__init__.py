"""The transformers of this package: their sections, their layers, and the fields without effect."""
