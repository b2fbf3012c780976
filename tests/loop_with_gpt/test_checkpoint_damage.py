"""Damage of a checkpoint's files is found before anything of it is used."""

import gc
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from bridge.training.checkpoint import manifest as checkpoint_manifest
from bridge.training.checkpoint import megatron_io
from bridge.training.checkpoint.manifest import Manifest, write_manifest
from bridge.training.checkpoint.resume_rules import reject_another_base
from bridge.training.checkpoint.verification import reject_damaged, verified
from bridge.training.checkpoint_weights import SavedWeights
from bridge.training.pretrain import pretrain
from bridge.training.ranks.groups import one_process
from bridge.training.run_files.directory import RunDirectory
from bridge.training.usage_error import UsageError
from ranks import run_ranks
from training_runs import own_run, token_step

RANKS = 2


def run_config(directory: Path, **checkpoint: Any) -> Any:
    config = own_run(directory)
    config.train.train_iters = 6 if checkpoint else 4
    for name, value in ({"save_interval": 2} | checkpoint).items():
        setattr(config.checkpoint, name, value)
    return config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two ranks with checkpoints after steps 2 and 4."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(RANKS, lambda: pretrain(run_config(run), token_step) and None, timeout=120)
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> RunDirectory:
    """Return a copy of the run, to be damaged."""
    return RunDirectory(Path(shutil.copytree(saved, tmp_path / "run")))


def changed(change: Callable[[bytearray], None], name: str) -> Callable[[RunDirectory], str]:
    def damage(run: RunDirectory) -> str:
        path = run.checkpoint(4) / name
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)
        return name

    return damage


def optimizer_state_zeroed(run: RunDirectory) -> str:
    """Zero a moment of the optimizer; the checkpoint can still be read completely."""
    place = run.checkpoint(4)
    stored = FileSystemReader(place).read_metadata().storage_data
    [entry] = [
        info
        for index, info in stored.items()
        if "exp_avg_sq" in index.fqn and "inner.weight" in index.fqn
    ]
    path = place / entry.relative_path
    content = bytearray(path.read_bytes())
    item = content[entry.offset : entry.offset + entry.length]
    moment = torch.load(io.BytesIO(item)).numpy().tobytes()
    start = entry.offset + item.index(moment)
    content[start : start + len(moment)] = bytes(len(moment))
    path.write_bytes(content)
    return str(path.name)


