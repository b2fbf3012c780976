"""The command and a run on disk that is damaged, deleted, or has no room."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import own_recipe
from bridge.cli import main
from bridge.training.run_files.directory import RunDirectory
from bridge.training.usage_error import UsageError
from commands import Ended, run, start
from gpt_tiny_runs import contents
from small_disks import small_disk

ADVICE = "; take that of a checkpoint: cp R/checkpoints/step-0000006/config.yaml R/config.yaml"


@pytest.fixture(scope="module", autouse=True)
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a finished run of the recipe sine, with checkpoints of steps 2, 4 and 6."""
    with pytest.MonkeyPatch.context() as patch:
        folder = own_recipe.work_folder(tmp_path_factory.mktemp("saved"), patch)
        ended = run("pretrain", "sine", "checkpoint.keep_last=0", "--run-dir", "R", folder=folder)
        assert ended.code == 0, ended.err
        yield folder / "R"


@pytest.fixture
def work(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a copy of that run, R, to be damaged."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "R")
    return tmp_path


def resume(folder: Path, *more: str) -> Ended:
    return run("pretrain", "sine", "--run-dir", "R", "--resume", *more, folder=folder)


def change(keep: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(keep(path.read_bytes()))

    return damage


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (Path.unlink, "is missing"),
        (change(lambda text: b""), "is empty"),
        (change(lambda text: text[: text.index(b"\noptimizer:") + 1]), "is cut off (a whole one"),
        (change(lambda text: text.removesuffix(b"\n...\n")), "is cut off (a whole one"),
        (change(lambda text: b"a: [" + text), "is not valid YAML"),
        (change(lambda text: bytes(len(text))), "is not valid YAML"),
        (change(lambda text: b"\xff" * 9), "is no text"),
    ],
)
def test_a_damaged_configuration_is_not_replaced_by_the_recipes_defaults(
    work: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], cause: str
) -> None:
    command = ["pretrain", "sine", "--run-dir", "R", "--resume", "--dry-run"]
    damage(work / "R" / "config.yaml")
    assert main(command) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"bridge: R/config.yaml: {cause}")
    assert text.endswith(f"{ADVICE}\n")
    assert text.count("\n") == 1
    shutil.copy("R/checkpoints/step-0000006/config.yaml", "R/config.yaml")
    assert main(command) == 0


def test_the_advice_for_a_damaged_configuration_works(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "it's a run")
    run.checkpoint(3).mkdir(parents=True)
    (run.checkpoint(3) / "config.yaml").write_text("checkpoint: {}\n...\n")
    for what in ("missing", "a directory"):
        if what == "a directory":
            run.config.unlink()
            run.config.mkdir()
        with pytest.raises(UsageError) as error:
            run.saved_config()
        advice = str(error.value).rpartition("; ")[2]
        if what == "a directory":
            assert advice.startswith("take that of a checkpoint, once what is there is moved away")
            run.config.rmdir()
        subprocess.run(advice.rpartition(": ")[2], shell=True, check=True)
        assert run.saved_config() == "checkpoint: {}\n...\n"


def test_a_run_without_latest_is_not_started_again(work: Path) -> None:
    (work / "R" / "checkpoints" / "latest").unlink()
    before = contents(work / "R")
    ended = resume(work)
    assert ended.code == 2
    assert ended.err == (
        "bridge: R/checkpoints/latest: is missing; there are checkpoints of the steps 2, 4, 6: "
        "continue from one with --resume --step 6 (checkpoint.step=6)\n"
    )
    assert contents(work / "R") == before
    (work / "R" / "checkpoints" / "step-0000006" / "metadata.json").write_text("")
    ended = resume(work, "--step", "6")
    assert ended.code == 2
    assert ended.err.startswith("bridge: R/checkpoints/step-0000006/metadata.json: has 0 bytes of")
    assert ended.err.endswith("continue from it with --resume --step 4 (checkpoint.step=4)\n")
    chosen = resume(work, "--step", "4")
    assert chosen.code == 0, chosen.err
    assert "continues after step 4, from R/checkpoints/step-0000004" in chosen.out
    assert [row["step"] for row in RunDirectory(work / "R").records()] == [1, 2, 3, 4, 5, 6]


