"""A run is set up completely, or nothing of it is left."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.training.config import ConfigContainer
from bridge.training.contracts import DataRequest, DataSplits
from bridge.training.gpt_step import forward_step
from bridge.training.metric_loggers import TensorBoardLogger
from bridge.training.pretrain import pretrain
from gpt_models import tiny_gpt
from ranks import run_ranks
from training_runs import OwnData, OwnModel, TokenData, gpt_run, own_run, rows, series, token_step


class NoData(OwnData):
    @override
    def build(self, request: DataRequest) -> DataSplits:
        return DataSplits(train=None)


class BrokenModel(OwnModel):
    @override
    def build(self, **arguments: Any) -> Any:  # type: ignore[override]
        return "no module"


def wrong_step(one: Any, two: Any, three: Any, four: Any, five: Any) -> None:
    """A forward step of none of the accepted forms."""


@pytest.mark.parametrize(
    ("sections", "step", "message"),
    [
        ({"dataset": NoData()}, token_step, "there is no training data"),
        ({"model": BrokenModel()}, token_step, "model.build: returned str"),
        ({}, wrong_step, "forward step"),
    ],
    ids=["data", "model", "step"],
)
def test_nothing_is_left_of_a_run_that_could_not_start(
    tmp_path: Path, sections: dict[str, Any], step: Any, message: str
) -> None:
    def body() -> Any:
        with pytest.raises(ValueError, match="(?i)" + message) as error:
            pretrain(own_run(tmp_path / "runs" / "run", **sections), step)
        return error.value.__notes__

    notes = run_ranks(2, body, timeout=120)
    # A rank that fails second may have learned of the first, and prints that before its own error.
    assert [of_rank[-1] for of_rank in notes] == ["rank 0, in set-up", "rank 1, in set-up"]
    assert all(note.startswith("after rank ") for of_rank in notes for note in of_rank[:-1])
    assert not (tmp_path / "runs").exists()


def test_nothing_is_left_where_a_tracker_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trackers start when the run's directory is there already."""

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no tracker")

    monkeypatch.setattr(TensorBoardLogger, "of_run", fail)

    def body() -> None:
        config = own_run(tmp_path / "run")
        config.logger.tensorboard = True
        with pytest.raises(ValueError, match="no tracker"):
            pretrain(config, token_step)

    run_ranks(1, body, timeout=120)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_a_run_is_rejected_and_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')

    def body() -> None:
        with pytest.raises(ValueError, match="holds a run already"):
            pretrain(own_run(run), token_step)

    run_ranks(2, body, timeout=120)
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    def body() -> None:
        config = own_run(tmp_path / "run")
        config.checkpoint.resume = True
        with pytest.raises(ValueError, match="holds no run to resume"):
            pretrain(config, token_step)

    run_ranks(1, body, timeout=120)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_checkpoint_is_resumed_from_its_start(tmp_path: Path) -> None:
    def body(resume: bool) -> None:
        config = own_run(tmp_path / "run", dataset=OwnData(validation=8))
        config.validation.eval_at_start = True
        config.checkpoint.resume = resume
        pretrain(config, token_step)

    run_ranks(1, body, False, timeout=120)
    errors = series(tmp_path / "run", "error"), series(tmp_path / "run", "validation/error")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "err')
    run_ranks(1, body, True, timeout=120)
    assert errors == (
        series(tmp_path / "run", "error"),
        series(tmp_path / "run", "validation/error"),
    )
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 5]


def test_the_resolved_configuration_is_saved_and_makes_the_same_run(tmp_path: Path) -> None:

    def body() -> None:
        from bridge.gpt.data.dataset_config import GPTDatasetConfig

        config = gpt_run(tmp_path / "first", tiny_gpt(), dataset=GPTDatasetConfig(mock=True))
        pretrain(config, forward_step)
        saved = ConfigContainer.from_yaml((tmp_path / "first" / "config.yaml").read_text())
        assert saved.mixed_precision.precision == "fp32"
        saved.checkpoint.run_dir = str(tmp_path / "second")
        pretrain(saved, forward_step)

    run_ranks(1, body, timeout=120)
    assert series(tmp_path / "first", "lm loss") == series(tmp_path / "second", "lm loss")


def test_every_stage_builds_the_same_data_where_building_draws_random_numbers(
    tmp_path: Path,
) -> None:
    drawn: list[float] = []

    class Drawing(OwnData):
        @override
        def build(self, request: DataRequest) -> DataSplits:
            drawn.append(float(torch.rand(())))
            raise ZeroDivisionError

    def body() -> float:
        config = gpt_run(tmp_path / "run", tiny_gpt(pipeline_model_parallel_size=2))
        config.dataset = Drawing()

        with pytest.raises(ZeroDivisionError):
            pretrain(config, forward_step)
        return drawn[0]

    one, other = run_ranks(2, body, timeout=120)
    assert one == other


def test_timers_of_schedule_and_optimizer_are_logged_where_they_are_asked_for(
    tmp_path: Path,
) -> None:
    def body() -> None:
        config = own_run(tmp_path / "run")
        config.logger.timing_log_level = 2
        pretrain(config, token_step)

    run_ranks(2, body, timeout=120)
    timed = {name for name in rows(tmp_path / "run")[-1] if name.endswith("-time")}
    assert {"forward-backward-time", "optimizer-inner-step-time"} <= timed


def test_default_names_of_new_runs_are_one_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def body() -> str:
        config = own_run("unused")
        config.checkpoint.run_dir = None
        config.recipe = "mine"
        config.train.train_iters = 1
        return str(pretrain(config, token_step).run_dir)

    (name,) = set(run_ranks(2, body, timeout=120))
    assert name.startswith("runs/mine-")
    assert json.loads((tmp_path / name / "metrics.jsonl").read_text())["step"] == 1


@dataclass(kw_only=True)
class MegatronsGPT(TransformerConfig):
    """A user's section that is the config of megatron-core's model."""

    seq_length: int = 16
    vocab_size: int = 64

    def build(
        self, pg_collection: Any, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> GPTModel:
        return GPTModel(
            config=self,
            transformer_layer_spec=get_gpt_layer_local_spec(),
            vocab_size=self.vocab_size,
            max_sequence_length=self.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )


def test_a_section_may_be_its_models_own_config(tmp_path: Path) -> None:
    """The loop's hooks are in it while it trains, and in no file."""

    def config() -> ConfigContainer:
        model = MegatronsGPT(num_layers=2, hidden_size=16, num_attention_heads=2)
        made = own_run(tmp_path / "run", model=model, dataset=TokenData())
        made.checkpoint.save_interval = 2
        return made

    def body(resume: bool) -> None:
        made = config()
        made.train.train_iters = 4 if resume else 2
        made.scheduler.lr_decay_iters = 4
        made.checkpoint.resume = resume
        pretrain(made, forward_step)

    for resume in (False, True):
        run_ranks(2, body, resume, timeout=120)
    losses = series(tmp_path / "run", "lm loss")
    assert len(losses) == 4
    assert losses[0] == pytest.approx(math.log(64), rel=0.1)
    saved = ConfigContainer.from_yaml((tmp_path / "run" / "config.yaml").read_text())
    assert type(saved.model).__name__ == "MegatronsGPT"
