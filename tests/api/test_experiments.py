"""/v1/experiments over either database: questions in, jobs made, moves of the whole, files out."""

from __future__ import annotations

import re
import time
from typing import Any

import httpx2
import pytest
from sqlalchemy import Engine, event, select, update

from api import experiment_documents as documents
from api.routes.experiments import FILES
from api.tailer import EXPERIMENTS_S
from powergrad.jobs import quotas
from powergrad.jobs.tables import experiment_runs, experiments, jobs, tasks
from tests.api.callers import give_report
from tests.api.conftest import Api, register_worker, until
from tests.jobs import builders

DIGITS = {"data": {"dataset": "digits"}, "epochs": 2}
ALPHAS = {"spec": DIGITS, "grid": {"loss.alpha": [1.0, 0.5]}, "seeds": 2}
URL = "/v1/experiments"


def ask(api: Api, question: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    answer = api.http.post(URL, json={**(question or ALPHAS), **changes})
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refused(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    problem: dict[str, Any] = answer.json()
    return problem


def jobs_of(api: Api, experiment_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.http.get("/v1/jobs", params={"experiment": experiment_id, "limit": 100}).json()["data"]
    return found


def test_a_question_makes_a_job_per_arm_and_seed(any_api: Api) -> None:
    found = ask(any_api)
    documents.ExperimentDocument.model_validate(found)
    assert (found["state"], found["stage"], found["verdict"], found["baseline"]) == ("queued", "verdict", None, 0)
    assert [arm["settings"] for arm in found["arms"]] == [{"loss.alpha": 1.0}, {"loss.alpha": 0.5}]
    made = jobs_of(any_api, found["id"])
    assert sorted((job["spec"]["loss"]["alpha"], job["spec"]["seed"]) for job in made) == [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]
    assert found["progress"] | {"eta_s": None} == {"fraction": 0.0, "runs_done": 0, "runs": 4, "eta_s": None}


def test_the_answer_says_where_it_is_and_when_to_look(api: Api) -> None:
    answer = api.http.post(URL, json=ALPHAS)
    assert answer.headers["location"] == f"{URL}/{answer.json()['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    again = api.http.get(answer.headers["location"], headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304


def test_a_dry_run_says_what_would_be_run_and_stores_nothing(any_api: Api) -> None:
    answer = any_api.http.post(URL, json={**ALPHAS, "tune": {"optimizer.lr": [0.05, 0.1]}}, params={"dry_run": "true"})
    assert answer.status_code == 200
    plan = documents.PlanDocument.model_validate_json(answer.content)
    assert [arm.label for arm in plan.arms] == ["α = 1", "α = 0.5"]
    assert (plan.runs, plan.epochs, plan.seeds, len(plan.tuning_seeds)) == (8, 16, [0, 1], 1)
    assert set(plan.seeds) & set(plan.tuning_seeds) == set()
    with any_api.store.read() as tx:
        assert tx.all(select(experiments.c.id)) == tx.all(select(jobs.c.id)) == []


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"grid": {"loss.alpha": [1.0, 1.4]}}, "/grid/loss.alpha/1"),
        ({"spec": {**DIGITS, "epochs": 0}}, "/spec/epochs"),
        ({"tune": {"optimizer.lr": [-1.0]}}, "/tune/optimizer.lr/0"),
        ({"baseline": {"loss.alpha": 0.3}}, "/baseline"),
        ({"seeds": 0}, "/seeds"),
        ({"grid": {"seed": [1, 2]}}, "/grid/seed"),
        ({"sedes": 3}, "/sedes"),
    ],
)
def test_a_question_that_breaks_a_rule_is_refused_with_the_place(api: Api, change: dict[str, Any], pointer: str) -> None:
    problem = refused(api.http.post(URL, json={**ALPHAS, **change}), 422, "invalid_spec")
    assert pointer in {one["pointer"] for one in problem["errors"]}


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_a_metric_that_no_job_gives_breaks_a_rule(api: Api, dry_run: str) -> None:
    answer = api.http.post(URL, json={**ALPHAS, "metric": "val_tpo1"}, params={"dry_run": dry_run})
    (error,) = refused(answer, 422, "invalid_spec")["errors"]
    assert (error["pointer"], error["code"]) == ("/metric", "unknown_value")
    assert error["detail"].startswith("must be one of: val_top1, ")
    assert "did you mean 'val_top1'" in error["detail"]


