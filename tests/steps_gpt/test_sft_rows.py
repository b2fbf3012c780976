"""Rows of fine-tuning data: their files, and the conversation in each."""

import dataclasses
import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from bridge.gpt.data.sft.dataset_config import SFTDatasetConfig
from bridge.gpt.data.sft.rows.conversations import RowKeys, read_conversation
from bridge.gpt.data.sft.rows.row_files import StoredRows, find_rows, reject_missing_library
from bridge.training.config import ConfigContainer, apply_overrides
from sft_data import chat, write_rows
from tiny_configs import TinyModel

KEYS = RowKeys(prompt="prompt", completion="completion", messages="messages")


def turns(record: dict[str, Any], keys: RowKeys = KEYS) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in read_conversation(record, "here", keys).turns]


def test_the_three_forms_of_a_row() -> None:
    assert turns({"prompt": "p", "completion": "c"}) == [("user", "p"), ("assistant", "c")]
    assert turns(chat("system: s", "user: u", "assistant: a")) == [
        ("system", "s"),
        ("user", "u"),
        ("assistant", "a"),
    ]
    sharegpt = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    assert turns({"conversations": sharegpt}) == [("user", "u"), ("assistant", "a")]
    keys = RowKeys(prompt="question", completion="answer", messages="talk")
    assert turns({"question": "p", "answer": "c"}, keys) == [("user", "p"), ("assistant", "c")]
    assert turns({"talk": chat("user: u")["messages"]}, keys) == [("user", "u")]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": "p"}, "here: no 'completion' .there is 'prompt'.*dataset.completion_key"),
        ({"promt": "p", "completion": "c"}, "no 'prompt' .*; did you mean 'promt'"),
        ({"prompt": None, "completion": "c"}, "here: prompt: expected text, got None"),
        ({}, "no 'prompt' and no 'completion' .there is nothing"),
        ({"prompt": ["p"], "completion": "c"}, r"here: prompt: expected text, got \['p'\]"),
        ({"messages": []}, r"here: messages: expected a list of messages, got \[\]"),
        ({"messages": "hello"}, "expected a list of messages, got 'hello'"),
        ({"messages": ["hi"]}, r"messages\[0\]: expected an object with 'role' and 'content'"),
        (chat("user: u", "assitant: a"), r"messages\[1\]: the role 'assitant'.*'assistant'\?"),
        ({"messages": [{"role": "user", "content": None}]}, r"\[0\]: content: expected text"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "'bing' is none of .*; write one"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"role \['user'\] is none of"),
        ({"messages": [{"role": {"a": 1}, "content": "x"}]}, "role {'a': 1} is none of"),
        (
            {"conversations": [{"role": "user", "content": "x"}]},
            "with 'from' and 'value', .*; .* are read with dataset.messages_key=conversations",
        ),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            "with 'role' and 'content', .*; turns with from and value are read under 'conversat",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "a preference row.*write it as 'compl"),
        (
            {"prompt": chat("user: u")["messages"], "completion": "c"},
            "prompt: expected text, got .*as one chat, under 'messages'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "First."}]}]},
            r"messages\[0\]: content: expected text, .*write the parts of a message as one text",
        ),
    ],
)
def test_a_malformed_row_is_rejected_with_its_place(record: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_conversation(record, "here", KEYS)


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}
TALK = chat("user: a?", "assistant: b")["messages"]


def turn(role: str, text: str | None, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **keys}


@pytest.mark.parametrize(
    ("rows", "lost"),
    [
        (
            [
                {"prompt": "Translate.", "completion": "fromage", "input": "cheese"},
                {"prompt": "Name a prime.", "completion": "7", "input": ""},
                {"prompt": "p", "completion": "c", "system": "s", "history": [["a", "b"]]},
            ],
            {("input", "rows"): 1, ("system", "rows"): 1, ("history", "rows"): 1},
        ),
        (
            [{"messages": [*TALK, turn("tool", "x", tool_call_id="c1")], "tools": [CALL]}] * 2,
            {("tools", "rows"): 2, ("tool_call_id", "turns"): 2},
        ),
        (
            [{"messages": [turn("assistant", None, tool_calls=[CALL]), *TALK]}],
            {("tool_calls", "turns"): 1},
        ),
        (
            [{"messages": [*TALK, turn("assistant", "No.", reasoning_content="91 = 7 * 13")]}],
            {("reasoning_content", "turns"): 1},
        ),
        (
            [{"messages": TALK, "template": {"a": 1}}],
            {("template", "rows"): 1},
        ),
        ([{"messages": [*TALK, turn("assistant", "x", weight=0)]}], {("weight", "turns"): 1}),
        ([{"messages": [*TALK, turn("assistant", "x", train=False)]}], {("train", "turns"): 1}),
        (
            [
                {"conversations": [{"from": "human", "value": "1, 2, ?", "id": 0}], "system": "s"},
                {"conversations": [{"from": "human", "value": "x", "id": 1}]},
            ],
            {("system", "rows"): 1, ("id", "turns"): 2},
        ),
        ([{"messages": TALK, "prompt": "a?", "completion": None}], {("prompt", "rows"): 1}),
    ],
)
def test_extra_keys_are_rejected_all_at_once_unless_ignored(
    rows: list[dict[str, Any]], lost: dict[tuple[str, str], int], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [chat("user: u", "assistant: a"), *rows])
    with pytest.raises(ValueError, match="rows.jsonl: keys that are not read would") as error:
        find_rows(str(path), "dataset.path", KEYS)["train"].check()
    for (key, holder), count in lost.items():
        assert f"{key!r} of {holder} (in {count} row" in str(error.value)
    names = list(dict.fromkeys(key for key, _ in lost))
    assert f"'dataset.ignore_keys=[{','.join(names)}]'" in str(error.value)
    assert str(error.value).count(" of rows (") + str(error.value).count(" of turns (") == len(lost)
    given_up = dataclasses.replace(KEYS, ignored=tuple(names))
    source = find_rows(str(path), "dataset.path", given_up)["train"]
    if any(message["content"] is None for row in rows for message in row.get("messages", ())):
        # Nothing is left of the turn.
        with pytest.raises(
            ValueError, match="line 2: messages.0.: content: expected text, got None"
        ):
            source.check()
    else:
        assert source.check() == {key: count for (key, _), count in lost.items()}
        assert len(list(source.conversations())) == 1 + len(rows)


