"""URLs in the configuration's path fields, which only take paths of this machine."""

from bridge.training.config.container import SECTIONS, ConfigContainer
from bridge.training.config.schema.fields import fields_of, join
from bridge.training.config.schema.paths import parts_of
from bridge.training.local_paths import holds_local_paths, url_problem, urls_in


def url_problems(config: ConfigContainer) -> dict[str, list[str]]:
    """Return the lines that reject URLs, by the field that they stand in."""
    problems: dict[str, list[str]] = {}
    for section in SECTIONS:
        for path, part in parts_of(getattr(config, section), section):
            for name, field in fields_of(part).items():
                if holds_local_paths(field):
                    for place, url in urls_in(getattr(part, name), join(path, name)):
                        problems.setdefault(place, []).append(url_problem(place, url))
    return problems