@pytest.mark.parametrize(
    ("change", "pointer", "meant"),
    [
        ({"grid": {"loss.alhpa": [1.0, 0.5]}}, "/grid/loss.alhpa", "alpha"),
        ({"grid": {"lr": [0.1, 0.2]}}, "/grid/lr", "optimizer.lr"),
        ({"tune": {"optimiser.lr": [0.1, 0.2]}}, "/tune/optimiser.lr", "optimizer.lr"),
        ({"sedes": 3}, "/sedes", "seeds"),
        ({"spec": {**DIGITS, "epoch": 3}}, "/spec/epoch", "epochs"),
        ({"grid": {}, "strategy": "random", "space": {"loss.alpha": {"lo": 0.1, "high": 1.0}}}, "/space/loss.alpha/lo", "low"),
    ],
)
def test_a_field_that_is_none_comes_with_the_one_that_was_meant(api: Api, change: dict[str, Any], pointer: str, meant: str) -> None:
    problem = refused(api.http.post(URL, json={**ALPHAS, **change}), 422, "invalid_spec")
    told = {one["pointer"]: one["detail"] for one in problem["errors"]}
    assert f"; did you mean {meant!r}?" in told[pointer]


def test_names_are_looked_up_in_every_part_of_a_question(api: Api) -> None:
    register_worker(api.store, models=["resnet18", "resnet8"])
    problem = refused(api.http.post(URL, json={**ALPHAS, "grid": {"model.name": ["resnet18", "resnet9"]}}), 404, "unknown_reference")
    assert problem["errors"][0]["pointer"] == "/grid/model.name/1"
    refused(api.http.post(URL, json={**ALPHAS, "spec": {"data": {"dataset": "mine"}}}), 404, "unknown_reference")
    assert api.http.post(URL, json={**ALPHAS, "grid": {"model.name": ["resnet18", "resnet8"]}}).status_code == 202


def with_checkpoint(api: Api) -> str:
    run = builders.running(api.store)
    builders.record(api.store, run, builders.plan(), builders.step(20), builders.checkpoint(10, 0.5), builders.checkpoint(20, 0.4))
    builders.finish(api.store, run)
    return run.job_id


def test_a_dry_run_says_what_references_mean_now(any_api: Api) -> None:
    origin = with_checkpoint(any_api)
    question = {
        "spec": {**DIGITS, "model": {"name": "resnet8", "init_from": f"{origin}/best"}},
        "grid": {"model.init_from": [f"{origin}/latest", None]},
        "seeds": 1,
    }
    answer = any_api.http.post(URL, json=question, params={"dry_run": "true"})
    plan = documents.PlanDocument.model_validate_json(answer.content)
    assert answer.json()["spec"]["spec"]["model"]["init_from"] == f"{origin}/step-00000010"
    assert [arm.pinned for arm in plan.arms] == [{"model.init_from": f"{origin}/step-00000020"}, {}]
    made = jobs_of(any_api, ask(any_api, question)["id"])
    assert {job["spec"]["model"]["init_from"] for job in made} == {f"{origin}/step-00000020", None}


@pytest.mark.parametrize("dry_run", ["true", "false"])
@pytest.mark.parametrize("section", ["grid", "tune", "space"])
def test_what_is_named_in_vain_is_told_where_it_was_written(any_api: Api, section: str, dry_run: str) -> None:
    missing, unready = "job_01KAQZ5V3N8T4W6Y7C9E1G2H3J", any_api.submit()["id"]
    values = [None, missing, f"{unready}/latest"]
    question = {
        "grid": {"spec": DIGITS, "grid": {"model.init_from": values}},
        "tune": {**ALPHAS, "tune": {"model.init_from": values}},
        "space": {"spec": DIGITS, "strategy": "random", "space": {"model.init_from": {"values": values}}},
    }[section]
    problem = refused(any_api.http.post(URL, json=question, params={"dry_run": dry_run}), 409, "reference_not_ready")
    at = f"/{section}/model.init_from" + ("/values" if section == "space" else "")
    assert {one["pointer"]: one["code"] for one in problem["errors"]} == {f"{at}/1": "not_found", f"{at}/2": "no_checkpoint"}


