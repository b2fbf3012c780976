"""The weights of a checkpoint outside of a run: read one by one, or written all at once."""

from bridge.training.checkpoint.single_weights import SavedWeights, saved_config, write_weights

__all__ = ["SavedWeights", "saved_config", "write_weights"]
