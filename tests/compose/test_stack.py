"""The stack of docker-compose.yml with its CPU worker: a first job, the README's tour, an experiment, and everything that can fall, falling."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from powergrad.client import Client, Job
from tests.cli.conftest import tiny
from tests.compose.conftest import FIGURES
from tests.compose.project import READY_S, ROOT, Project, docker, until
from tests.test_readme import TOUR, blocks, pattern, settled, walked

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
TRAINED_S = 300.0
SERVICES = ("postgres", "redis", "api", "worker-cpu")
DOCUMENT = ROOT / "docs/docker.md"
OLDER = ROOT / "tests/jobs/older.py"


def steady(name: str) -> dict[str, object]:
    """A job of some tens of seconds that writes a checkpoint at every epoch; the same bits from the same threads."""
    data = {"dataset": "digits", "image_size": 16, "batch_size": 64}
    return tiny(name=name, data=data, model={"name": "resnet8"}, epochs=25, resources={"gpus": 0}, checkpoint={"keep_last": 2})


@pytest.fixture
def client(stack: Project) -> Iterator[Client]:
    with stack.client() as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(stack: Project) -> str:
    """sha256 of the weights of a job that nothing happened to."""
    with stack.client() as client:
        return weights(client, client.wait(client.submit(steady("undisturbed")).id, TRAINED_S))


def weights(client: Client, job: Job) -> str:
    assert job.state == "succeeded", job.reason
    return next(one.sha256 for one in client.checkpoints(job.id) if one.is_latest)


def under_way(client: Client, name: str) -> Job:
    """A job with at least four of its epochs behind it."""
    job = client.submit(steady(name))
    until(lambda: (client.get(job.id).progress.epoch or 0) >= 4, TRAINED_S, f"{name} has trained four epochs")
    assert not client.get(job.id).is_terminal, "nothing is left to disturb"
    return job


def test_a_first_job_gives_its_first_metric(stack: Project, client: Client) -> None:
    began = time.monotonic()
    job = client.submit(tiny(name="first"))
    until(lambda: bool(client.get(job.id).metrics.latest), TRAINED_S, "a metric")
    FIGURES.append(f"first job, POST to first metric: {time.monotonic() - began:.1f} s")
    assert client.wait(job.id, TRAINED_S).state == "succeeded"


@pytest.mark.parametrize("service", SERVICES)
def test_every_container_has_few_rights(stack: Project, service: str) -> None:
    found = stack.inspect(service)
    host = found["HostConfig"]
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"]) == (True, ["ALL"], False)
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert docker("exec", found["Id"], "id", "-u") != "0"
    assert "Read-only file system" in docker("exec", found["Id"], "sh", "-c", "touch /usr/here 2>&1 || true")
    assert docker("exec", found["Id"], "sh", "-c", "grep CapEff /proc/1/status").split()[-1] == "0000000000000000"


def test_only_the_api_is_published_and_on_loopback_only(stack: Project) -> None:
    published = {service: stack.inspect(service)["NetworkSettings"]["Ports"] for service in SERVICES}
    bound = {service: [each for one in ports.values() for each in one or ()] for service, ports in published.items()}
    assert bound == {"postgres": [], "redis": [], "worker-cpu": [], "api": [{"HostIp": "127.0.0.1", "HostPort": str(stack.port)}]}


@pytest.mark.parametrize("service", ["api", "worker-cpu"])
def test_the_doctor_finds_an_image_well(stack: Project, service: str) -> None:
    findings = json.loads(stack.compose("exec", "-T", service, "powergrad", "doctor", "--json"))
    assert {found["verdict"] for found in findings} <= {"ok", "note"}
    assert {"database", "broker", "memory", "disk"} <= {found["subject"] for found in findings}


def test_a_key_for_monitoring_is_made_as_the_document_says(stack: Project) -> None:
    command = next(line for one in blocks(DOCUMENT) for line in one.text.splitlines() if ".metrics-key" in line)
    stack.shell(command)
    key = (stack.folder / ".metrics-key").read_text().strip()
    told = httpx2.get(f"{stack.url}/metrics", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
    assert "powergrad_jobs{" in told.text
    assert httpx2.get(f"{stack.url}/metrics", trust_env=False).status_code == 401


def test_all_are_healthy(stack: Project) -> None:
    until(lambda: all(stack.inspect(one)["State"]["Health"]["Status"] == "healthy" for one in SERVICES), READY_S, "all healthy")


def events(stream: str) -> list[str]:
    """The types of a stream's events, in order."""
    return re.findall(r"^event: (\w+)$", stream, re.MULTILINE)