def test_no_run_starts_from_a_checkpoint_with_a_flipped_bit(work: Path) -> None:
    file = work / "R" / "checkpoints" / "step-0000006" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    ended = run("finetune", "sine", "--from", "R", "--run-dir", "T", folder=work)
    assert ended.code == 2
    assert ended.err.startswith(f"bridge: {file}: has other content than was written")
    assert f"the newest older complete checkpoint is {file.parent.parent}/step-0000004" in ended.err
    assert not (work / "T").exists()


@pytest.mark.parametrize("kind", ["cut", "gone", "damaged"])
def test_missing_records_are_reported(work: Path, kind: str) -> None:
    path = work / "R" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    else:
        path.write_bytes(b"".join([*lines[:3], b"\0" * 9 + b"\n", *lines[3:]]))
    ended = resume(work, "train.train_iters=7")
    if kind == "damaged":
        assert ended.code == 2
        assert "R/metrics.jsonl, line 4 is not a record of metrics" in ended.err
        return
    assert ended.code == 0, ended.err
    text = "was cut off" if kind == "cut" else "is gone"
    last = 3 if kind == "cut" else 0
    assert f"warning: R/metrics.jsonl {text}: records between step {last} and step 6" in ended.out
    assert ("to write them again, --resume --step 2" in ended.out) == (kind == "cut")


def test_a_run_directory_that_is_deleted_during_the_run_is_an_error(
    tmp_path: Path,
) -> None:
    slow = ("dataset.seconds_per_sample=0.03", "train.train_iters=30", "--run-dir", "R")
    for interval, text in ((1, "metrics.jsonl"), (100, "R was deleted or moved while")):
        folder = tmp_path / str(interval)
        more = (f"logger.log_interval={interval}", "checkpoint.save_at_end=false")
        command = start("pretrain", "sine", *slow, *more, folder=folder)
        command.wait_for(folder / "stdout", 12)
        shutil.rmtree(folder / "R", ignore_errors=True)
        ended = command.wait()
        assert ended.code == 1, ended.out
        assert text in ended.err
        assert "finished" not in ended.out


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_in_a_save_is_reported_with_rank_path_and_newest_checkpoint(
    tmp_path: Path, ranks: int
) -> None:
    with small_disk(tmp_path / "disk", 2500) as disk:
        wide = ("model.width=20000", "checkpoint.keep_last=0", "--nproc", str(ranks))
        folder = tmp_path / "work"
        ended = run("pretrain", "sine", *wide, "--run-dir", "../disk/R", folder=folder)
        assert ended.code == 1, ended.err
        line = next(line for line in ended.err.splitlines() if "cannot write" in line)
        assert "in checkpoint at step 6: SaveError: rank " in line
        assert "cannot write ../disk/R/checkpoints/step-0000006.partial/__" in line
        assert ": No space left on device; the newest complete checkpoint is " in line
        assert line.endswith("../disk/R/checkpoints/step-0000004; continue from it with --resume")
        assert "Segmentation" not in ended.err
        assert len(ended.err.splitlines()) < 40 * ranks
        left = sorted(path.name for path in (disk / "R" / "checkpoints").iterdir())
        assert left == ["latest", "step-0000002", "step-0000004"]


@pytest.mark.parametrize(
    ("kilobytes", "cause"),
    [(4, "No space left on device"), (8, "No space left on device"), (9, "Read-only file system")],
)
def test_a_disk_that_cannot_be_written_at_the_start_is_reported_in_one_line(
    tmp_path: Path, kilobytes: int, cause: str
) -> None:
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        if kilobytes == 4:
            (disk / "file").write_bytes(b"x" * 4096)
        if kilobytes == 9:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        folder = tmp_path / "work"
        ended = run("pretrain", "sine", "--run-dir", "../disk/R", folder=folder)
        assert ended.code == 2, ended.err
        assert ended.err.startswith("bridge: checkpoint.run_dir")
        assert cause in ended.err
        assert ended.err.count("\n") == 1
        assert not (disk / "R").exists()


def test_a_run_on_a_disk_that_cannot_be_written_is_left_as_it_is(
    tmp_path: Path, saved: Path
) -> None:
    size = sum(path.stat().st_size // 4096 + 1 for path in saved.rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", size * 4) as disk:
        shutil.copytree(saved, disk / "R")
        with (disk / "file").open("wb") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), b"x" * 4096)
        before = contents(disk / "R")
        command = ("pretrain", "sine", "--run-dir", "../disk/R", "--resume")
        ended = run(*command, "train.train_iters=8", folder=tmp_path / "work")
        assert ended.code == 2, ended.err
        assert "No space left on device" in ended.err
        assert contents(disk / "R") == before
