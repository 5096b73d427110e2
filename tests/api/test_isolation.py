"""One owner's key never shows, touches or names what is another's; asked of every operation in the OpenAPI document.

A new route is asked the same. One with a parameter that OWNED, PUBLIC and OF_ADMINS do not know, or with a body that BODIES cannot give it,
fails here until it is said whose the thing is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import httpx2
import pytest
from sqlalchemy import select

from api.errors import MEDIA_TYPE
from powergrad.jobs.keys import Scope
from powergrad.jobs.store import Store
from powergrad.jobs.tables import deletions, metadata
from tests.api.callers import WORD, Possessions, bearer, calling, made, possessions
from tests.api.conftest import DIGITS, Api, register_worker
from tests.jobs import builders

ANNA, BEN = "anna", "ben"
SAFE = {"get", "head"}

OWNED: dict[str, Any] = {
    "jobs/{job_id}": lambda anna: [anna.ended, anna.queued],
    "predict/{job_id}": lambda anna: [anna.ended],
    "checkpoints/{checkpoint_id}": lambda anna: [anna.checkpoint, "best"],
    "artifacts/{name}": lambda anna: [anna.artifact],
    "tasks/{task_id}": lambda anna: [anna.task],
    "datasets/{name}": lambda anna: [anna.dataset],
    "deliveries/{delivery_id}": lambda anna: [anna.delivery],
    "experiments/{experiment_id}": lambda anna: [anna.experiment],
}
"""What a path names, by the words before and in the braces: Anna's, the first the one that every operation knows."""
PUBLIC = {"presets/{name}": ["digits-resnet18-pgt"]}
"""The same for everybody."""
OF_ADMINS = {"keys/{key_id}": ["000000000000"], "owners/{owner}": [ANNA]}
"""For admins, whoever owns it."""

OPEN = {"isAlive", "isReady", "signIn"}
"""Operations that ask for no key; the documentation's pages, which are no operations, do not either."""
HARMLESS = {"signOut"}
"""Operations that a key which may only look may call, though they change something: its own session."""

PARTLY_OF_ADMINS = {"createDataset"}
"""Operations that some bodies make an admin's: a set may be uploaded by everybody, a folder of the server's registered by admins."""

IMAGE = ("image/png", b"\x89PNG made up")
BODIES: dict[str, dict[str, Any]] = {
    "createJob": DIGITS,
    "updateJob": {"notes": "Ben was here"},
    "signIn": {"key": "pg_no"},
    "setQuota": {"queued": 0},
    "createExperiment": {"spec": DIGITS, "grid": {"loss.alpha": [1.0, 0.5]}, "seeds": 1},
    "updateExperiment": {"notes": "Ben was here"},
    "addSeeds": {"count": 1},
    "testWebhook": {"url": "https://example.com/"},
    **{name: {"ids": ["job_00000000000000000000000000"]} for name in ("cancelJobs", "pauseJobs", "resumeJobs", "deleteJobsById")},
}
"""JSON bodies that keep every rule, for operations that do not take an empty object."""


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    id: str
    media_types: tuple[str, ...]

    @property
    def is_safe(self) -> bool:
        return self.method in SAFE

    @property
    def named(self) -> list[str]:
        """What its path names, as OWNED, PUBLIC and OF_ADMINS call it."""
        return re.findall(r"[^/]+/\{[^}]+\}", self.path)

    @property
    def is_owned(self) -> bool:
        return any(name in OWNED for name in self.named)

    def paths(self, anna: Possessions) -> list[str]:
        """Its path for each of what Anna has. Fails for a parameter that nobody has said anything about."""
        choices = []
        for name in self.named:
            values = OWNED[name](anna) if name in OWNED else (PUBLIC | OF_ADMINS).get(name)
            assert values is not None, f"{self.method.upper()} {self.path}: say in OWNED, PUBLIC or OF_ADMINS whose {name} is"
            choices.append([(name, value) for value in values])
        found = []
        for chosen in product(*choices):
            path = self.path
            for name, value in chosen:
                path = path.replace(name, f"{name.partition('/')[0]}/{value}", 1)
            assert "{" not in path, f"{self.path}: a parameter without a word before it"
            found.append(path)
        return found

    def ask(self, http: httpx2.Client, path: str) -> httpx2.Response:
        if self.is_safe or not self.media_types:
            return http.request(self.method.upper(), path)
        if "application/json" in self.media_types:
            return http.request(self.method.upper(), path, json=BODIES.get(self.id, {}))
        kind, content = IMAGE if IMAGE[0] in self.media_types else (self.media_types[0], b"PK\x05\x06" + bytes(18))  # an empty zip
        return http.request(self.method.upper(), path, content=content, headers={"Content-Type": kind})

    def __str__(self) -> str:
        return f"{self.id}: {self.method.upper()} {self.path}"


