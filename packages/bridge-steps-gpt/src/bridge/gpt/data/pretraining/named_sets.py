"""The sets of samples of a run, by name, and the text or token files of each.

A set is named "train", "validation" or "test", or "validation/NAME" or "test/NAME" where the user
gave a mapping of paths.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bridge.gpt.data.text.sources import Source, find_source, python_standard_library
from bridge.training.contracts import SizedDataset, wrong_set_name
from bridge.training.usage_error import UsageError

type Paths = str | list[str]


@dataclass(frozen=True, kw_only=True)
class SetPaths:
    """The paths of the dataset section, by set."""

    path: Paths | None
    validation_path: Paths | dict[str, Paths] | None
    test_path: Paths | dict[str, Paths] | None
    standard_library: bool

    def problems(self) -> Iterator[str]:
        """Yield wrong names of sets, and paths that are missing or empty."""
        for field in ("validation_path", "test_path"):
            value = getattr(self, field)
            if isinstance(value, Mapping):
                if not value:
                    yield f"dataset.{field}={{}}: names no set; give one or leave it out"
                for name, path in value.items():
                    if problem := wrong_set_name(name):
                        yield f"dataset.{field}: {problem}"
                    if not list_entries(path):
                        yield f"dataset.{field}.{name}: there is no path; give one"
        for field, entries in self._entries_by_set().values():
            for entry in entries:
                try:
                    find_source(entry, field=field)
                except UsageError as error:
                    yield str(error)

    def find_sources(self) -> dict[str, list[Source]]:
        """Return the sources of each set; those of training come first.

        Raises:
            UsageError: There is no path to train on, or no file at one.
        """
        found = {
            name: [find_source(entry, field=field) for entry in entries]
            for name, (field, entries) in self._entries_by_set().items()
        }
        if "train" not in found:
            if not self.standard_library:
                raise UsageError("dataset.path: nothing to train on")
            found = {"train": [python_standard_library()], **found}
        return found

    def _entries_by_set(self) -> dict[str, tuple[str, list[str]]]:
        """Return the field and the entries of each path that the user gave, by its set."""
        given: dict[str, tuple[str, list[str]]] = {}
        fields = {"path": "train", "validation_path": "validation", "test_path": "test"}
        for field, split in fields.items():
            value = getattr(self, field)
            if isinstance(value, Mapping):
                for name, path in value.items():
                    given[f"{split}/{name}"] = (f"dataset.{field}.{name}", list_entries(path))
            elif entries := list_entries(value):
                given[split] = (f"dataset.{field}", entries)
        return given


def list_entries(value: Paths | None) -> list[str]:
    """Return the entries of a path: none, one or several."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def split_of_set(name: str) -> str:
    """Return the split that a set belongs to: "validation" for "validation/wiki"."""
    return name.partition("/")[0]


def sets_of_split(
    sets: Mapping[str, SizedDataset], split: str
) -> SizedDataset | dict[str, SizedDataset] | None:
    """Return the sets of a split as `DataSplits` takes them: its only one, or those by name."""
    named = {
        name.partition("/")[2]: dataset
        for name, dataset in sets.items()
        if name.startswith(f"{split}/")
    }
    return named or sets.get(split)
