"""The packages declare what they import; tools/declared.py reports what they do not."""

from pathlib import Path

import grimp

from declared import Member, differences, read_members

ROOT = Path(__file__).resolve().parents[2]


def test_members_import_what_they_declare_and_nothing_else() -> None:
    graph = grimp.build_graph("bridge", include_external_packages=True, cache_dir=None)
    assert list(differences(read_members(ROOT), graph)) == []


def test_an_undeclared_import_of_a_sibling_or_a_library_is_reported() -> None:
    graph = grimp.ImportGraph()
    for importer, imported in [("bridge.a", "bridge.b"), ("bridge.a", "numpy")]:
        graph.add_import(importer=importer, imported=imported)
    members = [
        Member(name="a", dependencies={"torch"}, extras=set(), modules={"bridge.a"}),
        Member(name="b", dependencies=set(), extras=set(), modules={"bridge.b"}),
    ]
    assert list(differences(members, graph)) == [
        "a: bridge.a imports bridge.b; b is not declared",
        "a: bridge.a imports numpy; numpy is not declared",
        "a: declares torch and imports nothing of it",
    ]
