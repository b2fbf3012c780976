import os
from pathlib import Path

import pytest

import installed_packages
import own_recipe
from bridge.cli import main


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a package of recipes installed and no launcher around."""
    return own_recipe.work_folder(tmp_path, monkeypatch)


def bridge(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("", "required: COMMAND"),
        ("train sine", "invalid choice: 'train'"),
        ("pretrain", "required: RECIPE"),
        ("pretrain sine --rundir R", "unrecognized arguments: --rundir"),
        ("pretrain sine --nproc two", "invalid int value: 'two'"),
        ("pretrain sin", "no 'sin'; did you mean 'sine'?"),
        ("pretrain zebra", "there are failing,"),
        ("pretrain sine --resume", "--resume: say which run to continue with --run-dir"),
        ("pretrain sine --resume --run-dir nowhere", "'nowhere' holds no run"),
        ("pretrain sine --nproc 0", "--nproc: 0 ranks cannot train; give 1 or more"),
        ("show sine --nproc -1", "--nproc: -1 ranks cannot train; give 1 or more"),
        ("pretrain sine --config nowhere.yaml", "--config: cannot read 'nowhere.yaml'"),
        ("pretrain sine train.train_iters", "train.train_iters"),
        ("pretrain sine --run-dir occupied", "'occupied' holds a run already"),
        ("pretrain sine train.global_batch_size=5", "global_batch_size"),
        ("recipes train.train_iters=5", "unrecognized arguments: train.train_iters=5"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(
    arguments: str, complaint: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "occupied").mkdir()
    (work / "occupied" / "precious.txt").write_text("a run")
    assert bridge(*arguments.split()) == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert said.out == ""
    assert [path.name for path in work.rglob("*")] == ["occupied", "precious.txt"]


def test_a_configuration_file_that_is_no_mapping_is_rejected(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "bad.yaml").write_bytes(b"\x1f\x8b\x08")
    assert bridge("pretrain", "sine", "--config", "bad.yaml") == 2
    assert capsys.readouterr().err.startswith("bridge: --config='bad.yaml': is a gzip file; give")
    for text in ("- a\n- list\n", "just words", "train: 5", "train: {train_iters: [}"):
        (work / "bad.yaml").write_text(text)
        assert bridge("pretrain", "sine", "--config", "bad.yaml", "--dry-run") == 2
        assert capsys.readouterr().err.startswith("bridge: ")


def test_all_mistakes_of_files_and_overrides_come_in_one_report(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "mine.yaml").write_text("train: {global_bach_size: 8}\n")
    wrong = ("trian.train_iters=5", "optimizer.learning_rate=1", "train.train_iters=many")
    assert bridge("pretrain", "sine", *wrong, "--config", "mine.yaml", "model.width=3") == 2
    report = capsys.readouterr().err
    for part in ("global_bach_size", "global_batch_size", "trian", "learning_rate", "many"):
        assert part in report
    assert report.count("bridge: ") == 1


def test_under_a_launcher_nproc_is_rejected_and_the_world_size_is_that_of_the_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bridge("pretrain", "sine", "--dry-run", "--nproc", "2") == 2
    assert "leave --nproc out under torchrun" in capsys.readouterr().err
    assert bridge("pretrain", "sine", "--dry-run") == 0
    assert capsys.readouterr().out == "dry run: sine is ready for 2 ranks\n"
    monkeypatch.delenv("WORLD_SIZE")
    assert bridge("pretrain", "sine") == 2
    missing = "bridge: RANK=0: WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be set too; "
    assert capsys.readouterr().err.startswith(missing)


def test_a_task_of_slurm_is_a_rank_of_all_of_them(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert bridge("pretrain", "sine", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "dry run: sine is ready for 2 ranks"
    assert bridge("pretrain", "sine") == 2
    assert "SLURM_STEP_NODELIST: nothing says where" in capsys.readouterr().err
    assert list(work.iterdir()) == []


def test_a_dry_run_checks_any_number_of_ranks_and_leaves_nothing(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bridge("pretrain", "sine", "--dry-run", "--nproc", "2", "--run-dir", "R") == 0
    assert bridge("pretrain", "sine", "--dry-run", "--nproc", "32") == 2
    assert "global_batch_size" in capsys.readouterr().err
    assert list(work.iterdir()) == []


def test_overrides_may_come_before_and_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert bridge("show", "sine", "model.width=3", "--nproc", "2", "dataset.size=8") == 0
    shown = capsys.readouterr().out
    assert "width: 3" in shown
    assert "size: 8" in shown


def test_the_shown_configuration_is_a_valid_file(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for full in ([], ["--full"]):
        assert bridge("show", "sine", "optimizer.lr=0.5", *full) == 0
        shown = capsys.readouterr().out
        (work / "fed.yaml").write_text(shown)
        assert bridge("show", "sine", "--config", "fed.yaml", *full) == 0
        assert capsys.readouterr().out == shown


def test_a_run_starts_with_the_configuration_of_another_and_not_in_its_directory(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bridge("show", "sine", "model.width=3", "checkpoint.run_dir=R") == 0
    (work / "R").mkdir()
    (work / "R" / "config.yaml").write_text(capsys.readouterr().out)
    again = ("pretrain", "sine", "--config", "R/config.yaml", "--dry-run")
    assert bridge(*again, "--nproc", "2") == 0
    note, ready = capsys.readouterr().out.splitlines()
    assert note == "--config R/config.yaml: taken without checkpoint.run_dir, of that run alone"
    assert ready == "dry run: sine is ready for 2 ranks"
    assert bridge("show", "sine", "--config", "R/config.yaml") == 0
    shown = capsys.readouterr().out
    assert "width: 3" in shown
    assert "run_dir: null" in shown
    assert bridge(*again, "--run-dir", "R") == 2
    assert "'R' holds a run already" in capsys.readouterr().err
    # This file was written by a user: every value in it is meant.
    (work / "own.yaml").write_text("checkpoint: {run_dir: R}")
    assert bridge("pretrain", "sine", "--config", "own.yaml", "--dry-run") == 2
    assert "'R' holds a run already" in capsys.readouterr().err


def test_files_are_merged_in_their_order_and_overrides_come_last(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "one.yaml").write_text("model: {width: 3}\ndataset: {size: 10}\n")
    (work / "two.yaml").write_text("dataset: {size: 20}\nrng: {seed: 5}\n")
    files = ("--config", "one.yaml", "--config", "two.yaml")
    assert bridge("show", "sine", "rng.seed=7", *files) == 0
    shown = capsys.readouterr().out
    for line in ("width: 3", "size: 20", "seed: 7"):
        assert line in shown


def test_recipes_are_listed_with_their_summaries(capsys: pytest.CaptureFixture[str]) -> None:
    assert bridge("recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split(maxsplit=1) == ["sine", "learns a sine"] for line in lines)


def test_an_offer_that_cannot_be_imported_is_named_and_stops_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torn.py").write_text("import no_such_module")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)")
    offers = (
        "[bridge.recipes]\nabsent = torn:recipe\nuntyped = builtins:int\n"
        "[bridge.commands]\nleave = leaves:register\npretrain = builtins:int\n"
        "[bridge.exporters]\ntorn = torn:export\n[bridge.peft]\ntorn = torn:Method\n"
    )
    installed_packages.install(tmp_path, "broken-package", offers, monkeypatch)
    assert bridge("recipes") == 0
    said = capsys.readouterr()
    assert any(line.split(maxsplit=1) == ["sine", "learns a sine"] for line in said.out.split("\n"))
    for name, reason in (
        ("absent = torn:recipe (bridge.recipes)", "ModuleNotFoundError: No module named"),
        ("untyped = builtins:int (bridge.recipes)", "AttributeError: type object 'int'"),
        ("leave = leaves:register (bridge.commands)", "SystemExit: 3"),
        ("pretrain = builtins:int (bridge.commands)", "TypeError: int()"),
    ):
        (line,) = (line for line in said.err.splitlines() if name in line)
        assert f"of broken-package cannot be used ({reason}" in line
    assert bridge("show", "sine") == 0
    with pytest.raises(ModuleNotFoundError) as error:
        bridge("show", "absent")
    assert "absent = torn:recipe (bridge.recipes) of broken-package" in error.value.__notes__[0]


def test_the_help_of_a_recipe_lists_its_keys_with_their_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bridge("pretrain", "sine", "--help") == 0
    text = capsys.readouterr().out
    for part in ("--run-dir", "model.width", "train.train_iters", "dataset.seconds_per_sample"):
        assert part in text
    assert bridge("pretrain", "--help") == 0
    assert "model.width" not in capsys.readouterr().out


def test_the_doctor_names_versions_devices_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert bridge("doctor") == 0
    text = capsys.readouterr().out
    for part in ("python", "torch", "megatron-core", "bridge-loop", "device", "sine"):
        assert part in text


def test_the_cpu_emulation_hides_the_gpus_from_the_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert bridge("pretrain", "sine", "--dry-run", "dist.device=cpu") == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