def test_the_setting_that_ignores_keys_can_be_pasted_for_any_names(
    tmp_path: Path,
) -> None:
    names = ["a, b", "c d", "1", "null", "True", "[z]", "", "it's", 'q"q', "k: v", "#h", "é", "ok"]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK, **dict.fromkeys(names, 1)}])
    with pytest.raises(ValueError, match="keys that are not read") as error:
        find_rows(str(path), "dataset.path", KEYS)["train"].check()
    [setting] = shlex.split(str(error.value).partition("ignore them with ")[2])
    config = ConfigContainer(model=TinyModel(), dataset=SFTDatasetConfig(path=str(path)))
    dataset: Any = apply_overrides(config, [setting]).dataset
    assert dataset.ignore_keys == names


def test_a_list_of_rows_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "p", "completion": "c"}], indent=1), "utf-8-sig")
    [row] = find_rows(str(path), "dataset.path", KEYS)["train"].conversations()
    assert row.turns[0].text == "p"


def test_the_first_malformed_row_and_all_extra_keys_are_reported_at_once(
    tmp_path: Path,
) -> None:
    rows = [
        {"messages": TALK, "source": "forum"},
        {"conversations": [{"from": "observation", "value": "rain"}], "tools": "[]"},
        {"prompt": "p", "score": 1},
        {"messages": TALK, "source": "mail"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match="line 2: .* the role 'observation' is none of") as error:
        find_rows(str(path), "dataset.path", KEYS)["train"].check()
    said = str(error.value)
    assert "; 2 rows in all are malformed; keys that are not read" in said
    assert "'source' of rows (in 2 rows, the first is line 1)" in said
    assert "'tools' of rows (in 1 row, the first is line 2)" in said
    assert "'dataset.ignore_keys=[source,tools]'" in said


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{oops", r"line 3: not JSON \(.*, at character 2\); write an object a line, in UTF-8"),
        ("[1]", r"line 3: expected an object with keys, got \[1\]; write an object a line"),
        pytest.param("[" * 100_000, "line 3: not JSON .maximum recursion depth.*", id="deep"),
    ],
)
def test_a_line_that_is_no_row_is_rejected_with_file_and_line(
    tmp_path: Path, line: str, complaint: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n\n' + line + "\n")
    source = find_rows(str(path), "dataset.path", KEYS)["train"]
    with pytest.raises(ValueError, match=f"rows.jsonl, {complaint}"):
        list(source.conversations())


def test_a_directory_has_one_file_for_each_split(tmp_path: Path) -> None:
    for name in ("training", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "c"}])
    found = find_rows(str(tmp_path), "dataset.path", KEYS)
    assert list(found) == ["train", "validation"]
    [row] = found["validation"].conversations()
    assert row.turns[0].text == "validation"


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda place: place / "absent", "there is no such file or directory"),
        (lambda place: place, r"neither training.jsonl.*\(there is nothing\)"),
        (lambda place: write_rows(place / "train.jsonl", [{}]).parent, "there is train.jsonl"),
        (lambda place: write_rows(place / "rows.jsonl", []), "the file is empty"),
    ],
)
def test_a_path_without_rows_is_rejected_with_the_files_that_are_there(
    tmp_path: Path, make: Any, complaint: str
) -> None:
    with pytest.raises(ValueError, match=f"dataset.path=.*{complaint}"):
        find_rows(str(make(tmp_path)), "dataset.path", KEYS)


@pytest.mark.xdist_group("datasets")
def test_a_hugging_face_dataset_on_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {**chat("user: u", f"assistant: a{n}"), "prompt": None, "score": [None, 2, 3][n]}
        for n in range(3)
    ]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict({"train": whole, "dev": whole.select([2]), "odd": whole})
    splits.save_to_disk(str(tmp_path / "several"))
    [source] = find_rows(str(tmp_path / "one"), "dataset.path", KEYS).values()
    assert [row.turns[1].text for row in source.conversations()] == ["a0", "a1", "a2"]
    with pytest.raises(ValueError, match="'score' of rows .in 2 rows, the first is row 1"):
        source.check()
    found = find_rows(str(tmp_path / "several"), "dataset.path", KEYS)
    assert list(found) == ["train", "validation"]
    [row] = found["validation"].conversations()
    assert row.turns[1].text == "a2"
    assert row.place.endswith("several, split dev, row 0")


def test_a_hugging_face_dataset_without_the_package_is_rejected_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    [source] = find_rows(str(tmp_path), "dataset.path", KEYS).values()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install datasets"):
        reject_missing_library(source, "dataset.path")
    reject_missing_library(StoredRows(kind="json lines", path=tmp_path, keys=KEYS), "dataset.path")
