"""Files below one root, and nothing outside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from powergrad.jobs.artifacts import BLOCK_BYTES, Artifacts
from tests.jobs.builders import at_once


@pytest.fixture(params=["directory", "memory"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    root = Artifacts(str(tmp_path / "root") if request.param == "directory" else f"memory:/{tmp_path}")
    root._fs.makedirs(root._full("jobs/a"))
    with root._fs.open(root._full("jobs/a/x.bin"), "wb") as file:
        file.write(bytes(range(256)) * 8192)  # two blocks
    return root


def test_a_range_is_the_files_bytes(artifacts: Artifacts) -> None:
    whole = bytes(range(256)) * 8192
    assert artifacts.size("jobs/a/x.bin") == len(whole) == 2 * BLOCK_BYTES
    assert b"".join(artifacts.stream("jobs/a/x.bin")) == whole
    assert b"".join(artifacts.stream("jobs/a/x.bin", 5, BLOCK_BYTES + 1)) == whole[5 : BLOCK_BYTES + 6]
    assert b"".join(artifacts.stream("jobs/a/x.bin", len(whole) - 3, 100)) == whole[-3:]
    assert list(artifacts.stream("jobs/a/x.bin", 0, 0)) == []


def test_what_is_not_there(artifacts: Artifacts) -> None:
    assert artifacts.size("jobs/b") is None
    with pytest.raises(FileNotFoundError):
        next(artifacts.stream("jobs/b"))
    artifacts.delete("jobs/b")


def test_deleting_frees_a_whole_directory(artifacts: Artifacts) -> None:
    artifacts.delete("jobs/a")
    assert artifacts.size("jobs/a/x.bin") is None


@pytest.mark.parametrize("path", ["", ".", "/etc/passwd", "../x", "jobs/../../x", "jobs/..", ".."])
def test_no_path_leaves_the_root(artifacts: Artifacts, path: str) -> None:
    for use in (artifacts.size, artifacts.delete, artifacts.local_dir, lambda path: next(artifacts.stream(path))):
        with pytest.raises(ValueError):
            use(path)


def test_many_may_delete_at_once_and_nothing_is_left(tmp_path: Path) -> None:
    artifacts = Artifacts(str(tmp_path))
    for number in range(300):
        folder = artifacts.local_dir(f"jobs/a/{number % 10}/{number}")
        (folder / "f").write_bytes(b"x")
    at_once([lambda: artifacts.delete("jobs/a")] * 6)
    assert not (tmp_path / "jobs/a").exists()


def test_free_space_is_known_before_the_root_exists(tmp_path: Path) -> None:
    free = Artifacts(str(tmp_path / "not" / "yet")).free_bytes()
    assert free is not None
    assert free > 0
    assert Artifacts("memory://x").free_bytes() is None
    with pytest.raises(ValueError, match="directory"):
        Artifacts("memory://x").local_dir("jobs/a")
