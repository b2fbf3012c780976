"""Import and export in Hugging Face's format, and their errors, without transformers."""

import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bridge.gpt.conversion.hf_config import config_json, read_model_config
from bridge.gpt.conversion.hf_export import export_hf
from bridge.gpt.conversion.hf_import import import_hf, read_weights
from bridge.gpt.conversion.safetensors_files import TensorFolder, write_tensors
from bridge.gpt.conversion.tokenizer_files import copy_tokenizer
from bridge.gpt.data.dataset_config import GPTDatasetConfig
from bridge.training.checkpoint_weights import saved_config, write_weights
from bridge.training.config import ConfigContainer, TokenizerConfig, resolve
from bridge.training.contracts import ExportRequest
from bridge.training.ranks.groups import one_process
from bridge.training.run_files.directory import find_checkpoint
from bridge.training.run_files.output_folder import new_folder
from bridge.training.usage_error import UsageError
from commands import run
from gpt_models import run_of, tiny_gpt
from hf_models import VOCABULARY, config_of, read_config, tensors_of, write_folder
from ranks import run_ranks
from small_disks import small_disk
from training_runs import OwnModel


def change(**changed: Any) -> Callable[[Path], None]:
    """Return a function that replaces tensors of a folder's file; None removes one."""

    def apply(folder: Path) -> None:
        tensors = tensors_of(folder) | changed
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_a_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")


