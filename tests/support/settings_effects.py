"""The effect of a setting: a run with another value of it, compared with the same run without.

Compared are losses, gradient norms, metrics, modules and parameters, the optimizer's groups and
scaler, the operations of a step (collectives too), hooks, files and messages.
"""

import collections
import contextlib
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, override

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.training.config import (
    ConfigContainer,
    ConfigError,
    OptimizerConfig,
    SchedulerConfig,
    TrainConfig,
    apply_overrides,
    configure,
)
from bridge.training.config.checks.unsupported import DDP, MODEL, OPTIMIZER, rejections_in
from bridge.training.config.schema.fields import annotations_of
from bridge.training.gpt_step import forward_step
from bridge.training.mimo_step import forward_step as mimo_step
from bridge.training.transformer.limits import LAYERS
from gpt_models import tiny_gpt
from mimo_models import mimo_run, tiny_mimo
from ranks import RankFailure, run_ranks
from settings_trials import Trial, trial_of
from training_runs import TokenData, a_run, gpt_run, one_step

LANGUAGE = "model.language"
STEPS = 6
TRACED = 3
CLASSES = ("effect", "derived", "rejected", "GPU only")

# Messages about features that need libraries for GPUs.
_GPU_REASONS = re.compile(
    r"Transformer Engine|TransformerEngine|NCCL|\bTE\b|GPU|gradient_accumulation_fusion", re.I
)


@dataclass(frozen=True)
class Finding:
    """The class of a field, and the evidence."""

    kind: str
    shown: str


class _Operations(TorchDispatchMode):
    """Counts the operations of a step by name, shapes and types."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: collections.Counter[str] = collections.Counter()
        self.transfers: list[str] = []

    @override
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        tensors = torch.utils._pytree.tree_leaves((args, kwargs))
        shapes = [(tuple(t.shape), str(t.dtype)) for t in tensors if isinstance(t, torch.Tensor)]
        self.counts[f"{function} {shapes}"] += 1
        if str(function).startswith(("c10d.send", "c10d.recv")):
            self.transfers.append(str(function))
        return function(*args, **(kwargs or {}))


def base(precision: str) -> ConfigContainer:
    """Return the run that every trial changes: two layers, four samples over and over."""
    config = gpt_run(
        "unused",
        tiny_gpt(num_layers=2, layer_spec="auto", pipeline_dtype=None),
        dataset=TokenData(train=4),
        train=TrainConfig(train_iters=STEPS, global_batch_size=4, micro_batch_size=1),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=5e-4, weight_decay=0.1, adam_beta2=0.95),
        scheduler=SchedulerConfig(lr_warmup_fraction=0.2),
    )
    # The default of a container, not the value of `gpt_run`.
    config.ddp = ConfigContainer(model=config.model, dataset=config.dataset).ddp
    config.mixed_precision.precision = precision  # type: ignore[assignment]
    return config


def multimodal(precision: str) -> ConfigContainer:
    """Return the run that every trial of a language model's section changes."""
    as_gpt = {
        "layer_spec": "auto",
        "num_query_groups": 2,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
    }
    model = tiny_mimo(language=as_gpt, vision={"layer_spec": "auto"})
    config = mimo_run("unused", model)
    config.train = TrainConfig(train_iters=STEPS, global_batch_size=4, micro_batch_size=1)
    config.mixed_precision.precision = precision  # type: ignore[assignment]
    return config


def start_of(trial: Trial) -> tuple[ConfigContainer, Callable[..., Any]]:
    """Return the run that a trial changes, and its forward step."""
    if trial.is_multimodal:
        return multimodal(trial.precision), mimo_step
    return base(trial.precision), forward_step


def rejection(trial: Trial, *overrides: str) -> str | None:
    """Return why the dry run rejects the values of a trial, or None."""
    settings = [*trial.base, *trial.also, *overrides]
    try:
        configure(start_of(trial)[0], settings, device="cpu", world_size=trial.ranks)
    except ConfigError as error:
        return "\n".join(error.problems)
    return None


