"""The images: how large, whose user, and what is not in them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.compose.conftest import FIGURES
from tests.compose.project import BUILT, TAG, Project, docker

pytestmark = pytest.mark.long
BASE = "python:3.12-slim"
OFFICIAL_BASE_BYTES = 125_000_000
"""Of python:3.12-slim on amd64; a stand-in of another size is not our doing."""
API_BYTES = 300_000_000


@pytest.fixture(params=BUILT)
def image(request: pytest.FixtureRequest, project: Project) -> str:
    return f"{request.param}:{TAG}"


def inspected(image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("image", "inspect", image))[0]
    return found


def in_container(image: str, script: str, *, user: str | None = None) -> str:
    asked = () if user is None else ("--user", user)
    return docker("run", "--rm", "--network", "none", *asked, "--entrypoint", "sh", image, "-c", script)


def test_the_api_image_is_small(project: Project) -> None:
    ours, base = (inspected(name)["Size"] for name in (f"powergrad-api:{TAG}", BASE))
    worker = inspected(f"powergrad-worker:{TAG}")["Size"]
    FIGURES.append(
        f"api image: {ours / 1e6:.0f} MB, {(ours - base) / 1e6:.0f} MB of it over {BASE} ({base / 1e6:.0f} MB here); worker image: {worker / 1e9:.1f} GB"
    )
    assert ours - base + OFFICIAL_BASE_BYTES < API_BYTES


def test_it_runs_as_a_user_without_rights(image: str) -> None:
    assert inspected(image)["Config"]["User"] == "powergrad"
    assert in_container(image, "id -u") == "10001"


def test_it_has_labels_and_a_health_check(image: str) -> None:
    config = inspected(image)["Config"]
    assert {f"org.opencontainers.image.{name}" for name in ("title", "description", "version", "revision", "created")} <= set(
        config["Labels"]
    )
    assert config["Healthcheck"]["Test"]


def test_nothing_that_built_it_is_left(image: str) -> None:
    assert in_container(image, "command -v node npm npx uv gcc git || true") == ""
    left = "find /root /tmp /var/cache -type f | sort"
    assert in_container(image, left, user="0") == in_container(BASE, left)


def test_only_the_worker_has_torch(image: str) -> None:
    has = in_container(image, "python -c 'import importlib.util as u; print(u.find_spec(\"torch\") is not None)'")
    assert has == str("worker" in image)


def test_the_dashboard_is_in_the_api(project: Project) -> None:
    assert "index.html" in in_container(f"powergrad-api:{TAG}", "ls $(python -c 'import api; print(api.__path__[0])')/dashboard")


def test_no_secret_is_in_the_history(image: str, project: Project) -> None:
    told = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image) + json.dumps(inspected(image)["Config"])
    values = [
        line.split("=", 1)[1] for line in (project.folder / ".env").read_text().splitlines() if re.match(r"\w*(PASSWORD|ADMIN)=", line)
    ]
    assert len(values) == 4
    assert not [value for value in [*values, project.key.rpartition("_")[2]] if value in told]
    assert not re.search(r"(?i)password|secret|api_key|\.netrc|index-url", told)
