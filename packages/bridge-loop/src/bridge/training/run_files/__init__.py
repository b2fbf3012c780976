"""A run on disk: its directory, configuration, start and lock; and the folders of commands."""
