"""Anomalies of the loss: which losses are one, and which rank learns of it when."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bridge.training.config import TrainConfig
from bridge.training.loss.anomalies import WINDOW, LossWatch
from ranks import run_ranks

NAN, INF = float("nan"), float("inf")


def settings(**values: Any) -> TrainConfig:
    return TrainConfig(train_iters=1, **values)


def watch_of(losses: Sequence[float], name: str = "step 1") -> LossWatch:
    watch = LossWatch()
    watch.start(name)
    for loss in losses:
        watch.add(torch.tensor(loss))
    return watch


def one_step(
    watch: LossWatch, step: int, losses: Sequence[float], factor: float | None = 3.0
) -> None:
    watch.start(f"step {step}", spike_factor=factor)
    for loss in losses:
        watch.add(torch.tensor(loss))
    watch.end_step()


def warmed_up(mean: float = 2.0, factor: float = 3.0) -> LossWatch:
    """Return a watch for which any loss above `factor` times `mean` is a spike."""
    watch = LossWatch()
    for step in range(1, WINDOW + 1):
        one_step(watch, step, [mean], factor)
    return watch


def spikes_of(watch: LossWatch, factor: float = 3.0) -> list[str]:
    return watch.check(settings(spike_factor=factor))


# ---- NaN and Inf -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("factor", [None, 3.0])
def test_the_first_loss_that_is_not_finite_is_named(bad: float, factor: float | None) -> None:
    watch = LossWatch()
    for step in range(1, 400):
        one_step(watch, step, [1.0, *[bad if step >= 350 else 1.0] * 2], factor)

    flag = watch.anomaly_flag()
    assert flag is not None
    assert flag.item() == 1.0
    message = f"rank 0: {bad} at step 350, microbatch 1 \\(and 99 later\\)$"
    with pytest.raises(FloatingPointError, match=message):
        watch.check(settings())
    assert watch.check(settings()) == []


def test_clearing_forgets_only_what_the_anomaly_flag_covered() -> None:
    watch = watch_of([1.0, 1.0])
    flag = watch.anomaly_flag()
    assert flag is not None
    assert flag.item() == 0.0
    watch.start("step 2")
    watch.add(torch.tensor(1.0))
    watch.add(torch.tensor(NAN))
    watch.clear()
    with pytest.raises(FloatingPointError, match="nan at step 2, microbatch 1$"):
        watch.check(settings())


def test_clearing_within_a_step_keeps_the_microbatchs_number() -> None:
    watch = watch_of([1.0, 1.0])
    watch.anomaly_flag()
    watch.clear()
    watch.add(torch.tensor(NAN))
    with pytest.raises(FloatingPointError, match="nan at step 1, microbatch 2$"):
        watch.check(settings())


def _watch_on_ranks() -> str:
    watch = LossWatch()
    if dist.get_rank() != 0:
        watch = watch_of([1.0, NAN if dist.get_rank() == 2 else 1.0], "step 9")
    with pytest.raises(FloatingPointError) as caught:
        watch.check(settings())
    assert watch.check(settings()) == []
    return str(caught.value)


def test_all_ranks_raise_for_one_ranks_nan() -> None:
    for message in run_ranks(3, _watch_on_ranks):
        assert message == (
            "The loss is not finite (train.nan_action=raise). rank 2: nan at step 9, microbatch 1"
        )


def test_an_infinite_loss_is_no_spike_and_a_sum_is_judged_for_nan_as_it_is() -> None:
    watch = warmed_up()
    watch.start("step 21", spike_factor=3.0)
    watch.add(torch.tensor(INF), torch.tensor(7, dtype=torch.int32))
    watch.end_step()
    assert watch.check(settings(spike_factor=3.0, nan_action="log")) == [
        "The loss is not finite (train.nan_action=log). rank 0: inf at step 21, microbatch 0"
    ]


# ---- spikes ----------------------------------------------------------------------------------


@dataclass
class Written:
    """Return the mean and the spikes of losses and counts, computed one by one in Python."""

    factor: float
    history: list[float] = field(default_factory=list)
    spikes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def mean(self) -> float:
        first = self.history[:WINDOW]
        value = sum(first) / len(first) if first else 0.0
        for x in self.history[WINDOW:]:
            value = value * (1 - 1 / WINDOW) + x / WINDOW
        return value

    def step(self, number: int, microbatches: Sequence[tuple[float, int]]) -> None:
        usual = []
        for index, (total, tokens) in enumerate(microbatches):
            loss = total / max(tokens, 1)
            if loss != loss or abs(loss) == INF:
                continue
            if len(self.history) >= WINDOW and loss > self.factor * self.mean > 0:
                self.spikes.append((number, index))
            elif tokens:
                usual.append(loss)
        if usual:
            self.history.append(sum(usual) / len(usual))


@pytest.mark.parametrize("pattern", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_spikes_are_those_of_the_definition(pattern: int, seed: int) -> None:
    rng = random.Random(seed)
    watch, written = LossWatch(), Written(2.5)
    found = []
    for step in range(1, 151):
        microbatches = []
        for _ in range(rng.choice([1, 3, 300])):
            loss = rng.choice([NAN, INF]) if rng.random() < 0.01 else 1 + rng.random()
            loss *= rng.choice([1.0] * 40 + [2.0, 3.0, 6.0])
            tokens = 1 if pattern == 1 else rng.choice([0, 1, 7, 64])
            microbatches.append((float(torch.tensor(loss * tokens)), tokens))
        written.step(step, microbatches)
        watch.start(f"step {step}", spike_factor=2.5)
        for total, tokens in microbatches:
            count = torch.tensor(tokens, dtype=torch.int32) if pattern == 2 else None
            watch.add(torch.tensor(total), count)
        watch.end_step()
        found.append(watch.check(settings(spike_factor=2.5, nan_action="log")))

    assert watch.state_dict() == {
        "mean": pytest.approx(written.mean),
        "steps": len(written.history),
    }
    assert len(written.spikes) > 50
    for step, warnings in enumerate(found, start=1):
        of_step = [index for number, index in written.spikes if number == step]
        lines = [line for line in warnings if "spike_factor=2.5" in line]
        assert len(lines) == bool(of_step)
        for line in lines:
            later = f" (and {len(of_step) - 1} later)" if len(of_step) > 1 else ""
            assert f"at step {step}, microbatch {of_step[0]}, where" in line
            assert line.endswith(later)


def test_a_spike_is_reported_with_its_loss_the_mean_and_the_factor() -> None:
    watch = warmed_up()
    watch.start("step 21", spike_factor=3.0)
    for total, tokens in ((60.0, 10), (61.0, 10), (9.0, 1)):
        watch.add(torch.tensor(total), torch.tensor(tokens, dtype=torch.int32))
    watch.end_step()
    assert spikes_of(watch) == [
        "The loss is above train.spike_factor=3.0 times its recent mean (train.spike_action=log). "
        "rank 0: 6.1 at step 21, microbatch 1, where the mean is 2 (and 1 later)"
    ]
    assert spikes_of(watch) == []


@pytest.mark.parametrize("before", [WINDOW - 1, WINDOW])
def test_nothing_is_a_spike_before_the_mean_has_seen_enough_steps(before: int) -> None:
    watch = LossWatch()
    for step in range(before):
        one_step(watch, step, [1.0])
    one_step(watch, before, [100.0])
    assert len(spikes_of(watch)) == (before == WINDOW)


def test_a_step_without_a_usual_loss_leaves_the_mean_alone() -> None:
    watch = warmed_up(2.0)
    before = watch.state_dict()
    for step in range(50):
        one_step(watch, step, [NAN, 100.0])
    assert watch.state_dict() == before == {"mean": 2.0, "steps": WINDOW}


def test_losses_around_zero_have_no_spikes() -> None:
    watch = warmed_up(-2.0)
    one_step(watch, 21, [5.0, -1.0])
    assert spikes_of(watch) == []


def test_an_evaluation_neither_has_spikes_nor_enters_the_mean() -> None:
    watch = warmed_up()
    before = watch.state_dict()
    watch.start("validation at step 20")
    for _ in range(300):
        watch.add(torch.tensor(1000.0))
    one_step(watch, 21, [2.0])
    assert watch.state_dict() == before | {"steps": WINDOW + 1}
    assert spikes_of(watch) == []


def test_a_repeated_step_is_in_the_mean_once() -> None:
    watch = warmed_up()
    watch.start("step 21", spike_factor=3.0)
    watch.add(torch.tensor(4.0))
    one_step(watch, 21, [2.0])
    assert watch.state_dict() == {"mean": 2.0, "steps": WINDOW + 1}


def test_a_watch_that_continues_is_the_one_that_went_on() -> None:
    whole, cut = warmed_up(1.7), warmed_up(1.7)
    for step, loss in enumerate([1.1, 9.9, 0.3, 2.2]):
        one_step(whole, step, [loss])
        restored = LossWatch()
        restored.load_state_dict(cut.state_dict())
        assert restored.state_dict() == cut.state_dict()
        cut = restored
        one_step(cut, step, [loss])
    assert cut.state_dict() == whole.state_dict()
    assert LossWatch().state_dict() == {"mean": 0.0, "steps": 0.0}


# ---- actions ---------------------------------------------------------------------------------

ACTIONS = ["raise", "raise_at_once", "skip", "log"]


@pytest.mark.parametrize("nan_action", ACTIONS)
@pytest.mark.parametrize("spike_action", ACTIONS)
def test_each_kind_has_its_own_action(nan_action: Any, spike_action: Any) -> None:
    watch = warmed_up()
    one_step(watch, 21, [50.0, NAN])
    train = settings(nan_action=nan_action, spike_factor=3.0, spike_action=spike_action)
    texts = [f"(train.nan_action={nan_action})", f"(train.spike_action={spike_action})"]
    raised = [text for text in texts if "raise" in text]
    logged = [text for text in texts if "raise" not in text]
    if raised:
        with pytest.raises(FloatingPointError) as caught:
            watch.check(train)
        assert all(text in str(caught.value) for text in raised)
        warnings = getattr(caught.value, "__notes__", [])
    else:
        warnings = watch.check(train)
    assert len(warnings) == len(logged)
    assert all(text in line for text, line in zip(logged, warnings, strict=True))
    assert watch.check(train) == []


def test_a_kind_without_an_action_is_not_reported() -> None:
    watch = warmed_up()
    one_step(watch, 21, [50.0, NAN])
    assert watch.check(settings(check_for_nan=False)) == []
    assert watch.check(settings()) == []


@pytest.mark.parametrize(
    ("nan_action", "spike_action", "losses", "expected"),
    [
        ("skip", "log", NAN, True),
        ("skip", "log", -INF, True),
        ("skip", "log", 50.0, False),
        ("skip", "log", 2.0, False),
        ("log", "skip", 50.0, True),
        ("log", "skip", NAN, False),
        ("raise", "raise", NAN, False),
        ("raise_at_once", "log", NAN, "raise_at_once). rank 1: nan at step 21, microbatch 0"),
        ("skip", "raise_at_once", NAN, True),
        ("skip", "raise_at_once", 50.0, "raise_at_once). rank 1: 50 at step 21, microbatch 0"),
    ],
)
def test_all_ranks_skip_the_step_of_one_rank(
    nan_action: Any, spike_action: Any, losses: float, expected: bool | str
) -> None:
    def body() -> bool | str:
        # Rank 0 has no losses, as on the first of two pipeline stages.
        watch = LossWatch() if dist.get_rank() == 0 else warmed_up()
        watch.start("step 21", spike_factor=3.0)
        if dist.get_rank() == 1:
            watch.add(torch.tensor(losses))
        watch.end_step()
        train = settings(nan_action=nan_action, spike_factor=3.0, spike_action=spike_action)
        try:
            return watch.should_skip_step(train)
        except FloatingPointError as error:
            return str(error)

    for found in run_ranks(2, body):
        assert found == expected or (isinstance(found, str) and str(expected) in found)


def test_only_the_present_step_is_skipped_and_earlier_losses_stay_unread() -> None:
    def body() -> list[Any]:
        watch = warmed_up()
        train = settings(spike_factor=3.0, nan_action="skip")
        found: list[Any] = []
        for step, losses in ((21, [2.0]), (22, [NAN]), (23, [2.0]), (24, [50.0]), (25, [2.0])):
            one_step(watch, step, losses)
            found.append(watch.should_skip_step(train))
        return [*found, watch.check(train)]

    (found,) = run_ranks(1, body)
    assert found[:5] == [False, True, False, False, False]
    assert ["step 22" in found[5][0], "step 24" in found[5][1]] == [True, True]


def test_losses_that_all_ranks_have_looked_at_are_not_kept() -> None:
    def body() -> int:
        watch = warmed_up()
        for step in range(21, 100):
            one_step(watch, step, [2.0])
            watch.should_skip_step(settings(nan_action="skip"))
        return sum(block.numel() for block in watch._blocks)

    assert run_ranks(1, body) == [0]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("factor", [None, 3.0])
def test_nothing_waits_for_the_gpu_before_someone_looks(factor: float | None) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    losses = [torch.full((), value, device=device) for value in (2.0, 50.0)]
    count = torch.ones((), dtype=torch.int32, device=device)
    watch = LossWatch()
    watch.load_state_dict({"mean": 2.0, "steps": float(WINDOW)})
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2):
            watch.start(f"step {step}", spike_factor=factor)
            for loss in losses:
                watch.add(loss, count)
            watch.end_step()
            assert not watch.should_skip_step(settings(spike_factor=factor))
        flag = watch.anomaly_flag()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert flag is not None
    assert flag.item() == (factor is not None)
    assert len(watch.check(settings(spike_factor=factor))) == (factor is not None)
