"""The version, which the root, every package and every pin between packages share.

    uv run tools/version.py                # check, the same as `check`
    uv run tools/version.py show
    uv run tools/version.py set 0.2.0      # then tools/lock

uv ignores the pin of a workspace sibling, so a pin that differs locks, syncs and tests well and
fails for the first user who installs the wheels. Hence the check.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VERSION_LINE = re.compile(r'(?m)^version = "([^"]*)"$')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("show", help="print the version")
    commands.add_parser("check", help="fail where a version or a pin differs from the root's")
    commands.add_parser("set", help="write it everywhere").add_argument("version")
    args = parser.parse_args()
    if args.command == "set":
        write(ROOT, args.version)
    problems = list(differences(ROOT))
    print("\n".join(problems) or version_of(ROOT))
    return bool(problems)


def version_of(root: Path) -> str:
    version = project(root / "pyproject.toml")["version"]
    assert isinstance(version, str)
    return version


def differences(root: Path) -> Iterator[str]:
    """Yield a line for each member's version and each pin of a sibling that is not the root's."""
    wanted = version_of(root)
    members = {path: project(path) for path in member_pyprojects(root)}
    names = {member["name"] for member in members.values()}
    for path, member in members.items():
        place = path.relative_to(root)
        if member["version"] != wanted:
            yield f"{place}: version is {member['version']}, the root's is {wanted}"
        extras = member.get("optional-dependencies", {}).values()
        for requirement in [*member.get("dependencies", []), *(r for e in extras for r in e)]:
            name, pin = sibling_pin(requirement)
            if name in names and pin != f"=={wanted}":
                yield f"{place}: {requirement!r} must end in '=={wanted}'"


def write(root: Path, version: str) -> None:
    """Write `version` into the root, the members and the pins between members."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)*((a|b|rc|\.post|\.dev)[0-9]+)*", version):
        raise SystemExit(f"version {version!r} is not one that an installer reads, such as 0.2.0")
    paths = [root / "pyproject.toml", *member_pyprojects(root)]
    names = "|".join(re.escape(project(path)["name"]) for path in paths)
    pin = re.compile(rf'"((?:{names})(?:\[[^\]]*\])?)==[^"]*"')
    for path in paths:
        text = VERSION_LINE.sub(f'version = "{version}"', path.read_text(), count=1)
        path.write_text(pin.sub(rf'"\1=={version}"', text))


def sibling_pin(requirement: str) -> tuple[str, str]:
    """Split `name[extras]<pin>` into the name and the pin."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*(.*)", requirement)
    assert match is not None, requirement
    return match.group(1), match.group(2)


def member_pyprojects(root: Path) -> list[Path]:
    return sorted((root / "packages").glob("*/pyproject.toml"))


def project(path: Path) -> dict[str, Any]:
    table = tomllib.loads(path.read_text())["project"]
    assert isinstance(table, dict)
    return table


if __name__ == "__main__":
    sys.exit(main())