def test_a_webhook_that_may_not_be_called_is_refused_in_its_place(api: Api) -> None:
    spec = {**DIGITS, "webhook": {"url": "http://169.254.169.254/"}}
    problem = refused(api.http.post(URL, json={**ALPHAS, "spec": spec}), 422, "invalid_spec")
    assert problem["errors"][0]["pointer"] == "/spec/webhook/url"


def test_a_key_asks_once(any_api: Api) -> None:
    headers = {"Idempotency-Key": "one"}
    first = any_api.http.post(URL, json=ALPHAS, headers=headers)
    second = any_api.http.post(URL, json=ALPHAS, headers=headers)
    assert (second.status_code, second.json()["id"], second.headers["idempotency-replayed"]) == (202, first.json()["id"], "true")
    refused(any_api.http.post(URL, json={**ALPHAS, "seeds": 3}, headers=headers), 422, "idempotency_mismatch")
    assert len(jobs_of(any_api, first.json()["id"])) == 4


def test_a_key_that_made_a_job_makes_no_experiment(api: Api) -> None:
    headers = {"Idempotency-Key": "two"}
    assert api.http.post("/v1/jobs", json=DIGITS, headers=headers).status_code == 202
    refused(api.http.post(URL, json=ALPHAS, headers=headers), 422, "idempotency_mismatch")


def test_a_quota_holds_for_the_whole(any_api: Api) -> None:
    with any_api.store.write() as tx:
        quotas.grant(tx, "local", quotas.Quota(max_queued=3))
    refused(any_api.http.post(URL, json=ALPHAS), 429, "quota_exceeded")
    with any_api.store.read() as tx:
        assert tx.all(select(experiments.c.id)) == tx.all(select(jobs.c.id)) == tx.all(select(experiment_runs.c.job_id)) == []


def test_lists_are_paged_and_filtered(any_api: Api) -> None:
    made = [ask(any_api, name=f"number-{i}")["id"] for i in range(3)]
    first = any_api.http.get(URL, params={"limit": 2}).json()
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (made[:0:-1], True)
    documents.ExperimentListDocument.model_validate(first)
    rest = any_api.http.get(URL, params={"limit": 2, "after": first["last_id"]}).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (made[:1], False)
    any_api.http.post(f"{URL}/{made[1]}/cancel")
    assert [one["id"] for one in any_api.http.get(URL, params={"state": "cancelled"}).json()["data"]] == [made[1]]
    refused(any_api.http.get(URL, params={"state": "pausing"}), 422, "invalid_request")
    refused(any_api.http.get(URL, params={"experiment": "x"}), 422, "invalid_request")


