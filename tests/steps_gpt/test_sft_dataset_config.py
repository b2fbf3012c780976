"""Samples, microbatches and packed sequences of prompts and answers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.gpt.data.pretraining.split_plan import parse_split
from bridge.gpt.data.sft.dataset_config import SFTDatasetConfig
from bridge.gpt.data.sft.packing import plan_packing
from bridge.gpt.data.sft.rows.docstring_rows import held_out_modules, instructions
from bridge.gpt.data.text.documents import read_text_documents
from bridge.gpt.data.text.sources import find_source
from bridge.training.config import ConfigError, TokenizerConfig, resolve
from bridge.training.contracts import DataRequest, DataSplits
from gpt_data import build_splits
from gpt_models import run_of, tiny_gpt
from ranks import run_ranks
from sft_data import chat, uneven_rows, write_rows


def splits(tmp_path: Path, rows: Any, *, seq_length: int = 16, **fields: Any) -> DataSplits:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    dataset = SFTDatasetConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **fields)
    return build_splits(dataset, seq_length=seq_length)


def as_text(sample: Any) -> tuple[str, str]:
    """Return a sample's tokens and its counted labels as text; ``$`` ends a document."""
    counted = sample["labels"][sample["loss_mask"] != 0]
    return tuple(  # type: ignore[return-value]
        "".join("$" if i == 256 else chr(i) for i in ids.tolist())
        for ids in (sample["tokens"], counted)
    )


def test_a_sample_predicts_its_next_tokens_where_they_count(tmp_path: Path) -> None:
    found = splits(tmp_path, [{"prompt": "abc", "completion": "de"}])
    sample: Any = found.train[0]  # type: ignore[index]
    assert as_text(sample) == ("abcde", "de$")
    assert sample["loss_mask"].tolist() == [0, 0, 1, 1, 1]
    assert sample["position_ids"].tolist() == [0, 1, 2, 3, 4]


def test_a_microbatch_is_padded_to_its_longest_sample(tmp_path: Path) -> None:
    found = splits(tmp_path, [{"prompt": "a", "completion": "b" * n} for n in (1, 4)])
    assert found.collate is not None
    batch = found.collate([found.train[0], found.train[1]])  # type: ignore[index]
    assert batch["tokens"].shape == (2, 5)
    assert batch["padding_mask"].tolist() == [[False] * 2 + [True] * 3, [False] * 5]
    assert batch["loss_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert batch["position_ids"].tolist() == [list(range(5))] * 2


@pytest.mark.parametrize(
    ("truncation", "texts", "notes"),
    [
        ("right", [("ab", "b$"), ("abcd", "cde")], {"cut to model.seq_length": 1}),
        ("left", [("ab", "b$"), ("cdef", "def$"), ("aaaa", "aaa$")], {"cut": 2}),
        ("drop", [("ab", "b$")], {"dropped as too long": 2}),
    ],
)
def test_cut_and_dropped_rows_are_reported(
    tmp_path: Path, truncation: str, texts: Any, notes: dict[str, int]
) -> None:
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "ab", "completion": "cdef"},
        {"prompt": "a" * 5, "completion": "a" * 3},
    ]
    found = splits(tmp_path, rows, seq_length=4, truncation=truncation)
    train: Any = found.train
    assert [as_text(train[n]) for n in range(len(train))] == texts
    for what, number in notes.items():
        assert [v for key, v in found.notes.items() if what in key] == [number]
    dropped = [v for key, v in found.notes.items() if "no answer was left" in key]
    assert dropped == ([1] if truncation == "right" else [])


def test_the_counted_share_is_reported_and_all_or_nothing_is_a_warning(tmp_path: Path) -> None:
    rows = [{"prompt": "abcd", "completion": "e"}]
    found = splits(tmp_path, rows)
    assert found.notes["% of train tokens count in the loss"] == 40.0
    assert found.warnings == []
    [warning] = splits(tmp_path, rows, loss_on="all").warnings
    assert "every token" in warning
    rows = [{"prompt": "p" * 4000, "completion": ""}]
    [warning] = splits(tmp_path, rows, seq_length=5000).warnings
    assert "hardly any token" in warning
    with pytest.raises(ValueError, match="no row of .*rows.jsonl is left.*truncation=left"):
        splits(tmp_path, rows, seq_length=8)


