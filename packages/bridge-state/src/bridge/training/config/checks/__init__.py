"""Checks of a configuration: each yields problems, and none stops the others."""
