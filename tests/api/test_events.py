"""The event list and the event stream: no gap, no repeat, an end, and bounded memory."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from api.tailer import BUFFERED, READ_BYTES, Tailer, follow
from api.tailer import Frame as Event
from powergrad import protocol
from powergrad.jobs.rows import Run
from powergrad.jobs.states import JobState
from tests.api.conftest import DEADLINE_S, Api, Frame, Reader, serving, settings_for, until
from tests.jobs import builders


def note(api: Api, run: Run, text: str = "x") -> None:
    """One more event."""
    builders.record(api.store, run, protocol.Note(detail=text))


def numbers(frames: list[Frame]) -> list[int]:
    return [int(frame.id) for frame in frames if frame.id is not None]


def watched(api: Api, job_id: str) -> None:
    tailer = api.parts.tailer
    assert tailer is not None
    until(lambda: tailer.is_watched(job_id))


# --- the list


def test_events_are_listed_from_a_number_on(any_api: Api) -> None:
    run = builders.running(any_api.store)
    url = f"/v1/jobs/{run.job_id}/events"
    everything = any_api.http.get(url).json()
    assert [event["type"] for event in everything["data"]] == ["created", "claimed", "state"]
    assert everything["has_more"] is False
    page = any_api.http.get(url, params={"after": 1, "limit": 1}).json()
    assert ([event["seq"] for event in page["data"]], page["has_more"]) == ([2], True)
    assert any_api.http.get(url, params={"after": 2**63 - 1}).json()["data"] == []


@pytest.mark.parametrize(("name", "value"), [("after", "-1"), ("after", str(2**63)), ("after", "x"), ("limit", "0"), ("limit", "1001")])
def test_a_bad_place_in_the_list_is_refused(any_api: Api, name: str, value: str) -> None:
    job = any_api.submit()
    answer = any_api.http.get(f"/v1/jobs/{job['id']}/events", params={name: value})
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, name)


def test_events_of_an_unknown_job_are_not_found_in_either_form(api: Api) -> None:
    for accept in ("application/json", "text/event-stream"):
        answer = api.http.get("/v1/jobs/job_00000000000000000000000000/events", headers={"Accept": accept})
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


# --- the stream


def test_the_stream_of_a_job_that_is_over_replays_and_ends(any_api: Api) -> None:
    job_id = builders.bring_to(any_api.store, JobState.SUCCEEDED)
    frames = list(any_api.frames(job_id))
    stored = any_api.http.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert [frame.data for frame in frames[:-1]] == stored
    assert [(frame.id, frame.event) for frame in frames[:-1]] == [(str(event["seq"]), event["type"]) for event in stored]
    assert (frames[-1].event, frames[-1].id, frames[-1].data) == ("end", None, {"state": "succeeded"})


def test_events_arrive_as_they_happen_and_the_stream_ends_with_the_job(any_api: Api) -> None:
    run = builders.running(any_api.store)
    reader = Reader(any_api, run.job_id)
    reader.until_event("state")
    builders.record(any_api.store, run, builders.plan(), builders.step(1))
    assert reader.until_event("metrics").data["data"] == {"attempt": 1, "from_step": 1, "to_step": 1}
    builders.finish(any_api.store, run)
    rest = reader.rest()
    assert rest[-1].event == "end"
    assert rest[-2].data["data"]["to"] == "succeeded"


@pytest.mark.parametrize("form", ["header", "query"])
def test_a_reader_that_comes_again_has_no_gap_and_no_repeat(any_api: Api, form: str) -> None:
    run = builders.running(any_api.store)
    for number in range(10):
        note(any_api, run, str(number))
    builders.finish(any_api.store, run)
    everything = list(any_api.frames(run.job_id))
    seen = numbers(everything)[4]
    if form == "header":
        rest = list(any_api.frames(run.job_id, Last_Event_ID=str(seen)))
    else:
        with any_api.http.stream(
            "GET", f"/v1/jobs/{run.job_id}/events", params={"after": seen}, headers={"Accept": "text/event-stream"}
        ) as answer:
            rest = [Frame(id=line[4:]) for line in answer.iter_lines() if line.startswith("id: ")]
    assert numbers(rest) == numbers(everything)[5:]


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "9" * 30])
def test_a_bad_last_event_id_is_refused(api: Api, value: str) -> None:
    job = api.submit()
    answer = api.http.get(f"/v1/jobs/{job['id']}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": value})
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, "Last-Event-ID")


def test_a_quiet_stream_pings(sqlite_url: str, tmp_path: Path) -> None:
    with serving(settings_for(sqlite_url, tmp_path, ping_s=0.1)) as api:
        run = builders.running(api.store)
        reader = Reader(api, run.job_id)
        reader.until_event("state")
        for _ in range(3):
            frame = reader.next()
            assert frame is not None
            assert frame == Frame(comment="ping") or frame.comment == ""
        builders.finish(api.store, run)
        assert reader.until_event("end")


def test_the_stream_of_a_deleted_job_ends(api: Api) -> None:
    run = builders.running(api.store)
    reader = Reader(api, run.job_id)
    reader.until_event("state")
    with api.store.write() as tx:
        from powergrad.jobs.tables import events, jobs

        tx.run(events.delete())
        tx.run(jobs.delete())
    assert reader.until_event("end").data == {"state": "deleted"}


def test_many_readers_each_see_every_event_once(any_api: Api) -> None:
    run = builders.running(any_api.store)
    with ThreadPoolExecutor(20) as pool:
        readings = [pool.submit(lambda: list(any_api.frames(run.job_id))) for _ in range(20)]
        watched(any_api, run.job_id)
        for number in range(100):
            note(any_api, run, str(number))
        builders.finish(any_api.store, run)
        expected = builders.event_numbers(any_api.store, run.job_id)
        for reading in readings:
            frames = reading.result(timeout=DEADLINE_S)
            assert numbers(frames) == expected == list(range(1, len(expected) + 1))
            assert frames[-1].event == "end"


def test_a_reader_that_does_not_read_holds_a_bounded_buffer_and_loses_nothing(api: Api) -> None:
    run = builders.running(api.store)
    host, port = api.http.base_url.host, api.http.base_url.port
    assert port is not None
    with socket.create_connection((host, port)) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        asked = f"GET /v1/jobs/{run.job_id}/events HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: text/event-stream\r\n\r\n"
        line.sendall(asked.encode())
        watched(api, run.job_id)
        text = "x" * 20_000
        for number in range(2 * BUFFERED):
            note(api, run, f"{number} {text}")
        tailer = api.parts.tailer
        assert tailer is not None
        held = [len(watcher.frames or ()) for topic in list(tailer._topics.values()) for watcher in list(topic.watchers)]
        assert max(held) <= BUFFERED
        builders.finish(api.store, run)
        line.settimeout(DEADLINE_S)
        received = b""
        while b"event: end" not in received[-200:]:
            block = line.recv(1 << 16)
            assert block, "the stream was cut"
            received += block
    # chunk borders may fall inside a line, so ids are read from the events' own numbers
    body = _dechunked(received.partition(b"\r\n\r\n")[2])
    seen = [int(row[4:]) for row in body.split(b"\n") if row.startswith(b"id: ")]
    assert seen == builders.event_numbers(api.store, run.job_id)


def test_what_is_read_for_a_reader_alone_is_bounded_in_bytes_and_comes_in_order(api: Api) -> None:
    run = builders.running(api.store)
    for number in range(30):
        note(api, run, f"{number} {'x' * (READ_BYTES * 2 if number == 15 else 10_000)}")
    builders.finish(api.store, run)

    async def parts() -> list[list[Event]]:
        tailer = Tailer(api.store)
        with tailer.watch(run.job_id, events=True) as watcher:
            found = [part or [] async for part in follow(tailer, watcher, after=0, quiet_s=DEADLINE_S)]
        await tailer.stop()
        return found

    found = asyncio.run(parts())
    assert [event.seq for part in found for event in part] == builders.event_numbers(api.store, run.job_id)
    assert all(sum(len(event.data) for event in part) <= READ_BYTES for part in found if len(part) > 1)
    assert 30 * 10_000 / READ_BYTES < len(found) < 15, "several events at a time"


def test_events_that_a_look_had_no_room_for_are_read_from_the_database(api: Api) -> None:
    """More than BUFFERED at once: the look passes on the first of them only."""
    run = builders.running(api.store)
    reader = Reader(api, run.job_id)
    reader.until_event("state")
    builders.record(api.store, run, *(protocol.Note(detail=str(number)) for number in range(3 * BUFFERED)))
    note(api, run, "the next")
    builders.finish(api.store, run)
    stored = builders.event_numbers(api.store, run.job_id)
    assert numbers(reader.rest()) == stored[3:]


def _dechunked(raw: bytes) -> bytes:
    body, at = b"", 0
    while (end := raw.find(b"\r\n", at)) > 0:
        size = int(raw[at:end], 16)
        body += raw[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
    return body


def test_open_streams_hold_no_thread_and_no_connection_of_the_routes(any_api: Api) -> None:
    """There are 40 threads and 26 connections for routes: 120 streams and 120 waiting polls must leave all of them free."""
    run = builders.running(any_api.store)
    etag = any_api.http.get(f"/v1/jobs/{run.job_id}").headers["etag"]
    host, port = any_api.http.base_url.host, any_api.http.base_url.port
    assert port is not None
    head = f"HTTP/1.1\r\nHost: {host}:{port}\r\n"
    with ExitStack() as lines:
        for _ in range(120):
            stream, poll = (lines.enter_context(socket.create_connection((host, port))) for _ in range(2))
            stream.sendall(f"GET /v1/jobs/{run.job_id}/events {head}Accept: text/event-stream\r\n\r\n".encode())
            poll.sendall(f"GET /v1/jobs/{run.job_id}?wait=60 {head}If-None-Match: {etag}\r\n\r\n".encode())
        tailer = any_api.parts.tailer
        assert tailer is not None
        until(lambda: sum(len(topic.watchers) for topic in list(tailer._topics.values())) == 240)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: any_api.http.get("/v1/jobs", timeout=DEADLINE_S).status_code, range(40)))
        assert answers == [200] * 40
        pool_of_routes = any_api.parts.store.engine.pool
        until(lambda: pool_of_routes.checkedout() == 0)  # type: ignore[attr-defined]


def test_the_tailer_sleeps_when_nobody_waits(api: Api) -> None:
    job_id = builders.bring_to(api.store, JobState.SUCCEEDED)
    list(api.frames(job_id))
    tailer = api.parts.tailer
    assert tailer is not None
    until(lambda: not tailer._topics and (tailer._task is None or tailer._task.done()))


def test_a_server_that_stops_ends_its_streams_without_an_end_frame(sqlite_url: str, tmp_path: Path) -> None:
    with serving(settings_for(sqlite_url, tmp_path)) as api:
        run = builders.running(api.store)
        reader = Reader(api, run.job_id)
        reader.until_event("state")
        api.stop()
        assert [frame.event for frame in reader.rest()] == []