def test_a_list_of_lines_reads_nothing_of_what_was_found(any_api: Api) -> None:
    """Of a search of 500 settings it is half a megabyte."""
    asked = ask(any_api, name="line")
    found = {
        "verdict": "No clear difference.",
        "best": None,
        "warnings": [],
        "arms": [{"index": i, "blob": "x" * 1000} for i in range(500)],
    }
    with any_api.store.write() as tx:
        tx.run(update(experiments).values(findings=found, findings_key="key", evidence_key="key"))
    read: list[str] = []

    def see(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        read.append(statement)

    event.listen(Engine, "before_cursor_execute", see)
    try:
        answer = any_api.http.get(URL, params={"view": "summary"})
    finally:
        event.remove(Engine, "before_cursor_execute", see)
    (line,) = documents.ExperimentSummaryListDocument.model_validate_json(answer.content).data
    assert (line.name, line.verdict, line.analysis.state, line.arm_count, line.progress.runs) == (
        "line",
        "No clear difference.",
        "current",
        2,
        4,
    )
    whole = any_api.http.get(f"{URL}/{asked['id']}").json()
    assert {name: answer.json()["data"][0][name] for name in ("counts", "progress", "stage")} == {
        name: whole[name] for name in ("counts", "progress", "stage")
    }
    assert len(answer.content) < 2000
    (look,) = (one for one in read if "FROM experiments" in one)
    assert not re.search(r"(?<!\()experiments\.findings\b", look), look


def test_the_whole_is_paused_resumed_and_cancelled(any_api: Api) -> None:
    found = ask(any_api)
    url = f"{URL}/{found['id']}"
    assert any_api.http.post(f"{url}/pause").json()["state"] == "paused"
    assert {job["state"] for job in jobs_of(any_api, found["id"])} == {"paused"}
    assert any_api.http.post(f"{url}/pause").status_code == 202
    assert any_api.http.post(f"{url}/resume").json()["state"] == "queued"
    assert {job["state"] for job in jobs_of(any_api, found["id"])} == {"queued"}
    refused(any_api.http.delete(url), 409, "illegal_move")
    assert any_api.http.post(f"{url}/cancel").json()["state"] == "cancelled"
    assert any_api.http.post(f"{url}/cancel").status_code == 202
    assert {job["state"] for job in jobs_of(any_api, found["id"])} == {"cancelled"}
    problem = refused(any_api.http.post(f"{url}/resume"), 409, "illegal_move")
    assert problem["state"] == "cancelled"


def test_what_was_cancelled_is_analysed_without_delay(any_api: Api) -> None:
    """A user's move leaves the analysis to the sweeper; it does not wait for one that nobody hands over."""

    def asked() -> list[Any]:
        with any_api.store.read() as tx:
            return list(tx.all(select(tasks.c.id).where(tasks.c.kind == "experiment")))

    any_api.http.post(f"{URL}/{ask(any_api)['id']}/cancel")
    until(asked)


def test_what_has_ended_is_deleted_with_its_jobs(any_api: Api) -> None:
    found = ask(any_api)
    url = f"{URL}/{found['id']}"
    any_api.http.post(f"{url}/cancel")
    assert any_api.http.delete(url).status_code == 204
    refused(any_api.http.get(url), 404, "experiment_not_found")
    refused(any_api.http.delete(url), 404, "experiment_not_found")
    assert jobs_of(any_api, found["id"]) == []


def test_five_hundred_runs_end_and_go_with_one_call_each(api: Api) -> None:
    found = ask(api, grid={"loss.alpha": [i / 50 for i in range(1, 51)]}, seeds=10)
    url = f"{URL}/{found['id']}"
    assert api.http.get(url).json()["counts"] == {"queued": 500}
    ended = api.http.post(f"{url}/cancel").json()
    assert (ended["state"], ended["counts"]) == ("cancelled", {"cancelled": 500})
    assert api.http.delete(url).status_code == 204
    assert jobs_of(api, found["id"]) == []


def test_seeds_are_added(any_api: Api) -> None:
    found = ask(any_api)
    answer = any_api.http.post(f"{URL}/{found['id']}/seeds", json={"count": 2})
    assert answer.status_code == 202, answer.text
    until(lambda: len(jobs_of(any_api, found["id"])) == 8)
    assert {job["spec"]["seed"] for job in jobs_of(any_api, found["id"])} == {0, 1, 2, 3}
    for body in ({}, {"count": 0}, {"count": "2"}, {"count": 2, "more": 1}):
        refused(any_api.http.post(f"{URL}/{found['id']}/seeds", json=body), 422, "invalid_spec")


def test_a_clone_asks_again_with_changes(any_api: Api) -> None:
    found = ask(any_api, name="first")
    changes = {"spec.epochs": 3, "grid.loss.alpha": [1.0, 0.3], "grid.optimizer.lr": [0.1, 0.05], "seeds": 1}
    answer = any_api.http.post(f"{URL}/{found['id']}/clone", json={"set": changes, "name": "second"})
    assert answer.status_code == 202, answer.text
    made = answer.json()
    assert (made["name"], made["cloned_from"], made["spec"]["spec"]["epochs"]) == ("second", found["id"], 3)
    assert made["spec"]["grid"] == {"loss.alpha": [1.0, 0.3], "optimizer.lr": [0.1, 0.05]}
    assert len(jobs_of(any_api, made["id"])) == 4
    assert any_api.http.post(f"{URL}/{found['id']}/clone").status_code == 202


def test_a_bad_change_of_a_clone_is_found_where_it_was_written(api: Api) -> None:
    url = f"{URL}/{ask(api)['id']}/clone"
    for changes, pointer in (
        ({"spec.epochs": 0}, "/set/spec.epochs"),
        ({"grid.loss.alpha": [1.0, 2.0]}, "/set/grid.loss.alpha/1"),
        ({"spec.epochs.x": 1}, "/set/spec.epochs.x"),
        ({"tuning.x.y": 1}, "/set/tuning.x.y"),
    ):
        problem = refused(api.http.post(url, json={"set": changes}), 422, "invalid_spec")
        assert pointer in {one["pointer"] for one in problem["errors"]}
    assert api.http.post(url, json={"set": {"spec.epochs": 3}}, params={"dry_run": "true"}).json()["spec"]["spec"]["epochs"] == 3


def test_name_and_notes_change(any_api: Api) -> None:
    found = ask(any_api)
    answer = any_api.http.patch(f"{URL}/{found['id']}", json={"name": "other", "notes": "why"})
    assert (answer.status_code, answer.json()["name"], answer.json()["notes"]) == (200, "other", "why")
    assert answer.json()["version"] > found["version"]
    problem = refused(any_api.http.patch(f"{URL}/{found['id']}", json={"name": None, "seeds": 2}), 422, "invalid_spec")
    assert [one["pointer"] for one in problem["errors"]] == ["/seeds"]
    refused(any_api.http.patch(f"{URL}/{found['id']}", json={"name": None}), 422, "invalid_spec")


def test_there_is_no_report_before_something_has_been_analysed(api: Api) -> None:
    found = ask(api)
    for name in FILES:
        refused(api.http.get(f"{URL}/{found['id']}/{name}"), 409, "report_not_ready")
    refused(api.http.get(f"{URL}/exp_{'0' * 26}/report.html"), 404, "experiment_not_found")
    assert api.http.get(f"{URL}/{found['id']}/report.pdf").status_code == 404


@pytest.mark.parametrize("name", list(FILES))
def test_files_come_as_what_they_are_and_cannot_run(any_api: Api, name: str) -> None:
    found = ask(any_api)
    give_report(any_api.store, any_api.data_dir, found["id"], b"<h1>a report</h1>")
    answer = any_api.http.get(f"{URL}/{found['id']}/{name}")
    assert (answer.status_code, answer.content) == (200, b"<h1>a report</h1>")
    assert answer.headers["content-type"].partition(";")[0] == FILES[name][0]
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert "script" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-disposition"].startswith("inline")
    known = any_api.http.get(f"{URL}/{found['id']}/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert known.status_code == 304
    head = any_api.http.head(f"{URL}/{found['id']}/{name}")
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(answer.content)))


