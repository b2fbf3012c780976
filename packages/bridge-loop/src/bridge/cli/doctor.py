"""``bridge doctor``: versions, devices, missing packages and how to get them."""

import argparse
import importlib
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

from bridge.training.entry_points import RECIPES

_PURPOSES = {
    "torch": "tensors",
    "megatron-core": "the engine",
    "bridge-state": "configuration and state",
    "bridge-loop": "the training loop",
    "bridge-steps-gpt": "GPT: step, data, recipes",
    "bridge-peft": "LoRA, DoRA, canonical LoRA",
    "transformer-engine": "fused layers on GPUs",
    "apex": "fused gradient accumulation on GPUs",
    "tensorboard": "curves",
    "wandb": "tracking",
    "transformers": "Hugging Face tokenizers",
    "datasets": "Hugging Face datasets on disk",
    "sentencepiece": "SentencePiece tokenizers",
    "tiktoken": "tiktoken tokenizers",
}
"""The packages that a run may use."""


def _remedy(package: str) -> str:
    """Return how to get a package that is not installed."""
    from bridge.training.megatron_patches import MEGATRON_CORE  # Imports torch.

    if package.startswith("bridge-"):
        return f"pip install --find-links DIST {package}"
    return {
        "megatron-core": f"pip install megatron-core=={MEGATRON_CORE}",
        "transformer-engine": 'pip install "transformer-engine[core-cu13,pytorch]" on a machine '
        "with a GPU and its compiler; without it GPUs use our local layers",
        "apex": "nothing to do: Transformer Engine brings what the loop uses",
    }.get(package, f"pip install {package}")


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("doctor", help="versions, devices, missing packages")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    print(f"python              {platform.python_version()}")
    for package, purpose in _PURPOSES.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = f"not installed ({purpose}): {_remedy(package)}"
        print(f"{package:<20}{found}")
    _print_devices()
    free = shutil.disk_usage(".").free / 2**30
    print(f"{'disk':<20}{free:.0f} GiB free here")
    print(f"{'recipes':<20}{', '.join(RECIPES.entries()) or 'none installed'}")
    return 0


def _print_devices() -> None:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        print(f"{'device':<20}cpu: layouts can be tried here over gloo (torch sees no GPU)")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        print(f"{'device':<20}cuda:{index} {properties.name}, {memory:.0f} GiB")
