"""Checkpoints: saving, restoring, verifying, and reading weights outside of a run."""