def test_a_wait_ends_with_the_change(any_api: Api) -> None:
    found = any_api.http.post(URL, json=ALPHAS)
    url, tag = found.headers["location"], found.headers["etag"]
    nothing = any_api.http.get(url, params={"wait": 1}, headers={"If-None-Match": tag})
    assert nothing.status_code == 304

    def wait() -> int:
        return any_api.http.get(url, params={"wait": 20}, headers={"If-None-Match": tag}).status_code

    waited, _ = builders.at_once([wait, lambda: any_api.http.post(f"{url}/cancel").status_code])
    assert waited == 200


def test_an_id_that_is_none_is_not_there(api: Api) -> None:
    for wanted in ("exp_1", "job_" + "0" * 26, "exp_" + "I" * 26, "%00"):
        refused(api.http.get(f"{URL}/{wanted}"), 404, "experiment_not_found")


def watched(api: Api, experiment_id: str) -> bool:
    assert api.parts.tailer is not None
    return api.parts.tailer.is_watched(experiment_id)


def test_who_waits_hears_of_the_jobs_too(any_api: Api) -> None:
    """Nothing of the experiment's own row moves when a job of it does."""
    found = any_api.http.post(URL, json=ALPHAS)
    url, tag, job = found.headers["location"], found.headers["etag"], jobs_of(any_api, found.json()["id"])[0]

    def wait() -> Any:
        answer = any_api.http.get(url, params={"wait": 20}, headers={"If-None-Match": tag})
        return answer.status_code, answer.json()["counts"]

    def move() -> Any:
        until(lambda: watched(any_api, found.json()["id"]))
        return any_api.http.post(f"/v1/jobs/{job['id']}/pause").status_code

    waited, _ = builders.at_once([wait, move])
    assert waited == (200, {"queued": 3, "paused": 1})


def test_who_waits_hears_that_it_is_gone(any_api: Api) -> None:
    url = any_api.http.post(URL, json=ALPHAS).headers["location"]
    until(lambda: any_api.http.post(f"{url}/cancel").json()["analysis"]["state"] == "running")  # that it is asked for is a change too
    tag = any_api.http.get(url).headers["etag"]

    def wait() -> int:
        return any_api.http.get(url, params={"wait": 20}, headers={"If-None-Match": tag}).status_code

    def remove() -> int:
        until(lambda: watched(any_api, url.rpartition("/")[2]))
        return any_api.http.delete(url).status_code

    assert builders.at_once([wait, remove]) == [404, 204]


