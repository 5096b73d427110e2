"""Row 20: wrong, revoked and expired keys and another owner's, tried on a whole stack while it trains, and what is left of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from powergrad.client import ApiError, Client, Retries
from powergrad.jobs import keys
from tests.faults.conftest import Site, gone
from tests.jobs.builders import do
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400), pytest.mark.row(20)]

PATIENT = Retries(count=60, first_s=0.1, cap_s=0.5)
STOPS_WITHIN_S = 10.0  # one second is the rule; tests.api holds it to that where nothing else runs


def status_of(client: Client, job_id: str) -> int:
    try:
        client.get(job_id)
    except ApiError as error:
        return error.status
    return 200


def files_with(folder: Path, secrets: list[bytes]) -> Iterator[Path]:
    """Every file below the folder, databases and weights too, that has one of the secrets in it."""
    for path in folder.rglob("*"):
        if path.is_file() and any(secret in path.read_bytes() for secret in secrets):
            yield path


def spoken(process: psutil.Process) -> bytes:
    """What any user of the machine, and who debugs, can see of a process from outside."""
    try:
        return b"".join(Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
    except (FileNotFoundError, ProcessLookupError):
        return b""  # a trainer that has just ended


def test_a_stack_with_keys_opens_to_those_that_work_and_keeps_none(new_site: Callable[..., Site]) -> None:
    site = new_site()
    url = site.client.base_url
    first, doomed, bens = (do(site.store, keys.create, owner=owner) for owner in ("ada", "ada", "ben"))
    brief = do(site.store, keys.create, owner="ada", ttl_s=0.001)
    wrong = f"{first[:-1]}{'A' if first[-1] != 'A' else 'B'}"
    with httpx2.Client(base_url=url, trust_env=False) as http:
        until(lambda: http.get("/v1/jobs").status_code == 401)  # the keys are new to the running server
        site.client.close()
        site.client = Client(url, api_key=first, retries=PATIENT)
        job_id = site.submit(epochs=4)
        site.until_step(job_id, 1)

        for key, expected in ((wrong, 401), (brief, 401), (bens, 404), (doomed, 200), ("", 401)):
            with Client(url, api_key=key or "none", retries=0) as other:
                assert status_of(other, job_id) == expected
        cookie = http.post("/v1/session", json={"key": doomed}).cookies["powergrad_session"]
        assert http.get(f"/v1/jobs/{job_id}").status_code == 200
        do(site.store, keys.revoke, doomed)
        until(lambda: http.get(f"/v1/jobs/{job_id}").status_code == 401, within_s=STOPS_WITHIN_S)

        api = site.the("powergrad: api")
        api.kill()
        until(lambda: gone(api))
        until(lambda: site.ask(lambda: site.client.get(job_id)))
        for key, expected in ((wrong, 401), (doomed, 401), (bens, 404)):
            with Client(url, api_key=key, retries=PATIENT) as other:
                assert status_of(other, job_id) == expected, "a new process knows the same"
        http.post("/v1/jobs", content=json.dumps({"name": wrong})[:-1], headers={"Content-Type": "application/json"})
        titles = b"".join(spoken(process) for process in site.processes())

    assert site.until_state(job_id, "succeeded", "failed").state == "succeeded"
    site.check_history(job_id)
    assert site.stop() == 0
    secrets = [key.split("_", 2)[2].encode() for key in (first, doomed, bens, brief, wrong)] + [cookie.removeprefix("pgs_").encode()]
    assert list(files_with(site.data_dir.parent, secrets)) == []
    assert not any(secret in titles for secret in secrets)
