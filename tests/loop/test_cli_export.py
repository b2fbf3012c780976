import pytest

from bridge.cli.export import find_exporter, parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20KB", 20_000)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0GB", "5TB"])
def test_text_that_is_no_size_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="--max-shard-size: .*such as 5GB"):
        parse_size(text)


def test_a_target_that_no_package_has_is_rejected_with_the_option() -> None:
    with pytest.raises(ValueError, match="^--to: .*'gguf'"):
        find_exporter("gguf")
