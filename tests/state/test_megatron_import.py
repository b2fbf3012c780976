import logging
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from bridge.training.megatron_import import has_gpu, quiet_import

without_gpu = pytest.mark.skipif(has_gpu(), reason="the short cuts are for machines without a GPU")


@without_gpu
def test_the_first_import_is_silent_and_loads_neither_compiler_nor_tracker(tmp_path: Path) -> None:
    # Transformer Engine's CUDA library alone: it dies with an error that megatron-core lets pass.
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('Could not find its library')\n")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch
        compile_function = torch.compile
        import bridge.training.config
        assert torch.compile is compile_function
        loaded = {{"torch._dynamo", "torch._inductor", "wandb", "tensorboard"}} & set(sys.modules)
        assert not loaded, loaded
        try:
            import transformer_engine
        except ImportError:
            print("blocked")
        """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout == "blocked\n"


@without_gpu
def test_torch_compile_is_the_identity_inside_and_restored_by_an_exception() -> None:
    compile_function = torch.compile

    def double(x: int) -> int:
        return 2 * x

    def fail() -> None:
        with quiet_import():
            assert torch.compile(double) is double
            assert torch.compile(dynamic=True)(double) is double
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert torch.compile is compile_function


def test_only_the_messages_about_absent_extensions_are_held_back() -> None:
    def warn_of_both() -> None:
        with quiet_import():
            warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
            warnings.warn("something that matters", stacklevel=1)

    with pytest.warns(UserWarning, match="something that matters") as shown:
        warn_of_both()
    assert len(shown) == 1


def test_log_lines_of_the_extension_builder_pass_again_afterwards(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.addHandler(caplog.handler)
    try:
        with quiet_import():
            logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
            logger.warning("the compiler is too old")
        logger.warning("No CUDA runtime is found at all")
    finally:
        logger.removeHandler(caplog.handler)
    assert "using CUDA_HOME" not in caplog.text
    assert "the compiler is too old" in caplog.text
    assert "at all" in caplog.text


def test_a_hidden_tracker_can_be_imported_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with quiet_import(), pytest.raises(ImportError):
        __import__("wandb")
    assert "wandb" not in sys.modules