def test_ignored_keys_are_counted_at_every_start(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "source": "forum"}, *uneven_rows(3)]
    with pytest.raises(ValueError, match="keys that are not read would be lost: 'source' of rows"):
        splits(tmp_path, rows)
    for _ in ("anew", "from the cache"):
        found = splits(tmp_path, rows, ignore_keys=["source", "scroe"], loss_on="assistant")
        assert found.notes["train rows of which 'source' is ignored"] == 1
        [warning] = found.warnings
        assert warning.startswith("warning: dataset.ignore_keys: 'scroe' has no effect: no row")
    # The corpus that ignored the key is not used without ignore_keys.
    with pytest.raises(ValueError, match="keys that are not read would be lost: 'source' of rows"):
        splits(tmp_path, rows)


def test_malformed_rows_stop_the_build_and_leave_nothing_in_the_cache(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, chat("user: hi")]
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: no turn is the assistant's"):
        splits(tmp_path, rows)
    assert list((tmp_path / "cache" / "sft").iterdir()) == []


def test_the_fingerprint_depends_on_contents_seed_and_packing_not_on_the_path(
    tmp_path: Path,
) -> None:
    def fingerprint(name: str, rows: Any, seed: int = 1, **fields: Any) -> str | None:
        path = write_rows(tmp_path / name / "rows.jsonl", rows)
        dataset = SFTDatasetConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **fields)
        return build_splits(dataset, seed=seed).fingerprint

    rows = uneven_rows(5)
    usual = fingerprint("a", rows)
    assert fingerprint("b", rows) == usual
    others = [
        fingerprint("c", rows[::-1]),
        fingerprint("a", rows, seed=2),
        fingerprint("a", rows, packing=True),
        fingerprint("a", rows, packing=True, pad_to_multiple_of=4),
        fingerprint("a", rows, loss_on="all"),
    ]
    assert len({usual, *others}) == 6


def naive_first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    for index, length in enumerate(lengths):
        for pack in packs:
            if sum(lengths[i] for i in pack) + length <= capacity:
                pack.append(index)
                break
        else:
            packs.append([index])
    return packs


def test_packing_is_first_fit_and_a_function_of_the_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 2, 7, 100):
        lengths = torch.randint(1, 17, (count,), generator=generator).tolist()
        assert plan_packing(lengths, 16, seed=None) == naive_first_fit(lengths, 16)
    shuffled = plan_packing(lengths, 16, seed=5)
    assert shuffled == plan_packing(lengths, 16, seed=5)
    assert shuffled != plan_packing(lengths, 16, seed=6)
    assert sorted(sum(shuffled, [])) == list(range(100))
    assert max(sum(lengths[i] for i in pack) for pack in shuffled) <= 16


def test_a_packed_sequence_is_its_samples_one_after_the_other(tmp_path: Path) -> None:
    rows = uneven_rows(20)
    alone: Any = splits(tmp_path, rows, seq_length=24).train
    packed: Any = splits(tmp_path, rows, seq_length=24, packing=True, pad_to_multiple_of=4).train
    assert len(packed) < len(alone)
    seen = []
    for sample in (packed[n] for n in range(len(packed))):
        ends = sample["cu_seqlens"].tolist()
        assert ends[0] == 0
        assert ends[-1] == len(sample["tokens"]) == 24
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            part = {name: tensor[start:end] for name, tensor in sample.items()}
            assert (end - start) % 4 == 0
            assert part["position_ids"].tolist() == list(range(end - start))
            real = ~part["padding_mask"]
            assert not part["loss_mask"][~real].any()
            if real.any():
                seen.append({name: part[name][real].tolist() for name in ("tokens", "loss_mask")})
    expected = [{n: alone[i][n].tolist() for n in ("tokens", "loss_mask")} for i in range(20)]
    assert sorted(map(str, seen)) == sorted(map(str, expected))


