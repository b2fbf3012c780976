"""Typed fields, from and to plain values: for any dataclass, without the container."""
