"""Unknown keys, and the existing ones that were probably meant."""

import dataclasses
from typing import Any, get_args

from bridge.training.config.container import SECTIONS, ConfigContainer
from bridge.training.config.schema.errors import Problem
from bridge.training.config.schema.fields import annotations_of, names_in, parts_of, value_at
from bridge.training.spelling import nearest


def section_fields(config: ConfigContainer, section: str) -> list[str]:
    """Return the keys of a section; of one that is None, those of its declared class."""
    present: Any = getattr(config, section)
    return names_in(declared_class(section) if present is None else present)


def declared_class(section: str) -> Any:
    """Return the dataclass that a section's annotation names, None if it names none."""
    annotation = annotations_of(ConfigContainer)[section]
    candidates = (annotation, *get_args(annotation))
    return next((cls for cls in candidates if dataclasses.is_dataclass(cls)), None)


def unknown_key(config: ConfigContainer, path: str) -> Problem:
    """Return the problem of a key that does not exist, with the nearest ones that do."""
    meant = likely_meant(config, path)
    text = f"{path}: unknown key" + (f"; did you mean {' or '.join(meant)}?" if meant else "")
    return Problem((path, *meant), text)


def likely_meant(config: ConfigContainer, path: str) -> list[str]:
    """Return the existing keys that `path` was most probably meant to be, none if none is near.

    A near key next to it within a section comes first, then the same key in another section or in
    a part of the same one, then a near one in the same section, then a near one anywhere.
    """
    place, _, key = path.rpartition(".")
    section = place.partition(".")[0]
    if place != section and (hint := nearest(key, _names_at(config, place))):
        return [f"{place}.{hint}"]
    near_section = section if section in SECTIONS else nearest(section, SECTIONS)
    homes = {name: section_fields(config, name) for name in SECTIONS}
    if near_section and near_section != section and key in homes[near_section]:
        return [f"{near_section}.{key}"]
    if exact := [f"{name}.{key}" for name, keys in homes.items() if key in keys]:
        return exact
    if near_section and (inner := _parts_with(config, near_section, key)):
        return inner
    if near_section and (hint := nearest(key, homes[near_section])):
        return [f"{near_section}.{hint}"]
    if not section and (hint := nearest(key, SECTIONS)):
        return [hint]
    everywhere = {key: name for name, keys in reversed(homes.items()) for key in keys}
    hint = nearest(key, everywhere, cutoff=0.7)
    return [f"{everywhere[hint]}.{hint}"] if hint else []


def _names_at(config: ConfigContainer, place: str) -> list[str]:
    """Return the keys at a path, none if it leads nowhere."""
    try:
        return names_in(value_at(config, place))
    except KeyError:
        return []


def _parts_with(config: ConfigContainer, section: str, key: str) -> list[str]:
    parts = parts_of(getattr(config, section), section)
    return [f"{path}.{key}" for path, part in parts if path != section and key in names_in(part)]
