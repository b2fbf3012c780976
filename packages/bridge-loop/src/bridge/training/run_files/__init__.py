"""The run on disk: its directory, its configuration, and the lock that keeps it to one run."""
