"""Compare what each member imports with what its pyproject declares.

    uv run tools/declared.py

Imports are read from the source, those in functions and under TYPE_CHECKING included. A sibling
must be a dependency; a third-party package a dependency or in an extra. What is declared and never
imported is reported too.
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent

# Declared although nothing of ours imports it, and why.
NOT_IMPORTED = {
    "psutil": "megatron-core's checkpoints import it and do not declare it",
}


@dataclass(kw_only=True)
class Member:
    """One distribution: what it declares and the modules in its source folder."""

    name: str
    dependencies: set[str]
    extras: set[str]
    modules: set[str] = field(default_factory=set)


def main() -> int:
    members = read_members(ROOT)
    graph = grimp.build_graph("bridge", include_external_packages=True, cache_dir=None)
    problems = list(differences(members, graph))
    print("\n".join(problems) or "imports match the declared dependencies")
    return bool(problems)


def read_members(root: Path) -> list[Member]:
    members = []
    for path in sorted((root / "packages").glob("*/pyproject.toml")):
        project = tomllib.loads(path.read_text())["project"]
        extras = project.get("optional-dependencies", {}).values()
        member = Member(
            name=project["name"],
            dependencies={distribution_name(r) for r in project.get("dependencies", [])},
            extras={distribution_name(r) for extra in extras for r in extra},
        )
        source = path.parent / "src"
        for file in source.rglob("*.py"):
            parts = file.relative_to(source).with_suffix("").parts
            member.modules.add(".".join(parts).removesuffix(".__init__"))
        members.append(member)
    return members


def differences(members: list[Member], graph: grimp.ImportGraph) -> Iterator[str]:
    """Yield a line for each import that is not declared and each declaration not imported."""
    owner = {module: member.name for member in members for module in member.modules}
    if missing := sorted(owner.keys() - graph.modules):
        yield f"not importable from this environment: {', '.join(missing)} (uv sync)"
    distributions = packages_distributions()
    for member in members:
        imported: set[str] = set()
        for module in sorted(member.modules & graph.modules):
            for target in sorted(graph.find_modules_directly_imported_by(module)):
                providers = providers_of(target, owner, distributions) - {member.name}
                imported |= providers
                if providers and not providers & (member.dependencies | member.extras):
                    needed = " or ".join(sorted(providers))
                    yield f"{member.name}: {module} imports {target}; {needed} is not declared"
        for unused in sorted(member.dependencies - imported - NOT_IMPORTED.keys()):
            yield f"{member.name}: declares {unused} and imports nothing of it"


def providers_of(
    module: str, owner: dict[str, str], distributions: Mapping[str, list[str]]
) -> set[str]:
    """Return the distributions that provide a module, none for the standard library."""
    if module in owner:
        return {owner[module]}
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "bridge":
        return set()
    return {distribution_name(name) for name in distributions.get(top, [top])}


def distribution_name(requirement: str) -> str:
    name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
