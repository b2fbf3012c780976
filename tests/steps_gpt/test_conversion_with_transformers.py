"""Import and export of models that transformers wrote: its logits, and unchanged weights."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.gpt.conversion.hf_export import export_hf
from bridge.gpt.conversion.hf_import import import_hf
from bridge.training.checkpoint_weights import saved_config
from bridge.training.contracts import ExportRequest
from bridge.training.gpt_step import forward_step
from bridge.training.setup import training_parts
from bridge.training.train import train_step
from hf_models import (
    LLAMA3_ROPE,
    VOCABULARY,
    config_of,
    logits_of,
    run_from,
    tensors_of,
    write_with_transformers,
)
from ranks import run_ranks

pytestmark = [
    pytest.mark.xdist_group("transformers"),
    # Found without an import, since every worker collects this file and only one runs it.
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None, reason="needs transformers"
    ),
]

LLAMA, QWEN3 = "LlamaForCausalLM", "Qwen3ForCausalLM"
MODELS = {
    "llama": config_of(LLAMA),
    "llama3, tied": config_of(
        LLAMA, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE, tie_word_embeddings=True
    ),
    "llama with biases": config_of(
        LLAMA, attention_bias=True, mlp_bias=True, num_key_value_heads=4, rms_norm_eps=1e-3
    ),
    "qwen3": config_of(QWEN3, head_dim=16, rope_theta=1000000.0),
    "qwen3, tied, bf16": config_of(QWEN3, head_dim=16, tie_word_embeddings=True),
}
TOKENS = torch.randint(VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(3))


def alone(convert: Callable[..., Any], *arguments: Any) -> None:
    """Convert in a fork, because a process with gloo must not be forked later."""
    run_ranks(1, convert, *arguments, process_group=False)


class Made:
    """The models in all forms: transformers' logits, its folder, our checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logits: dict[str, torch.Tensor] = {}
        for name, config in MODELS.items():
            dtype = torch.bfloat16 if "bf16" in name else torch.float32
            model = write_with_transformers(self.original(name), config, dtype)
            with torch.no_grad():
                self.logits[name] = model(TOKENS).logits
            alone(import_hf, self.original(name), self.checkpoint(name))

    def original(self, name: str) -> Path:
        return self.folder / name

    def checkpoint(self, name: str) -> Path:
        return self.folder / f"{name} imported"

    def export(self, checkpoint: Path, name: str) -> Path:
        output = self.folder / name
        output.mkdir()
        config = saved_config(checkpoint)
        alone(
            export_hf,
            ExportRequest(
                checkpoint=checkpoint, config=config, output=output, dtype=None, max_shard_size=9000
            ),
        )
        return output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("models"))


def loaded_logits(made: Made, names: list[str], *, split: bool) -> dict[str, Any]:
    """Start a run from each checkpoint, as the loop does, and return its model's logits.

    The run of a split model saves a checkpoint after a step that changes nothing.
    """
    found = {}
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2} if split else {}
    for name in names:
        config = run_from(made.checkpoint(name), made.folder / f"{name} run", **layout)
        with training_parts(config, forward_step) as parts:
            found[name] = logits_of(parts.model, TOKENS)
            if split:
                train_step(
                    parts.forward_step,
                    parts.data.training(consumed_samples=0),
                    parts.model,
                    parts.optimizer,
                    parts.scheduler,
                    parts.state,
                    pg_collection=parts.ranks.pg_collection,
                    reducer=parts.reducer,
                )
                parts.checkpointer.save()
    return found


def assert_equal_logits(made: Made, found: dict[str, Any]) -> None:
    for name, logits in found.items():
        expected = made.logits[name]
        assert expected.std() > 0.5
        deviation = (logits - expected).abs().max()
        assert deviation < 1e-4, f"{name}: {deviation}"


def test_imported_models_have_the_logits_of_transformers(made: Made) -> None:
    [found] = run_ranks(1, lambda: loaded_logits(made, list(MODELS), split=False))
    assert list(found) == list(MODELS)
    assert_equal_logits(made, found)
    # Without the scaling the test would fail.
    plain = MODELS["llama3, tied"] | {"rope_scaling": None}
    model = write_with_transformers(made.folder / "plain", plain, torch.float32)
    with torch.no_grad():
        assert (model(TOKENS).logits - made.logits["llama3, tied"]).abs().max() > 1e-3


def test_split_models_load_and_are_exported_bit_for_bit(made: Made) -> None:
    names = ["llama3, tied", "qwen3"]
    *_, last = run_ranks(4, lambda: loaded_logits(made, names, split=True))
    assert_equal_logits(made, last)
    for name in names:
        run = made.folder / f"{name} run" / "checkpoints" / "step-0000001"
        for checkpoint in (made.checkpoint(name), run):
            exported = made.export(checkpoint, f"{checkpoint.name} {name} exported")
            assert_same_tensors(made.original(name), exported)


def test_transformers_reads_an_export_as_the_model_that_was_imported(made: Made) -> None:
    import transformers

    for name, config in MODELS.items():
        exported = made.export(made.checkpoint(name), f"{name} back")
        assert_same_tensors(made.original(name), exported)
        kind = getattr(transformers, config["architectures"][0])
        model = kind.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, made.logits[name])
        before = transformers.AutoConfig.from_pretrained(made.original(name)).to_dict()
        after = model.config.to_dict()
        differing = {key for key in before if before[key] != after.get(key)}
        assert differing <= {"_name_or_path", "dtype", "bos_token_id", "eos_token_id"}


def assert_same_tensors(original: Path, exported: Path) -> None:
    one, other = tensors_of(original), tensors_of(exported)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name
