"""What `pip install` brings: a wheel built from this tree, the dashboard left out (its build has tests of its own)."""

from __future__ import annotations

import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("api", "worker", "powergrad")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HATCH_BUILD_NO_HOOKS", "true")
        (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return zipfile.ZipFile(path)


def _is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and "dashboard" not in path.relative_to(ROOT).parts[:2]


def test_it_holds_every_file_of_the_packages_and_no_other(wheel: zipfile.ZipFile) -> None:
    there = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*") if _is_source(path)}
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name and not name.startswith("api/dashboard/")}
    assert inside == there


def test_what_is_no_module_comes_along(wheel: zipfile.ZipFile) -> None:
    """Each of these is read at run time by a path beside a module."""
    inside = set(wheel.namelist())
    assert {
        "powergrad/py.typed",
        "powergrad/experiments/templates/report.html.jinja",
        "powergrad/experiments/templates/report.md.jinja",
        "powergrad/jobs/migrations/env.py",
    } <= inside
    assert any(name.startswith("powergrad/jobs/migrations/versions/0001_") for name in inside)


def test_files_are_as_in_the_tree(wheel: zipfile.ZipFile) -> None:
    for name in wheel.namelist():
        if ".dist-info/" not in name and not name.startswith("api/dashboard/"):
            assert wheel.read(name) == (ROOT / name).read_bytes(), name


def test_its_metadata_names_the_command_and_the_parts(wheel: zipfile.ZipFile) -> None:
    (folder,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "powergrad = powergrad.cli.main:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    metadata = message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert {"jobs", "client", "server", "worker", "train", "embedded", "all"} <= set(metadata.get_all("Provides-Extra", []))
