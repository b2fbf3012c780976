"""One training step: its schedule, the step itself, and megatron-core's rerun state machine."""
