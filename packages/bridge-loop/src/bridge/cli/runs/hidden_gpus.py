"""The GPUs of this machine, hidden from a run on the CPU."""

import contextlib
import os
from collections.abc import Sequence


def hide_gpus_on_cpu_runs(documents: Sequence[str], overrides: Sequence[str]) -> None:
    """Hide the GPUs where ``dist.device=cpu`` is asked for, before torch initializes CUDA."""
    import yaml

    wanted = "auto"
    for text in documents:
        with contextlib.suppress(yaml.YAMLError):
            # A document that cannot be read is reported later, with all other problems.
            document = yaml.safe_load(text)
            section = document.get("dist") if isinstance(document, dict) else None
            if isinstance(section, dict):
                wanted = section.get("device", wanted)
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "dist.device":
            wanted = value
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
