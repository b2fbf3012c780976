"""Local ranks through torchrun's elastic launcher, and hiding the GPUs from a rehearsal.

On a CPU the ranks are forked from this process, which has imported everything: they start at once.
On GPUs each is a process of its own, as CUDA does not survive a fork. Either way they are in
process groups of their own, so that a Ctrl-C reaches each of them exactly once: this process
passes on the signals that it gets.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer
    from bridge.training.contracts import Recipe

_FORWARDED = (signal.SIGINT, signal.SIGTERM)


def hide_gpus_for_rehearsal(documents: Sequence[str], overrides: Sequence[str]) -> None:
    """Hide the GPUs where ``dist.device=cpu`` is asked for, before torch initialises CUDA."""
    import yaml

    wanted = "auto"
    for text in documents:
        with contextlib.suppress(yaml.YAMLError):
            # What cannot be read here is reported with all other problems later on.
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


def on_local_ranks(ranks: int, recipe: "Recipe", config: "ConfigContainer") -> int:
    """Train on `ranks` processes of this machine; return the exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from bridge.training.distributed import choose_device
    from bridge.training.run_directory import new_run_name

    # The ranks could not agree on a time of day.
    config.checkpoint.run_dir = config.checkpoint.run_dir or new_run_name(config.recipe)
    device = choose_device(config.dist.device)
    # The launcher would report each failed rank again, after the rank itself has.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    with _signals_passed_on():
        try:
            if device == "cpu":
                elastic_launch(settings, _forked_rank)(recipe, config)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "config.yaml"
                    path.write_text(config.to_yaml())
                    elastic_launch(settings, sys.executable)(
                        "-m", "bridge.cli.rank", recipe.name, str(path)
                    )
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            # A negative code is the number of the signal that killed the rank.
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def train_as_rank(recipe: "Recipe", config: "ConfigContainer") -> int:
    """Train as one of the local ranks; return the exit code."""
    from bridge.cli.pretrain import train_here

    os.setpgid(0, 0)
    try:
        return train_here(recipe, config)
    except ValueError as error:
        # Every rank finds the same mistake; one line is enough.
        if os.environ["RANK"] == "0":
            print(f"bridge: {error}", file=sys.stderr)
        return 2


def _forked_rank(recipe: "Recipe", config: "ConfigContainer") -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for number in _FORWARDED:
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
    code = train_as_rank(recipe, config)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # An exit, not an exception, which the launcher would report a second time.
        os._exit(code)


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[None]:
    import psutil

    this = psutil.Process()

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in this.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
