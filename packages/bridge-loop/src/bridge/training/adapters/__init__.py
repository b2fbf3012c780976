"""Parameter-efficient fine-tuning: attaching adapters, and merging them into the base."""