@pytest.mark.parametrize(
    ("model", "length"),
    [
        ({"context_parallel_size": 2}, 8),
        ({"context_parallel_size": 2, "tensor_model_parallel_size": 2}, 8),
        (
            {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 4,
                "sequence_parallel": True,
            },
            8,
        ),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 8),
        ({"pipeline_model_parallel_size": 2}, 16),
        ({"pipeline_model_parallel_size": 2, "variable_seq_lengths": True}, 5),
        ({"num_moe_experts": 2, "expert_model_parallel_size": 2}, 16),
        ({"tensor_model_parallel_size": 4}, 5),
    ],
)
def test_a_microbatch_is_as_long_as_the_layout_needs(
    tmp_path: Path, model: dict[str, Any], length: int
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "bcde"}])
    dataset = SFTDatasetConfig(path=str(path), cache_dir=str(tmp_path / "cache"))
    config = run_of(tiny_gpt(**model), dataset=dataset, tokenizer=TokenizerConfig())
    request = DataRequest(config=config, train_samples=None, validation_samples=0, test_samples=0)
    found = dataset.build(request)
    assert found.collate is not None
    assert found.collate([found.train[0]])["tokens"].shape == (1, length)  # type: ignore[index]


def test_wrong_settings_are_reported_at_once(tmp_path: Path) -> None:
    dataset = SFTDatasetConfig(
        path=str(tmp_path / "absent"),
        chat_template="tokenizer",
        packing=True,
        pad_to_multiple_of=3,
    )
    model = tiny_gpt(mtp_num_layers=1, vocab_size=None)
    config = run_of(model, dataset=dataset, tokenizer=TokenizerConfig())
    config.train.micro_batch_size = 2
    with pytest.raises(ConfigError) as caught:
        resolve(config, device="cpu", world_size=2)
    for part in (
        "dataset.path=",
        "dataset.chat_template=tokenizer: tokenizer.type=bytes has no chat template",
        "dataset.packing=true needs train.micro_batch_size=1, it is 2",
        "model.mtp_num_layers=1",
        "dataset.pad_to_multiple_of=3 must be at least 1 and divide model.seq_length=16",
    ):
        assert part in str(caught.value)
    config.dataset, config.tokenizer = SFTDatasetConfig(), None
    with pytest.raises(ConfigError, match=r"(?s)dataset.path: nothing.*tokenizer: rows of text"):
        resolve(config, device="cpu", world_size=2)


def test_two_ranks_build_the_same_and_the_rows_are_read_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", uneven_rows(30))

    def body() -> Any:
        dataset = SFTDatasetConfig(path=str(path), cache_dir=str(tmp_path / "cache"), packing=True)
        found = build_splits(dataset, seq_length=32)
        train: Any = found.train
        return found.fingerprint, [train[n]["tokens"].tolist() for n in range(len(train))]

    one, other = run_ranks(2, body)
    assert one == other
    write_rows(path, uneven_rows(30)[::-1])
    assert run_ranks(1, body)[0] != one


def test_instructions_are_signatures_and_summaries() -> None:
    source = b'''
class A:
    def f(self, x: int = 3, *rest) -> None:
        """Do this
        and that.

        More.
        """
        if x:
            async def inner(): "Go."
    def silent(self): return "\\d"
'''
    assert list(instructions(source)) == [
        (3, "def f(self, x: int=3, *rest)\nSummary: ", "Do this and that."),
        (10, "def inner()\nSummary: ", "Go."),
    ]


def test_gpt_tiny_is_trained_on_nothing_of_the_held_out_modules(
    tmp_path: Path,
) -> None:
    paths = [tmp_path / f"{n:03}.py" for n in range(120)]
    for n, path in enumerate(paths):
        path.write_text(f"# {n:03}\n" * (4000 if n % 3 == 0 else 20 * (n % 5)))
    files = find_source(str(tmp_path)).files
    documents = list(read_text_documents(files))
    parsed = parse_split("98,2,0")[0]
    assert parsed is not None
    trained_on = {document[2:5] for document in documents[: round(parsed[1] * len(documents))]}
    expected = [file for file in files if file.path.stem.encode() not in trained_on]
    held_out = held_out_modules(files)
    assert 0 < len(held_out) < 10
    assert list(held_out) == [file for file in expected if file.path >= held_out[0].path]
    assert files[-len(held_out) - 1].path.stem.encode() in trained_on
