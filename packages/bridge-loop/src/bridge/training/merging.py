"""A model with the adapters that a run has trained, rebuilt by one process outside of a run."""

from bridge.training.adapters.merging import AdaptedModel, adapted_model, merge

__all__ = ["AdaptedModel", "adapted_model", "merge"]