def operations(api: Api) -> list[Operation]:
    found = [
        Operation(method, path, said["operationId"], tuple(said.get("requestBody", {}).get("content", ())))
        for path, item in api.app.openapi()["paths"].items()
        for method, said in item.items()
        if method != "parameters"
    ]
    assert len(found) >= 40
    return found


@dataclass(frozen=True)
class Two:
    """A server with Anna, who has everything, and Ben, who has nothing."""

    api: Api
    anna: Possessions
    annas: httpx2.Client
    bens: httpx2.Client
    ben_looks: httpx2.Client
    ben_rules: httpx2.Client
    nobodys: httpx2.Client

    @property
    def operations(self) -> list[Operation]:
        return operations(self.api)


@pytest.fixture
def two(any_api: Api) -> Iterator[Two]:
    register_worker(any_api.store, models=["resnet18"])
    anna = possessions(any_api, ANNA)
    shown = (made(any_api, ANNA), made(any_api, BEN), made(any_api, BEN, Scope.READ), made(any_api, BEN, Scope.ADMIN), None)
    clients = [calling(any_api, key) for key in shown]
    annas, bens, ben_looks, ben_rules, nobodys = (client.__enter__() for client in clients)
    yield Two(any_api, anna, annas, bens, ben_looks, ben_rules, nobodys)
    for client in clients:
        client.__exit__(None, None, None)


def hers(store: Store, anna: Possessions) -> list[str]:
    """Every row that names Anna or what she has, in every table but that of files to be freed, which the sweeper empties."""
    words = (ANNA, WORD, *anna.ids)
    with store.read() as tx:
        rows = [f"{table.name}: {row}" for table in metadata.sorted_tables if table is not deletions for row in tx.all(select(table))]
    return sorted(row for row in rows if any(word in row for word in words))


def test_every_operation_asks_for_a_key(two: Two) -> None:
    for operation in two.operations:
        answer = operation.ask(two.nobodys, operation.paths(two.anna)[0])
        if operation.id in OPEN:
            assert answer.status_code != 403, operation
            assert answer.status_code != 401 or operation.id == "signIn", operation
        else:
            assert answer.status_code == 401, operation
            assert answer.headers["www-authenticate"] == 'Bearer realm="powergrad"', operation
            if operation.method != "head":
                assert (answer.headers["content-type"], answer.json()["code"]) == (MEDIA_TYPE, "unauthenticated"), operation


