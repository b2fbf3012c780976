"""The ranks of a run: process groups, collectives, seeds, signals, and failures."""
