import argparse
from pathlib import Path

import pytest

from bridge.gpt.data.command import register
from gpt_data import read_pair, tree, write_story


def bridge(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser(prog="bridge")
    register(parser.add_subparsers(required=True))
    parsed = parser.parse_args([str(argument) for argument in arguments])
    code: int = parsed.run(parsed)
    return code


def test_build_writes_a_pair_and_reports_its_contents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_story(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    code = bridge(
        *("data", "build", tmp_path / "*.txt", tmp_path / "b.jsonl"),
        *("--output", tmp_path / "out", "--json-key", "body"),
    )
    documents = read_pair(tmp_path / "out")
    printed = capsys.readouterr().out
    assert code == 0
    tokens = sum(map(len, documents))
    assert f"{len(documents)} documents, {tokens} tokens of 2 files" in printed
    assert f"{tmp_path}/out.bin and {tmp_path}/out.idx" in printed
    assert documents[-1] == [*b"two", 256]


def test_the_end_of_document_token_can_be_omitted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    bridge("data", "build", tmp_path / "a.txt", "--output", tmp_path / "out", "--no-append-eod")
    assert read_pair(tmp_path / "out") == [list(b"text")]


@pytest.mark.parametrize(
    "arguments",
    [
        ["data"],
        ["data", "build"],
        ["data", "build", "x.txt"],
        ["data", "build", "x.txt", "--output", "y", "--tokenizer", "null"],
        ["data", "remove"],
    ],
)
def test_wrong_usage_exits_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bridge(*arguments)
    assert end.value.code == 2


def test_mistakes_name_the_argument_and_leave_nothing(tmp_path: Path) -> None:
    story = write_story(tmp_path / "a.txt")
    (tmp_path / "empty.txt").touch()
    for arguments, message in (
        (["absent.txt", "--output", "out"], "INPUT='.*absent.txt'"),
        (["empty.txt", "--output", "out"], "INPUT='.*empty.txt': the file is empty"),
        (["a.txt", "--output", "no/such/out"], "create the directory"),
    ):
        here = [a if a.startswith("--") else tmp_path / a for a in arguments]
        with pytest.raises(ValueError, match=message):
            bridge("data", "build", *here)
    assert tree(tmp_path) == ["a.txt", "empty.txt"]

    bridge("data", "build", story, "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="not overwritten"):
        bridge("data", "build", story, "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="token files"):
        bridge("data", "build", tmp_path / "out", "--output", tmp_path / "again")
