"""Runs that the command starts: their configuration, their ranks, the line that continues them."""
