"""What the MIMO tests share: megatron-core, imported once and without its warnings."""

import pytest

from ranks import import_megatron_once


def pytest_configure(config: pytest.Config) -> None:
    """Let megatron-core warn; whatever else warns fails the test."""
    config.addinivalue_line("filterwarnings", r"ignore:::megatron\.")


import_megatron_once()