def test_the_readmes_tour(stack: Project, client: Client, tmp_path: Path) -> None:
    until(lambda: bool(client.models()), READY_S, "a worker has told what it can train")
    home = tmp_path / "home"
    home.mkdir()
    (home / ".curlrc").write_text(f'header = "Authorization: Bearer {stack.key}"\n')
    answers = walked(tmp_path, os.environ | {"POWERGRAD_URL": stack.url, "no_proxy": "127.0.0.1", "CURL_HOME": str(home)})
    for stop, said in zip(TOUR, answers, strict=False):
        told = settled(said.replace("\r", "").rstrip("\n"))
        if "event: " in (stop.answer or ""):
            # PostgreSQL keeps an object's members in an order of its own: their lines are not held against the README's
            kinds = iter(events(told))
            assert all(kind in kinds for kind in events(stop.answer or "")), told
            continue
        assert re.fullmatch(pattern(stop.answer or ""), told), f"{stop.commands}\nshown:\n{stop.answer}\nsaid:\n{told}"
    assert len(answers) == len(TOUR) + 1


def test_an_experiment_gives_its_verdict(client: Client) -> None:
    asked = client.ask({"name": "in-compose", "spec": tiny(epochs=2), "grid": {"loss.alpha": [1.0, 0.5]}, "seeds": 2})
    ended = asked.wait(TRAINED_S)
    assert ended.state == "succeeded"
    assert ended.verdict


@pytest.mark.parametrize("service", ["worker-cpu", "redis", "postgres", "api"])
def test_a_container_that_is_killed_costs_no_bit(stack: Project, client: Client, undisturbed: str, service: str) -> None:
    job = under_way(client, f"without-{service}")
    back = stack.kill(service)
    ready = until(stack.is_ready, READY_S, "/readyz says 200")
    ended = client.wait(job.id, TRAINED_S)
    FIGURES.append(f"{service} killed: started again after {back:.1f} s, ready {ready:.1f} s later, {ended.attempt} attempt(s)")
    assert weights(client, ended) == undisturbed


def test_a_worker_that_is_stopped_drains(stack: Project, client: Client, undisturbed: str) -> None:
    job = under_way(client, "drained")
    began = time.monotonic()
    worker = stack.container("worker-cpu")
    stack.compose("stop", "worker-cpu")
    FIGURES.append(f"`stop worker-cpu` with a job running: {time.monotonic() - began:.1f} s")
    assert docker("inspect", "--format", "{{.State.ExitCode}}", worker) == "0"
    waiting = client.get(job.id)
    assert (waiting.state, waiting.reason) == ("queued", None)
    stack.compose("start", "worker-cpu")
    assert weights(client, client.wait(job.id, TRAINED_S)) == undisturbed


def test_a_release_with_an_older_schema_is_upgraded_while_a_job_runs(stack: Project, client: Client, undisturbed: str) -> None:
    job = under_way(client, "upgraded")
    stack.compose("stop", "api", "worker-cpu")
    older = "\nimport os\nmake_older(Store(os.environ['POWERGRAD_DATABASE_URL']))\n"
    stack.compose("run", "--rm", "--no-deps", "-T", "migrate", "python", "-", stdin=OLDER.read_text() + older)
    FIGURES.append(f"`up -d` onto the oldest release's tables, to /readyz: {stack.up():.1f} s")
    assert weights(client, client.wait(job.id, TRAINED_S)) == undisturbed


def test_a_backup_made_meanwhile_goes_on_elsewhere(stack: Project, client: Client, undisturbed: str, tmp_path: Path) -> None:
    backup, restore = (next(one.text for one in blocks(DOCUMENT) if one.mark == mark) for mark in ("backup", "restore"))
    ended, job = client.submit(tiny(name="ended")), under_way(client, "backed-up")
    stack.shell(backup)
    stack.compose("stop")  # the machine is gone
    other = stack.again("powergrad-restored", tmp_path)
    try:
        began = time.monotonic()
        other.shell(restore)
        until(other.is_ready, READY_S, "/readyz says 200")
        FIGURES.append(f"restored into an empty stack in {time.monotonic() - began:.1f} s")
        with other.client() as restored:
            assert weights(restored, restored.wait(job.id, TRAINED_S)) == undisturbed
            assert restored.get(ended.id).name == "ended"
    finally:
        other.down()
        stack.up()


def test_down_leaves_nothing(stack: Project) -> None:
    stack.down()
    try:
        of_ours = f"label=com.docker.compose.project={stack.name}"
        assert docker("ps", "-aq", "--filter", of_ours) == docker("volume", "ls", "-q", "--filter", of_ours) == ""
        assert docker("network", "ls", "-q", "--filter", of_ours) == ""
    finally:
        stack.up()
