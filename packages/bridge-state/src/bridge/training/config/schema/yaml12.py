"""YAML 1.2, read and written.

PyYAML reads YAML 1.1, where 1e-3 is a string, `no` is false and 12:30 is 750. Here text is read by
the rules of YAML 1.2, and written such that readers of both versions agree.
"""

import re
from collections.abc import Mapping
from typing import Any, override

import yaml

from bridge.training.config.schema.errors import ConversionError

try:  # libyaml takes a fifth of the time.
    from yaml import CSafeDumper as SafeDumper
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeDumper, SafeLoader  # type: ignore[assignment]

_CORE_SCHEMA = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _Loader(SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    @override
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise ConversionError(f"the key {key!r} is not a name{_place(key_node)}")
            if key in seen:
                raise ConversionError(f"the key {key!r} is there twice{_place(key_node)}")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(SafeDumper):
    @override
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(?=[iInN])", "", str(loader.construct_scalar(node))))


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.Node:
    nested = any(isinstance(item, list | Mapping) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=not nested)


for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    _regexp = re.compile(rf"^(?:{_pattern})$")
    _letters = ["" if letter == "\0" else letter for letter in _first]
    # The int pattern goes first for both: a plain number matches the float pattern too.
    _Loader.add_implicit_resolver(_tag, _regexp, _letters)
    _Dumper.add_implicit_resolver(_tag, _regexp, _letters)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Dumper.add_representer(list, _represent_list)


def _place(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})"


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ConversionError: It is not YAML, or a key is there twice.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        place = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConversionError(f"is not valid YAML: {error.problem}{place}") from error
    except yaml.YAMLError as error:
        raise ConversionError(f"is not valid YAML: {' '.join(str(error).split())}") from error


def dump_yaml(plain: Mapping[str, Any]) -> str:
    """Return plain values as YAML text, in their order, lists of scalars on one line."""
    text: str = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
    return text


def dump_scalar(plain: Any) -> str:
    """Return one value as YAML on one line, as an override would give it."""
    text: str = yaml.dump(
        plain, Dumper=_Dumper, default_flow_style=True, width=10_000, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
