"""Reading and writing weights of a checkpoint outside of a run, and runs that start from them."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import pytest
import torch

from bridge.training.checkpoint.safe_loading import RejectedType
from bridge.training.checkpoint_weights import SavedWeights, saved_config, write_weights
from bridge.training.config import CheckpointConfig
from bridge.training.config.model_identity import model_field
from bridge.training.pretrain import pretrain
from bridge.training.ranks.groups import one_process
from bridge.training.run_files.directory import find_checkpoint
from bridge.training.run_files.output_folder import new_folder
from bridge.training.setup import training_parts
from bridge.training.usage_error import UsageError
from poisoned_checkpoints import POISON_TYPE, Poison
from ranks import run_ranks
from training_runs import OwnModel, OwnModule, own_run, parameters_of, token_step


def weights_of_layers() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"output.weight": (3, 2), "block.layers.0.a": (4, 2), "block.layers.1.a": (4, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_weights_are_read_as_they_were_written(tmp_path: Path) -> None:
    weights = weights_of_layers()
    weights["output.weight"] = weights["output.weight"].bfloat16()
    config = own_run(tmp_path / "run")

    def body() -> None:
        with new_folder(tmp_path / "made" / "checkpoint", "--output") as folder, one_process():
            write_weights(folder, weights, config)
        with one_process():
            saved = SavedWeights(tmp_path / "made" / "checkpoint")
            for name, weight in weights.items():
                assert saved.shape(name) == tuple(weight.shape)
                assert saved.dtype(name) == weight.dtype
                assert torch.equal(saved.read(name), weight)
            for absent in ("other", "block.layers.2.a", "block.layers.0.b"):
                assert saved.shape(absent) is None
        assert not torch.distributed.is_initialized()

        index = tmp_path / "made" / "checkpoint" / ".metadata"
        whole = index.read_bytes()
        for damaged, says in (
            (whole[:-9], r".metadata: .metadata cannot be read \(.*; the file is damaged"),
            (pickle.dumps([1]), "is no index of a checkpoint"),
            (whole.replace(b"__0_0.distcp", b"../../../run"), "which is not a file of the check"),
        ):
            index.write_bytes(damaged)
            with one_process(), pytest.raises(UsageError, match=says):
                SavedWeights(tmp_path / "made" / "checkpoint")
        index.write_bytes(whole)

    run_ranks(1, body, process_group=False)
    assert find_checkpoint(tmp_path / "made" / "checkpoint", "--from").name == "checkpoint"
    assert saved_config(tmp_path / "made" / "checkpoint").model == config.model


def test_one_process_is_not_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("WORLD_SIZE", "2"),
        ("RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="one process; start it without a launcher"):
        with one_process():
            pass


def test_a_folder_that_holds_no_checkpoint_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: it is no checkpoint"):
        SavedWeights(tmp_path)
    with pytest.raises(ValueError, match=".metadata: is missing, so the checkpoint is damaged"):
        saved_config(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="--from: .* Hugging Face's .* `bridge import-hf"):
        find_checkpoint(tmp_path, "--from")


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "folder", "--output") as folder:
            (folder / "half").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "folder", "--output") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "folder").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(ValueError, match=r"--output: .*folder' exists and is not overwritten"):
        with new_folder(tmp_path / "folder", "--output"):
            pass


class ModuleWithExtraState(OwnModule):
    """A module that pickles an extra state, as Transformer Engine's modules do."""

    extra: Any = "own"

    @override
    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(list(pickle.dumps(self.extra)), dtype=torch.uint8)

    @override
    def set_extra_state(self, state: torch.Tensor) -> None:
        self.extra = pickle.loads(state.numpy().tobytes())


@dataclass(kw_only=True)
class ModelWithExtraState(OwnModel):
    extra: str = model_field("training", default="own")
    """An absolute path replaces it by poison that creates that folder."""

    @override
    def build(self, *arguments: Any, **keywords: Any) -> torch.nn.Module:
        module = ModuleWithExtraState(self.width, self.dropout)
        path = Path(self.extra)
        module.extra = Poison(path) if path.is_absolute() else self.extra
        return module


def extra_of(chunk: Any) -> str:
    [module] = [part for part in chunk.modules() if isinstance(part, ModuleWithExtraState)]
    return str(module.extra)


def test_modules_keep_their_extra_states_where_a_checkpoint_has_none(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def body() -> list[str]:
        for name, model in (
            ("without", OwnModel()),
            ("with", ModelWithExtraState(extra="saved")),
            ("poisoned", ModelWithExtraState(extra=str(marker))),
        ):
            config = own_run(tmp_path / name, model=model)
            config.checkpoint.save_at_end = True
            config.train.train_iters = 1
            pretrain(config, token_step)
        found = []
        for name in ("without", "with"):
            config = own_run(tmp_path / "started", model=ModelWithExtraState())
            config.checkpoint = CheckpointConfig(pretrained_checkpoint=str(tmp_path / name))
            with training_parts(config, token_step) as parts, one_process():
                saved = SavedWeights(find_checkpoint(tmp_path / name, "--from"))
                parameters = parameters_of(parts.model)
                assert torch.equal(parameters["inner.weight"], saved.read("module.inner.weight"))
                found.append(extra_of(parts.model[0]))
        config.checkpoint.pretrained_checkpoint = str(tmp_path / "poisoned")
        with pytest.raises(RejectedType) as error, training_parts(config, token_step):
            pass
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
        found += [error.value.entry, *error.value.types]
        # Outside of a checkpoint anything may be unpickled.
        pickle.loads(pickle.dumps(Poison(marker)))
        return found

    assert run_ranks(1, body, process_group=False) == [
        ["own", "saved", "module._extra_state", POISON_TYPE]
    ]
    assert marker.exists()
