"""The layers that a method may adapt: their names, the patterns for them, their shards."""
