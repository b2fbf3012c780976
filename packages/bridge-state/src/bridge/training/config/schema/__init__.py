"""Typed fields from and to plain values: knows dataclasses, not the container."""