def index_of_absent_files(folder: Path) -> None:
    index = {"weight_map": dict.fromkeys(tensors_of(folder), "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(**{NORM: None}), f"the files have no {NORM}, which config.json asks for"),
        (change(**{"model.layers.2.x": torch.ones(1)}), "have model.layers.2.x, for which"),
        (change(**{NORM: torch.ones(31)}), rf"{NORM} has the shape \[31\]; .*is \[32\]"),
        (truncate, "model.safetensors: is damaged"),
        (only_a_pointer, "model.safetensors: is Git LFS's pointer to a file, not safetensors"),
        (index_of_absent_files, "model-00001-of-00002.safetensors: is not there"),
        (only_pickles, "has neither model.safetensors nor .*; only weights in safetensors"),
    ],
    ids=["missing", "surplus", "shape", "truncated", "pointer", "absent", "pickles"],
)
def test_files_of_another_model_are_rejected_and_leave_nothing(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = write_folder(tmp_path / "model")
    damage(folder)

    def body() -> None:
        with pytest.raises(ValueError, match=message):
            import_hf(folder, tmp_path / "checkpoint")

    run_ranks(1, body, process_group=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tied_weights_that_differ_are_rejected_and_equal_ones_are_read_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", tie_word_embeddings=True)
    model = read_model_config(folder)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from .*embed_tokens"):
        read_weights(folder, model)
    tensors = tensors_of(folder)
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change(**{"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, **buffers)(folder)
    weights = read_weights(folder, model)
    assert "output_layer.weight" not in weights
    assert weights.keys() == model.exported_weights().keys()


def test_tensors_are_split_over_files_of_a_maximal_size(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((number,), 1.0) for number in (4, 2, 9, 1, 1)}
    size, files = write_tensors(tmp_path, tensors.items(), max_shard_size=24)
    assert (size, files) == (4 * 16, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    with TensorFolder(tmp_path) as folder:
        assert folder.names() == set(tensors)
        assert all(torch.equal(folder.read(name), tensor) for name, tensor in tensors.items())


def bridge(*arguments: str | Path) -> int:
    """Run the command in a fork, because a process with gloo must not be forked later."""
    with tempfile.TemporaryDirectory() as folder:
        ended = run(*map(str, arguments), folder=Path(folder))
    sys.stdout.write(ended.out)
    sys.stderr.write(ended.err)
    return ended.code


def test_import_and_export_commands_return_the_same_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "model", eos_token_id=[7, 8], max_position_embeddings=99999)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text("{}")
    checkpoint, back = tmp_path / "a" / "checkpoint", tmp_path / "back"
    assert bridge("import-hf", folder, "--output", checkpoint) == 0
    assert re.search(r"checkpoint: [\d,]+ parameters in float32", capsys.readouterr().out)
    assert find_checkpoint(checkpoint, "--from") == checkpoint
    config = saved_config(checkpoint)
    assert config.model == read_model_config(folder)
    assert config.tokenizer is not None
    assert config.tokenizer.model == str(folder)

    to_hf = ("export", checkpoint, "--to", "hf", "--output")
    assert bridge(*to_hf, back) == 0
    assert "in 1 file, float32, with tokenizer.json, " in capsys.readouterr().out
    assert (back / "tokenizer_config.json").read_text() == "{}"
    written = json.loads((back / "config.json").read_text())
    assert (written["eos_token_id"], written["max_position_embeddings"]) == ([7, 8], 99999)
    one, other = tensors_of(folder), tensors_of(back)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    assert bridge(*to_hf, tmp_path / "small", "--dtype", "bf16", "--max-shard-size", "12KB") == 0
    assert tensors_of(tmp_path / "small")["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "small" / "config.json").read_text())["torch_dtype"] == "bfloat16"

    folder.rename(tmp_path / "moved")
    capsys.readouterr()
    assert bridge(*to_hf, tmp_path / "bare") == 0
    assert f"without a tokenizer ({folder} is not there any more)" in capsys.readouterr().out
    (tmp_path / "moved").rename(folder)
    assert bridge("import-hf", folder, "--output", tmp_path / "bf16", "--dtype", "bf16") == 0
    assert "parameters in bfloat16" in capsys.readouterr().out
    for arguments, message in (
        (("import-hf", folder, "--output", checkpoint), "is not overwritten"),
        ((*to_hf, back), "is not overwritten"),
        (("export", folder, "--to", "hf", "--output", tmp_path / "x"), "bridge import-hf"),
        ((*to_hf, tmp_path / "x", "--max-shard-size", "5"), "is no size"),
    ):
        assert bridge(*arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_of_another_model_is_not_exported(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    config = ConfigContainer(model=read_model_config(folder), dataset=GPTDatasetConfig())
    weights = read_weights(folder, read_model_config(folder), torch.bfloat16)
    norm = "decoder.final_layernorm.weight"
    for changes, message in (
        ({norm: None}, f"has no {norm}, which the model of its config.yaml has"),
        ({norm: torch.ones(31)}, rf"{norm} has the shape \[31\]; by its config.yaml it is \[32\]"),
    ):
        kept = {name: weight for name, weight in (weights | changes).items() if weight is not None}
        checkpoint = tmp_path / f"checkpoint {len(kept)}"

        def body(checkpoint: Path, kept: dict[str, torch.Tensor], message: str) -> None:
            with new_folder(checkpoint, "--output") as place, one_process():
                write_weights(place, kept, config)
            with pytest.raises(ValueError, match=message):
                export_hf(request(checkpoint, config, tmp_path))

        run_ranks(1, body, checkpoint, kept, message, process_group=False)
    another = ConfigContainer(model=OwnModel(), dataset=GPTDatasetConfig())
    with pytest.raises(ValueError, match="--to hf: .* holds a OwnModel; only GPT models"):
        export_hf(request(tmp_path, another, tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_padding_of_the_vocabulary_is_not_exported(
    tmp_path: Path,
) -> None:
    config = run_of(tiny_gpt(vocab_size=None), tokenizer=TokenizerConfig(type="bytes"))
    config = resolve(config, device="cpu", world_size=1)
    model: Any = config.model
    assert (model.vocab_size, model.padded_vocab_size) == (257, 264)
    shapes = {name: weight.shape for name, weight in model.exported_weights().items()}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        shapes[name] = (264, 32)
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    (tmp_path / "hf").mkdir()

    def body() -> str:
        with new_folder(tmp_path / "checkpoint", "--output") as place, one_process():
            write_weights(place, weights, config)
        saved = saved_config(tmp_path / "checkpoint")
        return export_hf(request(tmp_path / "checkpoint", saved, tmp_path / "hf"))

    (line,) = run_ranks(1, body, process_group=False)
    assert "without a tokenizer" in line
    assert read_model_config(tmp_path / "hf").vocab_size == 257
    head = tensors_of(tmp_path / "hf")["lm_head.weight"]
    assert torch.equal(head, weights["output_layer.weight"][:257])


def request(checkpoint: Path, config: ConfigContainer, output: Path) -> ExportRequest:
    return ExportRequest(
        checkpoint=checkpoint, config=config, output=output, dtype=None, max_shard_size=10**9
    )


def test_changes_since_the_import_are_exported_in_config_json(tmp_path: Path) -> None:
    words: dict[str, Any] = {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "float16"}
    model = read_config(tmp_path, **words)
    source = config_of(**words)
    changed = replace(model, rotary_base=500000, seq_length=128, layernorm_epsilon=1e-5)
    assert config_json(changed, torch.bfloat16, {}) == source | {
        "rope_theta": 500000.0,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    newer = read_config(tmp_path, rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    written = config_json(replace(newer, rotary_base=500000), torch.float32, {})
    assert "rope_parameters" not in written
    assert written["rope_theta"] == 500000.0


def test_a_config_of_another_model_next_to_the_tokenizer_is_ignored(tmp_path: Path) -> None:
    model = replace(read_config(tmp_path), hf_files=None)
    known = config_of(eos_token_id=5)
    assert config_json(model, torch.float32, known)["eos_token_id"] == 5
    another = known | {"hidden_size": 64}
    assert config_json(model, torch.float32, another)["eos_token_id"] is None
    assert copy_tokenizer(tmp_path, tmp_path) == []
    assert model.vocab_size == VOCABULARY


@pytest.mark.parametrize("how", ["tensors", "bytes"])
def test_an_output_on_a_full_disk_is_reported_in_one_line_and_removed(
    tmp_path: Path, how: str
) -> None:
    with small_disk(tmp_path / "small", 64) as disk:
        output = disk / "out"
        cause = r"--output: .*/out' cannot be written \(.*No space left.*\); make room, or give"

        def write() -> None:
            with new_folder(output, "--output") as folder:
                if how == "tensors":
                    write_tensors(folder, [("w", torch.zeros(1 << 16))], max_shard_size=1 << 20)
                else:
                    (folder / "file").write_bytes(bytes(1 << 18))

        with pytest.raises(UsageError, match=cause):
            write()
        assert not list(disk.iterdir())


def test_an_error_of_reading_is_not_reported_as_one_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out", "--output"):
        (tmp_path / "source").read_bytes()
    assert not list(tmp_path.iterdir())
