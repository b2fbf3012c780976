"""Modules on ranks of their own: placement, process groups, communication, optimizer."""