@pytest.mark.parametrize("path", ["/", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json", "/healthz"])
def test_what_shows_nothing_of_anybodys_asks_for_none(two: Two, path: str) -> None:
    assert two.nobodys.get(path).status_code == 200


def test_a_path_that_is_not_there_tells_nobody_so_without_a_key(two: Two) -> None:
    assert two.nobodys.get("/v1/nothing").status_code == 401
    assert two.bens.get("/v1/nothing").status_code == 404


def test_what_is_anothers_is_not_there_and_stays_as_it_is(two: Two) -> None:
    before = hers(two.api.store, two.anna)
    tried = 0
    for operation in two.operations:
        if not operation.is_owned:
            continue
        for path in operation.paths(two.anna):
            for http in (two.bens, two.ben_rules):  # whoever manages keys sees no more jobs for it
                answer = operation.ask(http, path)
                hint = f"{operation} answers {answer.status_code}: 422 may mean that BODIES needs a body for it. {answer.text[:300]}"
                assert answer.status_code == 404, hint
                assert WORD not in answer.text.replace(two.anna.dataset, ""), operation
                tried += 1
    assert tried >= 60
    assert hers(two.api.store, two.anna) == before


def test_what_is_ones_own_is_there(two: Two) -> None:
    """Or the test above would hold for a server that answers 404 to everything."""
    for operation in two.operations:
        if operation.is_owned and operation.is_safe:
            answer = operation.ask(two.annas, operation.paths(two.anna)[0])
            assert answer.status_code == 200, (operation, answer.text[:300])


def test_no_answer_holds_what_is_anothers(two: Two) -> None:
    for operation in two.operations:
        if operation.method == "get" and not operation.is_owned:
            for path in operation.paths(two.anna):
                heard = operation.ask(two.bens, path).text
                assert not any(word in heard for word in (WORD, *two.anna.ids)), operation


def test_what_belongs_to_nobody_in_particular_changes_nothing_of_anothers(two: Two) -> None:
    before = hers(two.api.store, two.anna)
    for operation in two.operations:
        if not operation.is_safe and not operation.is_owned:
            for path in operation.paths(two.anna):
                answer = operation.ask(two.bens, path)
                forbidden = any(name in OF_ADMINS for name in operation.named) or operation.path == "/v1/keys"
                if operation.id not in PARTLY_OF_ADMINS:
                    assert (answer.status_code == 403) == forbidden, (operation, answer.text[:300])
                assert answer.status_code < 500, operation
    assert hers(two.api.store, two.anna) == before


def test_a_key_that_may_only_look_changes_nothing(two: Two) -> None:
    before = hers(two.api.store, two.anna)
    for operation in two.operations:
        if operation.is_safe or operation.id in OPEN | HARMLESS:
            continue
        for path in operation.paths(two.anna):
            answer = operation.ask(two.ben_looks, path)
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden_scope"), operation
    assert hers(two.api.store, two.anna) == before


def test_only_an_admin_manages(two: Two) -> None:
    of_admins = [one for one in two.operations if one.path == "/v1/keys" or any(name in OF_ADMINS for name in one.named)]
    assert len(of_admins) >= 5
    for operation in of_admins:
        path = operation.paths(two.anna)[0]
        assert operation.ask(two.bens, path).status_code == 403, operation
        assert operation.ask(two.ben_rules, path).status_code != 403, operation


def test_an_idempotency_key_is_its_owners_own(two: Two) -> None:
    headers = {"Idempotency-Key": "annas-key"}
    answer = two.bens.post("/v1/jobs", json={**DIGITS, "seed": 7}, headers=headers)
    assert answer.status_code == 202, "Anna has used this key for another body"
    assert "Idempotency-Replayed" not in answer.headers
    assert two.bens.post("/v1/jobs", json={**DIGITS, "seed": 7}, headers=headers).json()["id"] == answer.json()["id"]


@pytest.mark.parametrize("suffix", ["", "/best", "/latest", "/step-00000010"])
@pytest.mark.parametrize("query", ["", "?dry_run=true"])
def test_nobody_starts_from_anothers_weights(two: Two, suffix: str, query: str) -> None:
    before = hers(two.api.store, two.anna)
    spec = {**DIGITS, "model": {"init_from": two.anna.ended + suffix}}
    answer = two.bens.post(f"/v1/jobs{query}", json=spec)
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_reference")
    assert hers(two.api.store, two.anna) == before, "a pin would tell, and keep her disk full"
    assert two.annas.post(f"/v1/jobs{query}", json=spec).status_code in (200, 202)


def test_nobody_clones_with_anothers_weights(two: Two) -> None:
    mine = two.bens.post("/v1/jobs", json=DIGITS).json()["id"]
    changed = {"set": {"model.init_from": f"{two.anna.ended}/best"}}
    answer = two.bens.post(f"/v1/jobs/{mine}/clone", json=changed)
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_reference")
    for body in ({}, {"from_checkpoint": "best"}):
        assert two.bens.post(f"/v1/jobs/{two.anna.ended}/clone", json=body).json()["code"] == "job_not_found"


def test_nobody_trains_on_anothers_set_or_hears_of_it(two: Two) -> None:
    for name in (two.anna.dataset, f"{two.anna.dataset[:-1]}x"):  # the second asks for a guess
        answer = two.bens.post("/v1/jobs", json={"data": {"dataset": name}})
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_reference")
        assert f"mean {two.anna.dataset!r}" not in answer.text
    assert two.annas.post("/v1/jobs", json={"data": {"dataset": two.anna.dataset}}).status_code == 202


def test_a_stream_and_a_followed_log_of_anothers_are_not_there(two: Two) -> None:
    for job_id in (two.anna.ended, two.anna.queued):
        stream = two.bens.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
        follow = two.bens.get(f"/v1/jobs/{job_id}/logs", params={"follow": "true"})
        wait = two.bens.get(f"/v1/jobs/{job_id}", params={"wait": 30})
        assert {answer.status_code for answer in (stream, follow, wait)} == {404}


def test_anothers_job_is_no_place_to_page_from(two: Two) -> None:
    mine = two.bens.post("/v1/jobs", json=DIGITS).json()["id"]
    sorted_by_score = two.bens.get("/v1/jobs", params={"after": two.anna.ended, "sort": "-metrics.val_top1"})
    nobodys = two.bens.get("/v1/jobs", params={"after": "job_00000000000000000000000000", "sort": "-metrics.val_top1"})
    assert sorted_by_score.status_code == nobodys.status_code == 404
    assert sorted_by_score.text.replace(two.anna.ended, "job_00000000000000000000000000") == nobodys.text
    listed = two.bens.get("/v1/jobs").json()["data"]
    assert [job["id"] for job in listed] == [mine]


def test_filters_find_only_ones_own(two: Two) -> None:
    for params in ({"label.word": WORD}, {"q": WORD}, {"q": two.anna.ended}, {"state": "succeeded"}):
        assert two.bens.get("/v1/jobs", params=params).json()["data"] == []
        assert len(two.annas.get("/v1/jobs", params=params).json()["data"]) >= 1


@pytest.mark.parametrize("action", ["cancel", "pause", "resume", "delete"])
def test_a_bulk_move_leaves_anothers(two: Two, action: str) -> None:
    before = hers(two.api.store, two.anna)
    answer = two.bens.post(f"/v1/jobs/{action}", json={"ids": [two.anna.queued, two.anna.ended]}).json()
    assert answer["done"] == []
    assert [(one["id"], one["code"]) for one in answer["refused"]] == [
        (two.anna.queued, "job_not_found"),
        (two.anna.ended, "job_not_found"),
    ]
    assert hers(two.api.store, two.anna) == before


def test_bulk_deletion_leaves_anothers(two: Two) -> None:
    mine = two.bens.post("/v1/jobs", json=DIGITS).json()["id"]
    two.bens.post(f"/v1/jobs/{mine}/cancel")
    before = hers(two.api.store, two.anna)
    for params in ({"state": "succeeded"}, {"state": "cancelled"}, {"label.word": WORD, "state": "succeeded"}):
        assert two.bens.delete("/v1/jobs", params=params).status_code < 500
    assert hers(two.api.store, two.anna) == before
    assert two.bens.get(f"/v1/jobs/{mine}").status_code == 404, "it deletes at all"


def test_a_worker_does_not_tell_whose_job_it_runs(any_api: Api) -> None:
    store = any_api.store
    register_worker(store)
    builders.submit(store, owner=ANNA)
    run = builders.claimed(store, replace(builders.OFFER, worker="host:1")).run
    for owner, scope, seen, others in ((ANNA, Scope.READ, [run.job_id], 0), (BEN, Scope.READ, [], 1), (BEN, Scope.ADMIN, [run.job_id], 0)):
        with calling(any_api, made(any_api, owner, scope)) as http:
            (worker,) = http.get("/v1/workers").json()["data"]
            assert (worker["running"], worker["others"]) == (seen, others), "that it is busy, and no more"


def test_keys_are_looked_at_in_every_way_of_writing_the_path(two: Two) -> None:
    """The border reads the path that the router reads."""
    for path in ("/v1/jobs", "/v1/%6Aobs", "/%76%31/jobs", "/v1/jobs?x=/healthz"):
        answer = httpx2.get(f"{two.api.url}{path}", trust_env=False)
        assert answer.status_code == 401, path
    odd = httpx2.get(f"{two.api.url}//v1/jobs", headers=bearer(made(two.api, BEN)), trust_env=False)
    assert odd.status_code == 404
