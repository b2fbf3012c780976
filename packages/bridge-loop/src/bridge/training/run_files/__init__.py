"""A run on disk: its directory, its configuration, its start, and its lock."""