def flipped(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def cut(content: bytearray) -> None:
    del content[len(content) // 2 :]


def removed(name: str) -> Callable[[RunDirectory], str]:
    def damage(run: RunDirectory) -> str:
        (run.checkpoint(4) / name).unlink()
        return name

    return damage


def of_another_step(name: str) -> Callable[[RunDirectory], str]:
    def damage(run: RunDirectory) -> str:
        shutil.copy(run.checkpoint(2) / name, run.checkpoint(4) / name)
        return name

    return damage


def added(run: RunDirectory) -> str:
    shutil.copy(run.checkpoint(4) / "__0_0.distcp", run.checkpoint(4) / "__7_0.distcp")
    return "__7_0.distcp"


def whole_of_another_step(run: RunDirectory) -> str:
    shutil.rmtree(run.checkpoint(4))
    shutil.copytree(run.checkpoint(2), run.checkpoint(4))
    return "manifest.json"


# Damage that is found without reading tensors, and damage that is not.
AT_ONCE: dict[str, Callable[[RunDirectory], str]] = {
    "a file is missing": removed("__1_0.distcp"),
    "a file was added": added,
    "a file is cut": changed(cut, "__0_0.distcp"),
    ".metadata is missing": removed(".metadata"),
    ".metadata is of another step": of_another_step(".metadata"),
    "metadata.json is empty": changed(bytearray.clear, "metadata.json"),
    "the counters are changed": changed(flipped, "run_state.json"),
    "config.yaml is cut": changed(cut, "config.yaml"),
    "config.yaml is missing": removed("config.yaml"),
    "the manifest is missing": removed("manifest.json"),
    "the manifest is empty": changed(bytearray.clear, "manifest.json"),
    "the manifest is changed": changed(flipped, "manifest.json"),
    "it is the checkpoint of another step": whole_of_another_step,
}
BY_READING: dict[str, Callable[[RunDirectory], str]] = {
    "optimizer state is zero": optimizer_state_zeroed,
    "a bit is flipped": changed(flipped, "__0_0.distcp"),
    "a file is of another step": of_another_step("__0_0.distcp"),
}
REMEDY = "continue from it with --resume --step 2 (checkpoint.step=2)"


def is_reported(run: RunDirectory, name: str, message: str) -> bool:
    """Whether a message names file, cause and the older checkpoint, in one line."""
    first = f"{run.checkpoint(4) / name}: "
    return (
        message.startswith(first)
        and ", so the checkpoint is damaged; " in message
        and message.endswith(
            f"the newest older complete checkpoint is {run.checkpoint(2)}: give that, or {REMEDY}"
        )
        and "\n" not in message
    )


@pytest.mark.parametrize("kind", AT_ONCE)
def test_damage_is_reported_by_file_and_cause_with_the_older_checkpoint(
    run: RunDirectory, kind: str
) -> None:
    reject_damaged(run.checkpoint(4))
    name = AT_ONCE[kind](run)
    with pytest.raises(UsageError) as error:
        reject_damaged(run.checkpoint(4))
    assert is_reported(run, name, str(error.value)), str(error.value)


@pytest.mark.parametrize("kind", BY_READING)
def test_changed_bytes_are_found_on_every_rank_before_a_step_is_taken(
    run: RunDirectory, kind: str
) -> None:
    rows = run.metrics.read_bytes()
    name = BY_READING[kind](run)
    reject_damaged(run.checkpoint(4))

    def body() -> list[str]:
        found = []
        for how in ("resume", "pretrained_checkpoint"):
            config = run_config(run.path, resume=True)
            if how != "resume":
                config = run_config(run.path.parent / "new", pretrained_checkpoint=str(run.path))
            with pytest.raises(UsageError) as error:
                pretrain(config, token_step)
            found.append(str(error.value))
        return found

    for messages in run_ranks(RANKS, body, timeout=120):
        assert all(is_reported(run, name, message) for message in messages), messages
    assert run.metrics.read_bytes() == rows


def test_a_run_continues_from_the_step_that_is_asked_for_and_later_from_there(
    run: RunDirectory, saved: Path
) -> None:
    optimizer_state_zeroed(run)

    def body() -> None:
        steps: list[int] = []

        class Listen:
            def on_train_start(self, context: Any) -> None:
                steps.append(context.state.train_state.step)

        config = run_config(run.path, resume=True, step=2, save_interval=None, save_at_end=False)
        config.train.train_iters = 4
        pretrain(config, token_step, [Listen()])
        assert run.latest() == run.checkpoint(2)
        config = run_config(run.path, resume=True, save_interval=3, keep_last=2)
        pretrain(config, token_step, [Listen()])
        assert steps == [2, 2]

    run_ranks(RANKS, body, timeout=120)
    assert run.latest() == run.checkpoint(6)
    # The damaged checkpoint of the abandoned steps does not count among the last two.
    assert run.saved() == [run.checkpoint(step) for step in (3, 4, 6)]
    losses = [row["error"] for row in RunDirectory(saved).records()]
    assert [row["error"] for row in run.records()][:2] == losses[:2]
    assert [row["step"] for row in run.records()] == [1, 2, 3, 4, 5, 6]


def test_what_is_read_outside_of_a_run_is_verified_too(run: RunDirectory) -> None:
    name = BY_READING["a file is of another step"](run)

    def read() -> None:
        with verified(run.checkpoint(4)), one_process():
            SavedWeights(run.checkpoint(4)).read("module.inner.weight")

    def body() -> str:
        with pytest.raises(UsageError) as error:
            read()
        return str(error.value)

    [message] = run_ranks(1, body, process_group=False)
    assert is_reported(run, name, message), message


def test_a_block_of_a_large_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_manifest, "_BLOCK", 1 << 20)
    (tmp_path / "__0_0.distcp").write_bytes(bytes(range(256)) * 4096 * 3 + b"tail")
    (tmp_path / ".metadata").write_bytes(b"index")
    write_manifest(tmp_path)
    manifest = Manifest.read(tmp_path)
    assert manifest is not None
    assert [len(manifest.files[name].crc32) for name in (".metadata", "__0_0.distcp")] == [1, 4]
    with verified(tmp_path):
        pass
    with (tmp_path / "__0_0.distcp").open("r+b") as file:
        file.seek((2 << 20) + 5)
        file.write(b"x")
    with pytest.raises(UsageError, match=r"__0_0.distcp: has other content .*2,097,152 to 3,145,"):
        with verified(tmp_path):
            pass


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"files": {"../x": {"size": 1, "crc32": [1]}}}, "'../x' is not a file of the checkpoint"),
        ({"files": {"/dev/zero": {"size": 0, "crc32": [1]}}}, "'/dev/zero' is not a file"),
        ({"files": {"a": {"size": "1", "crc32": [1]}}}, "the record of 'a' has no size"),
        ({"files": {"a": {"size": 9, "crc32": []}}}, "the record of 'a' has no size"),
        ({"files": {}}, "it lacks .metadata"),
        ({"files": []}, "is no complete manifest"),
        ({"saved_at": "now"}, "is no complete manifest"),
        ({"step": "8"}, "'8' is no number"),
    ],
)
def test_a_manifest_from_somebody_else_is_rejected_for_what_it_says(
    tmp_path: Path, change: dict[str, Any], cause: str
) -> None:
    (tmp_path / ".metadata").write_bytes(b"index")
    write_manifest(tmp_path, step=8)
    saved = json.loads((tmp_path / "manifest.json").read_bytes()) | change
    del saved["crc32"]
    saved["crc32"] = zlib.crc32(json.dumps(saved, sort_keys=True).encode())
    (tmp_path / "manifest.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match=f"manifest.json: .*{cause}"):
        reject_damaged(tmp_path)


def test_a_format_version_that_has_manifests_does_without_none(run: RunDirectory) -> None:
    place = run.checkpoint(4)
    os.remove(place / "manifest.json")
    (place / "config.yaml").write_text("")

    def body() -> str:
        with one_process(), pytest.raises(UsageError) as error:
            reject_another_base(place, None)
        return str(error.value)

    [message] = run_ranks(1, body, process_group=False)
    assert is_reported(run, "manifest.json", message), message


def test_a_checkpoint_of_an_older_version_is_read_and_reported_as_unverified(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    place = run.checkpoint(4)
    os.remove(place / "manifest.json")
    text = (place / "config.yaml").read_text()
    (place / "config.yaml").write_text(text.removesuffix("...\n"))
    reject_damaged(place)
    assert f"{place}: has no manifest.json, as an older version wrote it" in caplog.text
    (place / "metadata.json").write_text("")

    def body() -> None:
        with (
            one_process(),
            pytest.raises(UsageError, match=r"metadata.json: is no JSON \(.*damaged"),
        ):
            SavedWeights(place)

    run_ranks(1, body, process_group=False)


def test_a_write_that_fails_does_not_crash_the_process_later(tmp_path: Path) -> None:
    def body() -> str:
        item = WriteItem(index=MetadataIndex("rng"), type=WriteItemType.BYTE_IO)
        with megatron_io._writing_in_this_process([]), open("/dev/full", "wb") as stream:
            arguments = (_StorageWriterTransforms(), stream, io.BytesIO(bytes(1 << 20)), item, "")
            try:
                filesystem_async._write_item(*arguments, SerializationFormat.TORCH_SAVE)
            except OSError as error:
                error.args = (*error.args, error)  # A cycle, as loggers and queues make them.
                cause = str(error.strerror)
        gc.collect()
        return cause

    assert run_ranks(1, body) == ["No space left on device"]


def test_rows_and_directories_are_durable_before_latest_names_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "runs" / "run")

    def body() -> list[str]:
        synced: list[str] = []
        fsync, publish = os.fsync, RunDirectory.publish

        def noted(descriptor: int) -> None:
            fsync(descriptor)
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

        def ends(directory: RunDirectory, checkpoint: Path) -> None:
            synced.append("published")
            publish(directory, checkpoint)

        # In a rank, which ends with this function.
        monkeypatch.setattr(os, "fsync", noted)
        monkeypatch.setattr(RunDirectory, "publish", ends)
        pretrain(run_config(run.path), token_step)
        return synced[: synced.index("published")]

    [synced] = run_ranks(1, body, timeout=120)
    partial = run.checkpoint(2).with_name(f"{run.checkpoint(2).name}.partial")
    files = [path.name for path in run.checkpoint(2).iterdir()]
    assert "__0_0.distcp" in files
    parents = [run.metrics, run.checkpoints, run.path, run.path.parent, run.path.parent.parent]
    wanted = [*parents, partial, *(partial / name for name in files)]
    assert {str(path) for path in wanted} <= set(synced)
