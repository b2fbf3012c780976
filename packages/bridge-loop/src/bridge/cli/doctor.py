"""``bridge doctor``: versions, devices, missing packages and how to get them."""

import argparse
import importlib
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from bridge.training.entry_points import RECIPES


@dataclass(frozen=True)
class _Part:
    """A package that a run may use."""

    distribution: str
    purpose: str
    remedy: str


def _parts() -> tuple[_Part, ...]:
    from bridge.training.megatron_patches import MEGATRON_CORE  # Imports torch.

    return (
        _Part("torch", "tensors", "pip install torch"),
        _Part("megatron-core", "the engine", f"pip install megatron-core=={MEGATRON_CORE}"),
        _Part(
            "bridge-state", "configuration and state", "pip install --find-links DIST bridge-state"
        ),
        _Part("bridge-loop", "the training loop", "pip install --find-links DIST bridge-loop"),
        _Part(
            "bridge-steps-gpt",
            "GPT: step, data, recipes",
            "pip install --find-links DIST bridge-steps-gpt",
        ),
        _Part(
            "bridge-peft",
            "LoRA, DoRA, canonical LoRA",
            "pip install --find-links DIST bridge-peft",
        ),
        _Part(
            "transformer-engine",
            "fused layers on GPUs",
            'pip install "transformer-engine[core-cu13,pytorch]" on a machine with a GPU and its '
            "compiler; without it GPUs use our local layers",
        ),
        _Part(
            "apex",
            "fused gradient accumulation on GPUs",
            "nothing to do: Transformer Engine brings what the loop uses",
        ),
        _Part("tensorboard", "curves", "pip install tensorboard"),
        _Part("wandb", "tracking", "pip install wandb"),
        _Part("transformers", "Hugging Face tokenizers", "pip install transformers"),
        _Part("datasets", "Hugging Face datasets on disk", "pip install datasets"),
        _Part("sentencepiece", "SentencePiece tokenizers", "pip install sentencepiece"),
        _Part("tiktoken", "tiktoken tokenizers", "pip install tiktoken"),
    )


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("doctor", help="versions, devices, missing packages")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    print(f"python              {platform.python_version()}")
    for part in _parts():
        try:
            found = version(part.distribution)
        except PackageNotFoundError:
            found = f"not installed ({part.purpose}): {part.remedy}"
        print(f"{part.distribution:<20}{found}")
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
