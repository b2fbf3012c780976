"""megatron-core's optimizer and LR scheduler: building, stepping, and their saved state."""
