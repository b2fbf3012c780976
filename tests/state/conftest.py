"""What bridge-state's tests share: megatron-core, imported once and without its warnings."""

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bridge.training.config  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    """Let megatron-core warn; whatever else warns fails the test."""
    config.addinivalue_line("filterwarnings", r"ignore:::megatron\.")
