"""uv.lock is committed without addresses, and loses nothing else by that."""

import importlib.machinery
import importlib.util
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from address_free import address_free, addresses

ROOT = Path(__file__).resolve().parents[2]

LOCAL_FORM = """\
version = 1

[[package]]
name = "torch"
version = "2.11.0"
source = { registry = "https://mirror.example/simple" }
dependencies = [
    { name = "numpy", marker = "sys_platform == 'linux'" },
]
wheels = [
    { url = "https://mirror.example/a/torch-2.11.0%2Bcu-cp312.whl", hash = "sha256:1", size = 5 },
    { url = "https://mirror.example/b/torch.whl#x", hash = "sha256:2", upload-time = "2026-01-01" },
]

[[package]]
name = "bridge-loop"
version = "0.1.0"
source = { editable = "packages/bridge-loop" }

[package.optional-dependencies]
te = [
    { name = "transformer-engine" },
]

[package.metadata]
requires-dist = [
    { name = "torch", specifier = ">=2.11" },
]
provides-extras = ["te"]

[package.metadata.requires-dev]
dev = [{ name = "pytest" }]

[[package]]
name = "zipp"
version = "4"
source = { registry = "https://mirror.example/simple" }
sdist = { url = "file:///srv/zipp-4.tar.gz", hash = "sha256:3", size = 7, upload-time = "2026" }
"""

COMMITTED_FORM = """\
version = 1

[[package]]
name = "torch"
version = "2.11.0"
source = { registry = "wheels" }
dependencies = [
    { name = "numpy", marker = "sys_platform == 'linux'" },
]
wheels = [
    { path = "torch-2.11.0%2Bcu-cp312.whl", hash = "sha256:1" },
    { path = "torch.whl", hash = "sha256:2" },
]

[[package]]
name = "bridge-loop"
version = "0.1.0"
source = { editable = "packages/bridge-loop" }

[package.optional-dependencies]
te = [
    { name = "transformer-engine" },
]

[[package]]
name = "zipp"
version = "4"
source = { registry = "wheels" }
sdist = { path = "zipp-4.tar.gz", hash = "sha256:3" }
"""


def committed_lock() -> str:
    staged = subprocess.run(
        ["git", "show", ":uv.lock"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if staged.returncode:
        pytest.skip("not a git checkout, and uv has rewritten the copy in the folder")
    return staged.stdout


@pytest.fixture(scope="module")
def lock_tool() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("lock_tool", str(ROOT / "tools" / "lock"))
    spec = importlib.util.spec_from_loader("lock_tool", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_committed_lock_has_no_address() -> None:
    assert addresses(committed_lock()) == []


def test_the_committed_lock_is_in_the_form_that_the_filter_writes() -> None:
    assert address_free(committed_lock()) == committed_lock()


def test_the_committed_lock_records_the_torch_that_is_measured() -> None:
    packages = {p["name"]: p.get("version") for p in tomllib.loads(committed_lock())["package"]}
    assert packages["torch"] == "2.11.0"
    assert packages["megatron-core"] == "0.19.2"


def test_addresses_and_the_members_metadata_go_and_all_else_stays() -> None:
    assert address_free(LOCAL_FORM) == COMMITTED_FORM


def test_the_filter_changes_nothing_the_second_time() -> None:
    assert address_free(COMMITTED_FORM) == COMMITTED_FORM


def test_an_address_is_found_with_its_line() -> None:
    assert addresses(COMMITTED_FORM) == []
    assert addresses(LOCAL_FORM)[0].startswith("line 6: source")


def test_drift_is_another_version_dependency_or_hash_but_not_an_unserved_file(
    lock_tool: ModuleType,
) -> None:
    def drift(change: Any) -> list[str]:
        fresh = tomllib.loads(COMMITTED_FORM)
        torch, _, zipp = fresh["package"]
        change(torch, zipp)
        return list(lock_tool.differences(tomllib.loads(COMMITTED_FORM), fresh))

    assert drift(lambda torch, zipp: None) == []
    assert drift(lambda torch, zipp: torch["wheels"].pop()) == []
    assert drift(lambda torch, zipp: torch.update(dependencies=[])) == [
        "uv.lock: dependencies of torch 2.11.0 changed: run tools/lock"
    ]
    assert drift(lambda torch, zipp: zipp["sdist"].update(hash="sha256:4")) == [
        "uv.lock: zipp-4.tar.gz has another hash than the one that is served"
    ]
    assert drift(lambda torch, zipp: zipp.update(version="5")) == [
        "uv.lock has zipp 4, which nothing asks for: run tools/lock",
        "uv.lock lacks zipp 5: run tools/lock",
    ]
