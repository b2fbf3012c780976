"""A checkpoint from somebody else runs no code, wherever the code is hidden in it."""

import contextlib
import io
import os
import shutil
from pathlib import Path

from bridge.cli import main
from gpt_data import write_story
from gpt_tiny_runs import SMALL
from poisoned_checkpoints import POISON_TYPE, poison
from ranks import run_ranks

TINY = (*SMALL, "model.num_layers=1", "train.train_iters=1", "checkpoint.save_at_end=true")
ADAPTERS = ("peft.method=lora", "--run-dir", "adapters")
ENTRIES = {
    "index": ".metadata",
    "common.pt": "common.pt",
    "common_state": "common_state/shard_0_1",
    "rng": "rng/shard_0_1",
    "_extra_state": "_extra_state/shard_0_1",
    "word_embeddings": "embedding.word_embeddings.weight",
}


def bridge(*arguments: str) -> tuple[int, str]:
    """Run a command in this process, for a tenth of the time; return its code and output."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        code = main(arguments)
    return code, written.getvalue()


def test_no_command_unpickles_what_a_checkpoint_should_not_hold(tmp_path: Path) -> None:
    def commands() -> None:
        os.chdir(tmp_path)
        text = f"dataset.path={write_story(tmp_path / 'story.txt', paragraphs=20)}"
        for made in (
            ("pretrain", "gpt-tiny", *TINY, text, "--run-dir", "whole"),
            ("finetune", "gpt-tiny", "--from", "whole", *TINY, text, *ADAPTERS),
        ):
            code, out = bridge(*made)
            assert code == 0, out
        new = ("finetune", "gpt-tiny", *TINY, text, "--run-dir", "new", "--from")
        attacks: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
            (
                "whole",
                ("pretrain", "gpt-tiny", "--resume", "--run-dir"),
                ("index", "common.pt", "rng"),
            ),
            ("whole", new, ("common_state", "_extra_state")),
            ("whole", ("export", "--to", "hf", "--output", "out"), ("index", "word_embeddings")),
            ("adapters", ("export", "--to", "hf-peft", "--output", "out"), ("common.pt",)),
            ("adapters", ("merge", "--output", "out"), ("common_state",)),
            ("whole", ("merge", "adapters", "--output", "out", "--base"), ("index",)),
        ]
        for run, arguments, places in attacks:
            for where in places:
                shutil.rmtree("poisoned", ignore_errors=True)
                shutil.copytree(run, "poisoned")
                checkpoint = Path("poisoned/checkpoints/step-0000001")
                poison(checkpoint, where, tmp_path / "marker")
                code, out = bridge(*arguments, "poisoned")
                assert not Path("marker").exists(), (arguments, where)
                assert code == 2, (arguments, where, out)
                assert str(checkpoint) in out
                assert f"{ENTRIES[where]}' has the type {POISON_TYPE}" in out, out
                assert not Path("new").exists()
                assert not Path("out").exists()

    run_ranks(1, commands, process_group=False, timeout=100)
