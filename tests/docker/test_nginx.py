"""docker/nginx.conf as it stands, in a real nginx before a real API: streams, resumption, uploads, long polls."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from powergrad import protocol
from powergrad.cli.stack import ask, free_port
from powergrad.client import Client, Retries
from powergrad.jobs.store import Store
from tests.faults.api_process import ApiProcess
from tests.jobs import builders
from tests.worker.conftest import until

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
CONFIGURATION = Path(__file__).parents[2] / "docker" / "nginx.conf"
DEADLINE_S = 60.0

pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx here: scripts/nginx-check brings one")


@dataclass
class Site:
    """The API, and nginx before it at `url`."""

    api: ApiProcess
    store: Store
    url: str
    http: httpx2.Client


def configured(folder: Path, *, port: int, api_port: int) -> Path:
    """The sample with what an operator changes, and paths that an unprivileged user may write."""
    text = CONFIGURATION.read_text()
    changes = [
        ("server 127.0.0.1:8642;", f"server 127.0.0.1:{api_port};"),
        ("listen 80;\n        server_name", f"listen 127.0.0.1:{port};\n        server_name"),
        ("access_log /var/log/nginx/powergrad.log powergrad;", f"access_log {folder}/access.log powergrad;"),
    ]
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    text = text.replace("http {", "http {\n" + "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds), 1)
    path = folder / "nginx.conf"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def site(sqlite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    assert NGINX is not None
    folder = tmp_path_factory.mktemp("nginx")
    store = Store("sqlite:///" + str(shutil.copy(sqlite_file, folder / "jobs.db")))
    api, port = ApiProcess(folder, store, {"POWERGRAD_PING_S": "1"}), free_port("127.0.0.1")
    configuration = configured(folder, port=port, api_port=api.port)
    globally = f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;" + (" user root;" if os.getuid() == 0 else "")
    api.start()
    nginx = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(configuration), "-e", f"{folder}/error.log", "-g", globally])
    try:
        until(lambda: nginx.poll() is not None or ask("127.0.0.1", port, "/healthz")[0] == 200, within_s=DEADLINE_S)
        assert nginx.poll() is None, (folder / "error.log").read_text()
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=DEADLINE_S) as http:
            yield Site(api, store, f"http://127.0.0.1:{port}", http)
    finally:
        nginx.send_signal(signal.SIGTERM)
        nginx.wait(DEADLINE_S)
        api.kill()
        store.close()


def test_each_event_comes_through_before_the_next_is_made(site: Site) -> None:
    run = builders.running(site.store)
    with Client(site.url) as client:
        events = client.stream(run.job_id)
        assert [event.type for event in islice(events, 3)] == ["created", "claimed", "state"]
        for number in range(10):
            builders.record(site.store, run, protocol.Note(detail=str(number)))
            assert next(events).data["detail"] == str(number)
        builders.finish(site.store, run)
        assert [event.type for event in events][-1] == "state"


def test_a_stream_and_a_log_go_on_after_the_api_was_killed_behind_the_proxy(site: Site) -> None:
    run = builders.running(site.store)
    folder = site.api.folder / f"jobs/{run.job_id}/logs"
    folder.mkdir(parents=True)
    log = folder / "a1.log"
    log.write_text("before\n")
    heard: list[int] = []
    read: list[str] = []
    patient = Retries(count=200, cap_s=0.5)

    def stream() -> None:
        with Client(site.url, retries=patient) as client:
            heard.extend(event.seq for event in client.stream(run.job_id))

    def follow() -> None:
        with Client(site.url, retries=patient) as client:
            read.extend(client.follow_logs(run.job_id))

    readers = [threading.Thread(target=work) for work in (stream, follow)]
    for reader in readers:
        reader.start()
    until(lambda: len(heard) == 3 and read, within_s=DEADLINE_S)
    site.api.kill()
    builders.record(site.store, run, protocol.Note(detail="while it was away"))
    with log.open("a") as file:
        file.write("after\n")
    away = until(lambda: (answer := site.http.get(f"/v1/jobs/{run.job_id}")).status_code == 503 and answer, within_s=DEADLINE_S)
    assert (away.headers["content-type"], away.json()["code"]) == ("application/problem+json", "unavailable")
    assert float(away.headers["retry-after"]) > 0
    site.api.start()
    builders.finish(site.store, run)
    for reader in readers:
        reader.join(DEADLINE_S)
    assert heard == builders.event_numbers(site.store, run.job_id)
    assert "".join(read) == "before\nafter\n"


def test_a_quiet_stream_says_ping_through_the_proxy(site: Site) -> None:
    run = builders.running(site.store)
    with site.http.stream("GET", f"/v1/jobs/{run.job_id}/events", headers={"Accept": "text/event-stream"}) as answer:
        assert any(line.startswith(": ping") for line in answer.iter_lines())


@pytest.mark.parametrize(
    ("path", "size", "code"),
    [
        ("/v1/predict/job_00000000000000000000000000", 20_000_000, "job_not_found"),  # taken whole; the job is what is wrong
        ("/v1/predict/job_00000000000000000000000000", 20_000_001, "too_large"),  # by the API
        ("/v1/predict/job_00000000000000000000000000", 25_000_000, "too_large"),  # by the proxy
        ("/v1/jobs", 1 << 20, "malformed"),
        ("/v1/jobs", (1 << 20) + 1, "too_large"),
        ("/v1/jobs", 3 << 20, "too_large"),
    ],
)
def test_bodies_up_to_the_limits_come_through_and_larger_ones_are_refused_in_one_form(site: Site, path: str, size: int, code: str) -> None:
    kind = "image/png" if "predict" in path else "application/json"
    answer = site.http.post(path, content=b"x" * size, headers={"Content-Type": kind})
    assert (answer.headers["content-type"], answer.json()["code"]) == ("application/problem+json", code)
    assert answer.status_code == answer.json()["status"]


def test_an_archive_larger_than_any_other_body_comes_through(site: Site) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number, side in enumerate((1700, 1701, 1702, 1703)):
            picture = io.BytesIO()
            Image.frombytes("RGB", (side, side), random.Random(number).randbytes(3 * side * side)).save(picture, "PNG", compress_level=0)
            archive.writestr(f"{'ab'[number % 2]}/{number}.png", picture.getvalue())
    assert len(packed.getvalue()) > 30_000_000
    answer = site.http.post(
        "/v1/datasets", params={"name": "noise"}, content=packed.getvalue(), headers={"Content-Type": "application/zip"}
    )
    assert answer.status_code == 202, answer.text
    assert answer.json()["name"] == "noise"


def test_a_long_poll_is_answered_by_the_change_or_when_its_time_is_over(site: Site) -> None:
    run = builders.running(site.store)
    path = f"/v1/jobs/{run.job_id}"
    etag = site.http.get(path).headers["etag"]
    begun = time.monotonic()
    assert site.http.get(path, params={"wait": 1.5}, headers={"If-None-Match": etag}).status_code == 304
    assert time.monotonic() - begun >= 1.5
    answers: list[httpx2.Response] = []
    waiting = threading.Thread(
        target=lambda: answers.append(site.http.get(path, params={"wait": 60}, headers={"If-None-Match": etag}, timeout=90))
    )
    waiting.start()
    until(lambda: site.api.streams() > 0, within_s=DEADLINE_S)
    builders.finish(site.store, run)
    waiting.join(DEADLINE_S)
    assert answers[0].json()["state"] == "succeeded"


def test_the_proxy_waits_longer_than_the_longest_poll_and_closes_kept_connections_before_the_api() -> None:
    text = re.sub(r"#.*", "", CONFIGURATION.read_text())
    assert int(re.findall(r"proxy_read_timeout (\d+)s", text)[0]) > 60
    kept = re.search(r"keepalive 32;\s+keepalive_timeout (\d+)s", text)
    assert kept is not None
    assert int(kept[1]) < 75


def test_what_the_proxy_says_itself_is_json() -> None:
    for found in re.findall(r"return \d+ '(.*)';", CONFIGURATION.read_text()):
        assert json.loads(found)["detail"]
