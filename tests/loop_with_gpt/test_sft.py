"""Fine-tuning a GPT: packed samples train like single ones, under every layout."""

from pathlib import Path
from typing import Any

import pytest

from bridge.gpt.data.sft.dataset_config import SFTDatasetConfig
from bridge.training.config import ConfigContainer
from bridge.training.finetune import finetune
from bridge.training.gpt_step import forward_step
from bridge.training.pretrain import pretrain
from ranks import run_ranks
from sft_data import uneven_rows, write_rows
from sft_runs import ROWS, sft_run
from training_runs import Killed, Killer, series


def outcome(
    place: Path, *, packing: bool = False, micro_batch_size: int = 1, **model: Any
) -> tuple[list[float], list[float]]:
    """Return losses and gradient norms; the tokens are those of the rows, without padding."""
    config = sft_run(place, packing=packing, **model)
    config.train.micro_batch_size = micro_batch_size
    pretrain(config, forward_step)
    row_tokens = sum(len(row["prompt"]) + len(row["completion"]) for row in ROWS)
    assert series(place, "consumed_tokens") == [row_tokens, 2 * row_tokens]
    return series(place, "lm loss"), series(place, "grad_norm")


LEARNED = {"position_embedding_type": "learned_absolute"}
PIPELINE = {"pipeline_model_parallel_size": 2}
VIRTUAL = {**PIPELINE, "virtual_pipeline_model_parallel_size": 2}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
VARIABLE = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "alone": {},
        "microbatches of four": {"micro_batch_size": 4},
        "packed": {"packing": True},
        "learned, alone": {"micro_batch_size": 2, **LEARNED},
        "learned, packed": {"packing": True, **LEARNED},
    },
    2: {
        "packed, data": {"packing": True},
        "packed, pipeline": {"packing": True, **PIPELINE},
        "packed, virtual pipeline": {"packing": True, **VIRTUAL},
        "packed, sequence": {"packing": True, **TENSOR},
        "packed, context": {"packing": True, "context_parallel_size": 2},
        "pipeline": {"micro_batch_size": 2, **PIPELINE},
        "pipeline of variable lengths": {**PIPELINE, **VARIABLE},
        "sequence": {"micro_batch_size": 2, **TENSOR},
        "context": {"context_parallel_size": 2},
    },
}


def test_packed_samples_train_as_samples_alone_under_every_layout(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)

    def body(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {name: outcome(tmp_path / name, **case) for name, case in cases.items()}

    found = {
        name: result for n in (1, 2) for name, result in run_ranks(n, body, CASES[n])[0].items()
    }
    for name, (losses, norms) in found.items():
        reference = found["learned, alone" if name.startswith("learned") else "alone"]
        assert losses == pytest.approx(reference[0], rel=2e-6), name
        assert norms == pytest.approx(reference[1], rel=1e-5), name
    assert len(found["alone"][0]) == 2


def test_a_packed_run_that_was_cut_off_continues_bit_for_bit(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", uneven_rows(30))

    def config(name: str) -> ConfigContainer:
        found = sft_run(tmp_path / name, packing=True)
        # Five steps are more than one pass.
        found.train.train_iters, found.train.global_batch_size = 5, 2
        found.checkpoint.pretrained_checkpoint = str(tmp_path / "base")
        found.checkpoint.save_interval = 2
        return found

    def body() -> None:
        base = sft_run(tmp_path / "base")
        base.train.train_iters, base.checkpoint.save_at_end = 1, True
        pretrain(base, forward_step)
        finetune(config("whole"), forward_step)
        with pytest.raises(Killed):
            finetune(config("cut"), forward_step, [Killer(3)])
        again = config("cut")
        again.checkpoint.resume = True
        finetune(again, forward_step)
        again = config("cut")
        again.checkpoint.resume = True
        again.dataset = SFTDatasetConfig(
            path=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache")
        )
        with pytest.raises(ValueError, match="dataset.packing=\\S+: the run was started with True"):
            finetune(again, forward_step)
        again = config("cut")
        again.checkpoint.resume = True
        write_rows(tmp_path / "rows.jsonl", uneven_rows(20))
        with pytest.raises(ValueError, match="trained on data in the order .*packed sequences"):
            finetune(again, forward_step)

    run_ranks(1, body, timeout=100)
    for name in ("lm loss", "grad_norm", "consumed_samples"):
        assert len(series(tmp_path / "whole", name)) == 5
        assert series(tmp_path / "cut", name) == series(tmp_path / "whole", name)