def observed(trial: Trial, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Run and return everything to compare, of rank 0; the losses are those of all ranks."""

    def rank(directory: str) -> dict[str, Any]:
        output = open(f"{directory}/output-{os.environ['RANK']}", "w+")
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        texts = [o.replace("DIRECTORY", f"{directory}/logged") for o in overrides]
        start, step_function = start_of(trial)
        config = apply_overrides(start, texts)
        config.checkpoint.run_dir = f"{directory}/run"
        found: dict[str, Any] = {}
        with a_run(config, step_function) as run, _transfers(run.parts.model) as transfers:
            found["model"] = _text(_model(run.parts.model))
            found["optimizer"] = _text(_optimizer(run.parts.optimizer))
            found["hooks"] = _text(_hooks(run.parts.model))
            data, operations = run.parts.data.training(0), _Operations()
            steps = []
            for step in range(STEPS):
                with operations if step == TRACED else contextlib.nullcontext():
                    steps.append(one_step(run, data_iterator=data, reducer=run.parts.reducer))
            found["losses"] = [dict(step.metrics) for step in steps]
            found["metrics"] = sorted(found["losses"][0])
            norms = [None if s.grad_norm is None else float(s.grad_norm) for s in steps]
            found["gradient norm"] = norms
            found["zeros"] = [step.zeros_in_grad for step in steps]
            found["scale"] = _text(_optimizer(run.parts.optimizer))
        found["operations"] = hashlib.sha256(_text(sorted(operations.counts.items())).encode())
        found["operations"] = found["operations"].hexdigest()
        found["order of transfers"] = [*transfers, *operations.transfers]
        found["files"] = sorted(path.name for path in Path(directory).glob("logged/*"))
        output.flush()
        output.seek(0)
        found["messages"] = output.read().replace(directory, "")
        return found

    with tempfile.TemporaryDirectory() as directory:
        first: dict[str, Any] = run_ranks(trial.ranks, rank, directory, timeout=120)[0]
    return first


def _text(value: Any) -> str:
    return re.sub(r" at 0x\w+", "", repr(value))


def _model(chunks: list[Any]) -> Any:
    modules = [(n, type(m).__name__) for chunk in chunks for n, m in chunk.named_modules()]
    return modules, [
        (n, tuple(p.shape), p.dtype) for chunk in chunks for n, p in chunk.named_parameters()
    ]


def _optimizer(optimizer: Any) -> Any:
    groups = [
        {k: v for k, v in group.items() if k != "params" and not isinstance(v, torch.Tensor)}
        for group in optimizer.param_groups
    ]
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    scalers = [vars(p.grad_scaler) for p in parts if getattr(p, "grad_scaler", None)]
    inner = [type(getattr(part, "optimizer", None)).__name__ for part in parts]
    return groups, scalers, inner


def _hooks(chunks: list[Any]) -> Any:
    config = chunks[0].config
    # The parts of a multimodal model have configs of their own.
    names = ("no_sync_func", "param_sync_func", "grad_sync_func", "timers")
    handles = [len(getattr(chunk, "remove_forward_pre_hook_handles", ())) for chunk in chunks]
    return [getattr(config, name) is None for name in names], handles


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the names of the differences, the most direct first."""
    order = ("losses", "gradient norm", "metrics", "zeros", "model", "optimizer", "operations")
    others = ("order of transfers", "hooks", "files", "scale", "messages")
    return [name for name in (*order, *others) if before[name] != after[name]]


@contextlib.contextmanager
def _transfers(chunks: list[Any]) -> Iterator[list[str]]:
    """Record the transfers between stages and the forward passes of chunks, in order."""
    noted: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_noting(torch.distributed, "batch_isend_irecv", noted))
        stack.enter_context(_noting(torch.cuda, "synchronize", noted))
        for index, chunk in enumerate(chunks):
            note = functools.partial(noted.append, f"forward {index}")
            hook = chunk.register_forward_pre_hook(lambda *_, note=note: note())
            stack.callback(hook.remove)
        yield noted


