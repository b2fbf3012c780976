"""Modules on separate ranks: placement, process groups, communication, optimizer."""
