"""Logs: all attempts one after the other, the last lines, and following until the job ends."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest

from powergrad.jobs import rows
from powergrad.jobs.rows import Run
from powergrad.jobs.states import Outcome, ReasonCode
from tests.api.conftest import DEADLINE_S, Api
from tests.jobs import builders


def write(api: Api, run: Run, text: str) -> None:
    folder: Path = api.data_dir / rows.job_dir(run.job_id) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"a{run.attempt}.log").open("a") as file:
        file.write(text)


def logs(api: Api, job_id: str, **params: str | int) -> str:
    answer = api.http.get(f"/v1/jobs/{job_id}/logs", params=params)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    return answer.text


@pytest.fixture
def two_attempts(api: Api) -> Run:
    """A job whose first attempt was lost and whose second runs; both have written."""
    run = builders.running(api.store)
    write(api, run, "one\ntwo\n")
    builders.finish(api.store, run, Outcome.LOST, ReasonCode.WORKER_LOST)
    again = builders.claimed(api.store).run
    write(api, again, "three\nfour ü\n")
    return again


def test_attempts_follow_one_another(api: Api, two_attempts: Run) -> None:
    assert logs(api, two_attempts.job_id) == "one\ntwo\nthree\nfour ü\n"


@pytest.mark.parametrize(
    ("tail", "text"),
    [
        (0, ""),
        (1, "four ü\n"),
        (2, "three\nfour ü\n"),
        (3, "two\nthree\nfour ü\n"),
        (4, "one\ntwo\nthree\nfour ü\n"),
        (9, "one\ntwo\nthree\nfour ü\n"),
    ],
)
def test_the_last_lines(api: Api, two_attempts: Run, tail: int, text: str) -> None:
    assert logs(api, two_attempts.job_id, tail=tail) == text


@pytest.mark.parametrize("offset", [0, 3, 7, 8, 9, 13, 14, 15, 21])
def test_from_a_byte_on_across_the_attempts(api: Api, two_attempts: Run, offset: int) -> None:
    everything = "one\ntwo\nthree\nfour ü\n".encode()
    answer = api.http.get(f"/v1/jobs/{two_attempts.job_id}/logs", params={"offset": offset})
    assert answer.content == everything[offset:]
    assert answer.headers["log-offset"] == str(offset)


def test_behind_the_end_there_is_nothing_and_the_answer_says_where_it_is(api: Api, two_attempts: Run) -> None:
    answer = api.http.get(f"/v1/jobs/{two_attempts.job_id}/logs", params={"offset": 10**6})
    assert (answer.content, answer.headers["log-offset"]) == (b"", "22")


def test_a_tail_says_where_it_begins_and_whether_it_is_the_end(api: Api, two_attempts: Run) -> None:
    url = f"/v1/jobs/{two_attempts.job_id}/logs"
    headers = api.http.get(url, params={"tail": 3}).headers
    assert (headers["log-offset"], headers["log-complete"]) == ("4", "false")
    builders.finish(api.store, two_attempts)
    assert api.http.get(url, params={"tail": 1}).headers["log-complete"] == "true"


def test_a_tail_from_an_offset_is_refused(api: Api, two_attempts: Run) -> None:
    answer = api.http.get(f"/v1/jobs/{two_attempts.job_id}/logs", params={"tail": 1, "offset": 1})
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, "offset")


def test_the_last_lines_of_a_log_of_many_blocks(api: Api) -> None:
    run = builders.running(api.store)
    lines = [f"{number} {'x' * 90}\n" for number in range(20_000)]
    write(api, run, "".join(lines))
    assert logs(api, run.job_id, tail=10_000) == "".join(lines[-10_000:])


def test_an_unfinished_last_line_counts_as_one(api: Api) -> None:
    run = builders.running(api.store)
    write(api, run, "one\ntwo")
    assert logs(api, run.job_id, tail=1) == "two"


def test_a_job_that_has_not_started_has_no_log(any_api: Api) -> None:
    job = any_api.submit()
    assert logs(any_api, job["id"]) == ""
    assert logs(any_api, job["id"], tail=5) == ""


def test_an_attempt_without_a_file_is_passed_over(api: Api) -> None:
    run = builders.running(api.store)
    assert logs(api, run.job_id) == ""


def test_a_follower_gets_what_is_written_over_attempts_to_the_end(any_api: Api) -> None:
    run = builders.running(any_api.store)
    write(any_api, run, "one\n")
    heard: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        with any_api.http.stream("GET", f"/v1/jobs/{run.job_id}/logs", params={"follow": "true"}, timeout=DEADLINE_S) as answer:
            for text in answer.iter_text():
                heard.put(text)
        heard.put(None)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    assert heard.get(timeout=DEADLINE_S) == "one\n"
    write(any_api, run, "two\n")
    assert heard.get(timeout=DEADLINE_S) == "two\n"
    builders.finish(any_api.store, run, Outcome.LOST, ReasonCode.WORKER_LOST)
    again = builders.claimed(any_api.store).run
    write(any_api, again, "three\n")
    assert heard.get(timeout=DEADLINE_S) == "three\n"
    write(any_api, again, "last words\n")
    builders.finish(any_api.store, again)
    assert "".join(iter(lambda: heard.get(timeout=DEADLINE_S) or "", "")) == "last words\n"
    listener.join(timeout=DEADLINE_S)


def test_following_begins_with_the_tail(api: Api, two_attempts: Run) -> None:
    builders.finish(api.store, two_attempts)
    assert logs(api, two_attempts.job_id, tail=1, follow="true") == "four ü\n"


@pytest.mark.parametrize(("name", "value"), [("tail", "-1"), ("tail", "x"), ("follow", "perhaps")])
def test_a_bad_question_is_refused(api: Api, name: str, value: str) -> None:
    job = api.submit()
    answer = api.http.get(f"/v1/jobs/{job['id']}/logs", params={name: value})
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, name)


def test_logs_of_an_unknown_job_are_not_found(api: Api) -> None:
    assert api.http.get("/v1/jobs/job_00000000000000000000000000/logs", params={"follow": "true"}).status_code == 404