def test_many_who_wait_share_one_look(api: Api) -> None:
    """Twelve for two seconds: by themselves each would look four times."""
    found = api.http.post(URL, json=ALPHAS)
    looks: list[float] = []

    def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "sum(jobs.revision)" in statement:
            looks.append(time.monotonic())

    def wait() -> int:
        headers = {"If-None-Match": found.headers["etag"]}
        return api.http.get(found.headers["location"], params={"wait": 2}, headers=headers).status_code

    event.listen(Engine, "before_cursor_execute", count)
    try:
        assert builders.at_once([wait] * 12) == [304] * 12
    finally:
        event.remove(Engine, "before_cursor_execute", count)
    assert 2 <= len(looks) <= 3 + (looks[-1] - looks[0]) / EXPERIMENTS_S


def test_seeds_under_a_key_are_added_once(any_api: Api) -> None:
    url = f"{URL}/{ask(any_api)['id']}"
    headers = {"Idempotency-Key": "seeds"}
    first, second = (any_api.http.post(f"{url}/seeds", json={"count": 2}, headers=headers) for _ in range(2))
    assert (first.status_code, "idempotency-replayed" in first.headers) == (202, False)
    assert (second.status_code, second.headers["idempotency-replayed"]) == (202, "true")
    assert second.json()["progress"]["runs"] == 8
    refused(any_api.http.post(f"{url}/seeds", json={"count": 3}, headers=headers), 422, "idempotency_mismatch")
    refused(any_api.http.post(f"{URL}/{ask(any_api)['id']}/seeds", json={"count": 2}, headers=headers), 422, "idempotency_mismatch")
    assert len(jobs_of(any_api, first.json()["id"])) == 8


def test_seeds_asked_for_twice_at_once_under_a_key_are_added_once(any_api: Api) -> None:
    url = f"{URL}/{ask(any_api)['id']}"

    def add() -> str | None:
        answer = any_api.http.post(f"{url}/seeds", json={"count": 1}, headers={"Idempotency-Key": "twins"})
        assert answer.status_code == 202, answer.text
        return answer.headers.get("idempotency-replayed")

    assert sorted(builders.at_once([add, add, add]), key=str) == [None, "true", "true"]
    assert any_api.http.get(url).json()["progress"]["runs"] == 6


def test_a_key_of_seeds_that_were_refused_is_free(api: Api) -> None:
    url = f"{URL}/{ask(api)['id']}/seeds"
    with api.store.write() as tx:
        quotas.grant(tx, "local", quotas.Quota(max_queued=4))
    refused(api.http.post(url, json={"count": 2}, headers={"Idempotency-Key": "free"}), 429, "quota_exceeded")
    with api.store.write() as tx:
        quotas.grant(tx, "local", quotas.Quota(max_queued=100))
    answer = api.http.post(url, json={"count": 3}, headers={"Idempotency-Key": "free"})
    assert (answer.status_code, "idempotency-replayed" in answer.headers) == (202, False)


def test_a_change_names_the_version_that_was_seen(any_api: Api) -> None:
    found = ask(any_api)
    url = f"{URL}/{found['id']}"
    tag = any_api.http.get(url).headers["etag"]
    first = any_api.http.patch(url, json={"name": "mine"}, headers={"If-Match": tag})
    assert (first.status_code, first.json()["name"]) == (200, "mine")
    problem = refused(any_api.http.patch(url, json={"name": "theirs"}, headers={"If-Match": tag}), 412, "version_mismatch")
    assert "the experiment is at version" in problem["detail"]
    refused(any_api.http.patch(url, json={"name": "theirs"}, headers={"If-Match": "nonsense"}), 412, "version_mismatch")
    for matching in (str(first.json()["version"]), "*"):
        assert any_api.http.patch(url, json={"notes": matching}, headers={"If-Match": matching}).status_code == 200
    assert any_api.http.get(url).json()["name"] == "mine"


def test_a_move_that_cannot_be_speaks_of_the_experiment(api: Api) -> None:
    url = f"{URL}/{ask(api)['id']}"
    api.http.post(f"{url}/cancel")
    problem = refused(api.http.post(f"{url}/pause"), 409, "illegal_move")
    assert problem["detail"] == "cannot pause an experiment that is cancelled"
