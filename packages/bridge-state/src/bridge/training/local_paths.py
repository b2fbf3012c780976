"""Paths in options and settings: files and folders of this machine; URLs are rejected.

Otherwise a path such as ``s3://bucket/run`` would make a folder ``s3:`` here.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, override

from bridge.training.usage_error import UsageError

_IS_LOCAL_PATH = "is_local_path"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# Fields of megatron-core's sections, which lack the metadata.
_OF_MEGATRON_CORE = frozenset({"config_logger_dir"})


def local_path(default: str | None = None) -> Any:
    """Return a dataclass field that holds a path, or several in lists and mappings.

    `bridge.training.config` rejects URLs in it.
    """
    return dataclasses.field(default=default, metadata={_IS_LOCAL_PATH: True})


def holds_local_paths(field: dataclasses.Field[Any]) -> bool:
    """Whether the values of a dataclass field are paths."""
    return _IS_LOCAL_PATH in field.metadata or field.name in _OF_MEGATRON_CORE


def is_url(text: str) -> bool:
    """Whether a text is a URL, also as pathlib writes it (``s3:/bucket``)."""
    return _SCHEME.match(text) is not None


def url_problem(name: str, url: str) -> str:
    """Return the line that rejects a URL in the field or option called `name`."""
    return (
        f"{name}={url!r}: is a URL, and only files of this machine are read and written; give a "
        "path, for a remote store that of its mount or of a copy"
    )


def urls_in(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each URL in a field's value, also in lists and mappings."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from urls_in(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from urls_in(item, name)
    elif isinstance(value, str) and is_url(value):
        yield name, value


class PathOption(argparse.Action):
    """Action of an option that takes a path: stores it, or adds it to a list of paths.

    Raises:
        UsageError: The path is a URL.
    """

    @override
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        for name, url in urls_in(values, option_string or str(self.metavar)):
            raise UsageError(url_problem(name, url))
        adds = isinstance(self.default, list)
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values] if adds else values)