@contextlib.contextmanager
def _noting(module: Any, name: str, noted: list[str]) -> Iterator[None]:
    original = getattr(module, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        noted.append(name)
        return original(*args, **kwargs)

    setattr(module, name, noting)
    try:
        yield
    finally:
        setattr(module, name, original)


class Audit:
    """Classifies fields, one after the other."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._baselines: dict[Any, Any] = {}

    def field(self, section: str, name: str, holder: Any) -> Finding:
        """Return the class of a field; a failure goes to `problems`."""
        trial = trial_of(section, name, holder)
        if trial is None:
            return Finding("derived", "set by the loop while it runs")
        return self.tried(f"{section}.{name}", trial, holder)

    def language(self, name: str, holder: Any, of_gpt: Finding | None) -> Finding:
        """Return the class of a field in the language section of a multimodal model."""
        trial = language_trial(name, holder)
        if trial is None:
            return Finding("derived", "set by the loop while it runs")
        path = f"{LANGUAGE}.{name}"
        of_layout = name.endswith("parallel_size")
        if (trial.ranks > 1 or trial.precision != "fp32") and not of_layout:
            # One rank in float32 cannot show it. The code that reads it is the same as for GPT.
            return of_gpt or Finding("effect", "the same field of model")
        rejected = rejection(trial, f"{path}={trial.value}")
        if rejected is not None and any("num_moe_experts" in text for text in trial.base):
            return Finding("rejected", "experts are not supported by multimodal models")
        if rejected is not None and any("mtp_num_layers" in text for text in trial.base):
            return Finding("rejected", "multi-token prediction is not supported by them")
        if rejected is not None and any("use_mup" in text for text in trial.base):
            return Finding("rejected", "muP is not supported by them")
        return self.tried(path, trial, holder)

    def tried(self, path: str, trial: Trial, holder: Any) -> Finding:
        """Return the class of the field at `path`, as its trial shows it."""
        section, _, name = path.rpartition(".")
        override = f"{path}={trial.value}"
        rejected = rejection(trial, override)
        for value in _other_choices(annotations_of(type(holder))[name], trial.value):
            self._choice(replace(trial, value=value), f"{path}={value}")
        if rejected is not None:
            return self._rejected(path, rejected)
        try:
            found = changes(
                self._baseline(trial),
                after := observed(trial, (*trial.base, *trial.also, override)),
            )
        except RankFailure as error:
            last = str(error).strip().splitlines()[-2:]
            return self._failed(f"{override}: fails after the dry run: {' '.join(last)}")
        if not found:
            return self._failed(f"{override}: changes nothing")
        if not section.startswith("model") and annotations_of(type(holder))[name] is bool:
            self._falls(override, self._baseline(trial)["losses"], after["losses"])
        return Finding("effect", found[0])

    def _choice(self, trial: Trial, override: str) -> None:
        """Try another value of a field with a few choices."""
        if rejection(trial, override) is None:
            try:
                observed(trial, (*trial.base, *trial.also, override))
            except RankFailure as error:
                last = str(error).strip().splitlines()[-1]
                self._failed(f"{override}: fails after the dry run: {last}")

    def _failed(self, text: str) -> Finding:
        self.problems.append(text)
        return Finding("?", text)

    def _baseline(self, trial: Trial) -> dict[str, Any]:
        key = (trial.base, trial.ranks, trial.precision, trial.is_multimodal)
        if key not in self._baselines:
            self._baselines[key] = observed(trial, trial.base)
        found: dict[str, Any] = self._baselines[key]
        return found

    def _rejected(self, path: str, text: str) -> Finding:
        own = [line for line in text.splitlines() if path in line]
        if not own and all(map(_GPU_REASONS.search, text.splitlines())):
            return Finding("GPU only", text.splitlines()[0].partition("; ")[0])
        if not own:
            return self._failed(f"{path}: rejected without its name: {text}")
        if " contradicts " in own[0]:
            reason = own[0].partition(" contradicts ")[2].partition("=")[0]
            return Finding("derived", f"from {reason}")
        why = re.sub(rf"^{re.escape(path)}(=\S+?)?:? ", "", own[0])
        first, _, rest = re.sub(r"\s+", " ", why).partition("; ")
        # Some messages begin with the value.
        why = (first if " " in first else rest).partition("; ")[0].partition(": set it")[0]
        path = path.replace(LANGUAGE, "model")
        never = "not supported" in own[0] or _rejected_on_gpu(path)
        on_gpu = _GPU_REASONS.search(own[0]) and not never
        return Finding("GPU only" if on_gpu else "rejected", why)

    def _falls(self, override: str, before: list[Any], after: list[Any]) -> None:
        was, now = (steps[-1]["lm loss"] for steps in (before, after))
        if not now < min(0.95 * after[0]["lm loss"], 1.05 * was):
            self.problems.append(f"{override}: the loss ends at {now:.3f} and at {was:.3f} without")


def _other_choices(annotation: Any, tried: str) -> Iterator[str]:
    """Yield the values of a choice among a few, but for one."""
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is Literal:
            yield from (str(v) for v in get_args(kind) if v is not None and str(v) != tried)


def _rejected_on_gpu(path: str) -> bool:
    """Whether the rules reject a field on a GPU with Transformer Engine too."""
    section, _, name = path.partition(".")
    config = base("bf16")
    config.dist.device = "cuda"
    trial = trial_of(section, name, getattr(config, section))
    assert trial is not None
    settings = [*trial.base, *trial.also, f"{path}={trial.value}"]
    try:
        config = apply_overrides(config, settings)
    except ConfigError:  # the value cannot be given as text
        return True
    config.model.layer_spec = "transformer_engine"  # type: ignore[attr-defined]
    rules = {"optimizer": OPTIMIZER, "ddp": DDP, "model": (*MODEL, *LAYERS)}[section]
    problems = rejections_in(getattr(config, section), section, config, rules)
    return any(problem.blamed == path for problem in problems)


def language_trial(name: str, holder: Any) -> Trial | None:
    """Return the trial of a field of a language model's section."""
    trial = trial_of("model", name, holder)
    if trial is None:
        return None
    base, also = (
        tuple(text.replace("model.", f"{LANGUAGE}.", 1) for text in texts)
        for texts in (trial.base, trial.also)
    )
    return replace(trial, base=base, also=also, is_multimodal=True)


def sections() -> dict[str, Any]:
    """Return the audited sections by name."""
    config = base("fp32")
    return {"model": config.model, "optimizer": config.optimizer, "ddp": config.ddp}
