"""The one judge of what a stack did with its jobs: pure functions over what is left when everything has ended.

It is told what the API shows of a job (`Record`), what its user asked for (`Asked`), and how a run of the same spec goes that nothing
happens to (`Undisturbed`). Every rule is a function that yields what is wrong; none means that the rule holds. The rules know nothing of
the code they judge but the words of its API.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]
Point = tuple[int, float | None]
Answer = Literal["no", "maybe", "yes"]

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
HELD = frozenset({"running", "pausing", "cancelling"})
"""States in which an attempt may write."""
LEGAL = frozenset(
    {
        *(("queued", to) for to in ("running", "paused", "cancelling", "failed")),
        *(("running", to) for to in ("queued", "succeeded", "failed", "pausing", "paused", "cancelling")),
        *(("pausing", to) for to in ("paused", "succeeded", "failed", "cancelling")),
        *(("paused", to) for to in ("queued", "cancelling")),
        ("cancelling", "cancelled"),
        *((end, "queued") for end in ("failed", "cancelled")),  # a retry
    }
)
WRITTEN_BY_AN_ATTEMPT = frozenset(
    {
        *("phase", "plan", "metrics", "evaluation", "checkpoint", "artifact", "note"),
        *("resumed", "rolled_back", "checkpoint_skipped", "checkpoint_failed"),
    }
)
FINAL_REASONS = frozenset({"diverged", "data_missing", "data_unreadable", "deadline"})
"""The same again would end the same: no further attempt."""
FREE_REASONS = frozenset({"device_lost"})
"""Ends that count as no failure."""
REASONS_BY_FORCE = frozenset({"worker_lost", "crashed"})
"""What a job may fail with that only outside violence has ended."""
TRANSACTION_S = 2.0
"""A row's time is that of its transaction's begin, which may lie so long before what the transaction saw."""
NEVER_THE_SAME = frozenset({"images_per_s", "memory_gib"})
"""Series that are no function of the spec."""


@dataclass(frozen=True)
class Violation:
    """A rule that does not hold. evidence: what was seen, the job's history below it."""

    job: str
    rule: str
    evidence: str


@dataclass(frozen=True)
class Undisturbed:
    """How a spec's run goes when nothing happens to it."""

    state: str
    reason: str | None
    series: dict[str, list[Point]]
    weights_sha256: str | None
    """Of its last checkpoint; None where it writes none."""


@dataclass(frozen=True)
class Record:
    """What is left of one job.

    job: as GET /v1/jobs/{id} shows it.  events: all of them, oldest first.  series: every point, by name.  attempts: rows of the database,
    times in ms; lease: its columns `lease_until` and `worker`.  files: sha256 of the file of each checkpoint that can be downloaded, by id,
    read from the disk; None for one that is not there.
    """

    job: Json
    events: list[Json]
    series: dict[str, list[Point]]
    checkpoints: list[Json]
    attempts: list[Json]
    lease: Json
    files: dict[str, str | None] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return str(self.job["id"])

    def of_type(self, *types: str) -> list[Json]:
        return [event for event in self.events if event["type"] in types]


@dataclass(frozen=True)
class Asked:
    """What the user wants of a job in the end. cancel: yes, where the last thing answered with 202 was a cancel; maybe, where an answer
    was cut off. damaged: checkpoints whose files were damaged on purpose, by id.  waits: paused is an end for it, as for who loses a search."""

    cancel: Answer = "no"
    damaged: frozenset[str] = frozenset()
    waits: bool = False


Rule = Callable[[Record, Asked, Undisturbed | None], Iterator[str]]


def judge(record: Record, asked: Asked | None = None, undisturbed: Undisturbed | None = None) -> list[Violation]:
    """Every rule that a job's record breaks, once. undisturbed: None where nothing is known of its spec's ordinary course."""
    found = {rule: list(rule(record, asked or Asked(), undisturbed)) for rule in RULES}
    return [Violation(record.id, rule.__name__, f"{_first(wrong)}\n{history(record)}") for rule, wrong in found.items() if wrong]


def _first(wrong: Sequence[str], most: int = 5) -> str:
    more = f"\nand {len(wrong) - most} more like it" if len(wrong) > most else ""
    return "\n".join(wrong[:most]) + more


def judge_acceptance(answers: Mapping[str, Iterable[str]], stored: Iterable[str]) -> list[Violation]:
    """answers: the ids that each idempotency key was ever answered with.  stored: the ids of all jobs there are in the end."""
    found, known = [], set(stored)
    for key, ids in answers.items():
        distinct = sorted(set(ids))
        if len(distinct) != 1:
            found.append(Violation(", ".join(distinct) or "-", "one_key_is_one_job", f"key {key} was answered with {distinct}"))
        found += [Violation(job, "nothing_accepted_is_lost", f"key {key}: it is not there") for job in distinct if job not in known]
    accepted = {job for ids in answers.values() for job in ids}
    return found + [Violation(job, "nothing_comes_of_nothing", "no answer named it") for job in sorted(known - accepted)]


def judge_experiment(experiment: Mapping[str, Any], jobs: Iterable[Mapping[str, Any]], *, cancelled: bool) -> list[Violation]:
    """experiment: as the API shows it in the end.  jobs: those that name it.  cancelled: its user may have ended it."""
    made = [dict(job) for job in jobs]
    places = Counter((job["name"], job["spec"]["seed"]) for job in made)  # the name has arm, stage, candidate and seed
    twice = sorted(f"{name}, seed {seed}: {count} jobs" for (name, seed), count in places.items() if count > 1)
    wrong = {"a_run_is_made_once": "; ".join(twice)} if twice else {}
    if experiment["state"] not in TERMINAL:
        wrong["an_experiment_ends_with_its_jobs"] = f"it is {experiment['state']}, its jobs are {sorted(job['state'] for job in made)}"
    spec = experiment["spec"]
    planned = spec["search"]["trials"] if is_search(experiment) else len(experiment["arms"]) * spec["seeds"]
    answering = [job for job in made if job["labels"]["stage"] in {"verdict", "search"}]
    if not cancelled and len(answering) < planned:
        wrong["every_run_is_made"] = f"{len(answering)} of {planned} runs of the answer"
    if is_search(experiment) and len(answering) > planned:
        wrong["no_trial_is_made_beyond_the_plan"] = f"{len(answering)} trials, {planned} were asked for"
    if not cancelled and (lost := sorted(job["name"] for job in made if job["state"] == "cancelled")):
        wrong["no_run_is_cancelled_by_mistake"] = f"nobody cancelled {lost}"
    if not cancelled and (wrongly := sorted(f"{job['name']}, {job['progress']}" for job in made if not _rests(experiment, job))):
        wrong["who_loses_a_search_waits_at_a_rung"] = "; ".join(wrongly)
    if experiment["state"] == "succeeded" and (experiment["verdict"] is None or experiment["analysis"]["state"] != "current"):
        wrong["who_asks_is_answered"] = f"analysis {experiment['analysis']}, verdict {experiment['verdict']!r}"
    return [Violation(experiment["id"], rule, evidence) for rule, evidence in wrong.items()]


def is_search(experiment: Mapping[str, Any]) -> bool:
    return bool(experiment["spec"]["strategy"] != "grid")


def rungs(experiment: Mapping[str, Any]) -> list[int]:
    """Epochs at which trials of asha are compared."""
    search, epochs = experiment["spec"]["search"], experiment["spec"]["spec"]["epochs"]
    found = itertools.takewhile(lambda rung: rung < epochs, (search["min_epochs"] * search["reduction"] ** n for n in itertools.count()))
    return list(found) if experiment["spec"]["strategy"] == "asha" else []


def _rests(experiment: Mapping[str, Any], job: Json) -> bool:
    """Whether a job that has not ended is one that may stay so: it has been trained to a rung, and no further."""
    return job["state"] != "paused" or job["progress"]["epoch"] in rungs(experiment)


def history(record: Record) -> str:
    """A job's events, one a line: number, seconds since the first, type, data."""
    first = record.events[0]["at"] if record.events else 0.0
    lines = [f"    #{event['seq']} {event['at'] - first:+.3f} s {event['type']} {_short(event['data'])}" for event in record.events]
    return "\n".join(lines)


# --- the rules: each yields what is wrong -----------------------------------------------------------------------------------------


def events_are_numbered_without_a_gap(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    numbers = [event["seq"] for event in record.events]
    if numbers != list(range(1, len(numbers) + 1)):
        wrong = next(i for i, number in enumerate(numbers, start=1) if number != i)
        yield f"event {wrong} is numbered {numbers[wrong - 1]}"


def every_move_is_legal(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    state = "queued"
    for event in record.of_type("state"):
        origin, to = event["data"]["from"], event["data"]["to"]
        if origin != state:
            yield f"event {event['seq']} moves from {origin}, but the job was {state}"
        if (origin, to) not in LEGAL:
            yield f"event {event['seq']}: no move leads from {origin} to {to}"
        if origin in TERMINAL and not event["data"].get("retry"):
            yield f"event {event['seq']} leaves {origin} without a retry"
        state = to
    if record.job["state"] != state:
        yield f"the job is {record.job['state']}, its last move was to {state}"


def it_ends_once(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    if asked.waits and record.job["state"] == "paused":
        if not any(checkpoint["is_latest"] for checkpoint in record.checkpoints):
            yield "it waits without a checkpoint to go on from"
        return
    if record.job["state"] not in TERMINAL:
        yield f"it is still {record.job['state']}"
        return
    ends = sum(event["data"]["to"] in TERMINAL for event in record.of_type("state"))
    retries = sum(bool(event["data"].get("retry")) for event in record.of_type("state"))
    if ends != retries + 1:
        yield f"it ended {ends} times with {retries} retries"
    if record.job["finished_at"] is None:
        yield "it has no time of its end"
    if record.lease["lease_until"] is not None or record.lease["worker"] is not None:
        yield f"it has ended and is still held: {record.lease}"


def one_attempt_writes_at_a_time(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    owner: int | None = None
    last = 0
    for event in record.events:
        number = event["data"].get("attempt")
        if event["type"] == "claimed":
            if owner is not None:
                yield f"event {event['seq']}: attempt {number} begins while {owner} has not ended"
            if number != last + 1:
                yield f"event {event['seq']}: attempt {number} follows {last}"
            owner = last = number
        elif event["type"] == "attempt_ended":
            if number != owner:
                yield f"event {event['seq']}: attempt {number} ends, but {owner} has the job"
            owner = None
        elif event["type"] in WRITTEN_BY_AN_ATTEMPT and number != owner:
            yield f"event {event['seq']} ({event['type']}) was written by attempt {number}, but {owner} has the job"
    if record.job["state"] in TERMINAL and owner is not None:
        yield f"attempt {owner} never ended"


def attempts_are_in_order(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    rows = record.attempts
    if [row["number"] for row in rows] != list(range(1, record.job["attempt"] + 1)):
        yield f"there are rows of the attempts {[row['number'] for row in rows]}, and {record.job['attempt']} were claimed"
    for row in rows:
        if row["ended_at"] is None or row["outcome"] is None:
            yield f"attempt {row['number']} has no end"
        elif row["ended_at"] < row["started_at"]:
            yield f"attempt {row['number']} ended before it began"
    for earlier, later in itertools.pairwise(rows):
        if earlier["ended_at"] is not None and later["started_at"] < earlier["ended_at"] - TRANSACTION_S * 1000:
            yield f"attempt {later['number']} began {earlier['ended_at'] - later['started_at']} ms before {earlier['number']} had ended"
    told = [(event["data"]["attempt"], event["data"]["outcome"]) for event in record.of_type("attempt_ended")]
    if told != [(row["number"], row["outcome"]) for row in rows]:
        yield f"the events tell of the ends {told}, the rows of {[(row['number'], row['outcome']) for row in rows]}"


def the_result_is_the_last_attempts(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    """The last attempt's own checkpoint, or the one it went on from when nothing was left to train."""
    for end, move in itertools.pairwise(record.of_type("attempt_ended", "state")):
        if end["data"].get("outcome") == "succeeded" and move["data"]["to"] != "succeeded" and move["data"]["from"] != "cancelling":
            yield f"event {end['seq']}: attempt {end['data']['attempt']} succeeded, and the job became {move['data']['to']}"
    if record.job["state"] != "succeeded":
        return
    last = record.attempts[-1]
    if last["outcome"] != "succeeded":
        yield f"its last attempt, {last['number']}, {last['outcome']}"
    latest = next((checkpoint for checkpoint in record.checkpoints if checkpoint["is_latest"]), None)
    if latest is None:
        yield "it succeeded and has no checkpoint"
        return
    if latest["step"] != record.job["progress"]["step"]:
        yield f"its newest checkpoint is of step {latest['step']}, and it trained to {record.job['progress']['step']}"
    author = [event["data"]["attempt"] for event in record.of_type("checkpoint") if event["data"]["step"] == latest["step"]]
    if author and author[-1] != last["number"] and last["resumed_from"] != latest["id"]:
        yield f"{latest['id']} was written by attempt {author[-1]}, and {last['number']}, which went on from {last['resumed_from']}, won"


def metrics_have_no_gap_and_no_repeat(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    """The points that survive are the undisturbed run's, all of them where it came as far; steps rise strictly in any case."""
    for name, points in record.series.items():
        steps = [step for step, _ in points]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            yield f"{name}: steps do not rise: {steps}"
    if undisturbed is None:
        return
    whole = record.job["state"] == undisturbed.state and _code(record.job["reason"]) == undisturbed.reason
    if whole and (missing := undisturbed.series.keys() - record.series.keys()):
        yield f"series that are missing: {sorted(missing)}"
    for name, series in record.series.items():
        points, wanted = _comparable(name, series), _comparable(name, undisturbed.series.get(name, []))
        if points != (wanted if whole else wanted[: len(points)]):
            yield f"{name}: {_difference(points, wanted)}"


def _comparable(name: str, points: list[Point]) -> list[Point]:
    return [(step, None) for step, _ in points] if name in NEVER_THE_SAME else points


def announcements_follow_each_other(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    """Whoever reads the stream and cuts back at `resumed` and `rolled_back` sees every stretch of steps once."""
    reached = saved = 0
    for event in record.of_type("metrics", "checkpoint", "resumed", "rolled_back"):
        data = event["data"]
        match event["type"]:
            case "checkpoint":
                saved = data["step"]  # a pause may save between two points
            case "metrics":
                if data["from_step"] < reached:
                    yield f"event {event['seq']} announces step {data['from_step']} again: {reached} had been reached"
                reached = max(reached, data["to_step"])
            case _:
                back = data["from_step"] if event["type"] == "resumed" else data["to_step"]
                if back > max(reached, saved):
                    yield f"event {event['seq']} goes on from step {back}, and only {max(reached, saved)} had been announced"
                reached = back


def weights_are_the_undisturbed_runs(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    if undisturbed is None or record.job["state"] != "succeeded":
        return
    found = [checkpoint["sha256"] for checkpoint in record.checkpoints if checkpoint["is_latest"]]
    if found != [undisturbed.weights_sha256]:
        yield f"sha256 of the last weights: {found}, undisturbed {undisturbed.weights_sha256}"


def files_are_what_they_are_said_to_be(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    for checkpoint in record.checkpoints:
        on_disk = record.files.get(checkpoint["id"])
        if checkpoint["id"] not in asked.damaged and on_disk != checkpoint["sha256"]:
            yield f"{checkpoint['id']}: sha256 {checkpoint['sha256']}, on the disk {on_disk or 'nothing'}"


def the_user_has_the_last_word(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    state = record.job["state"]
    if asked.cancel == "yes" and state != "cancelled":
        yield f"the cancel was accepted, and it is {state}"
    if asked.cancel == "no" and state == "cancelled":
        yield "nobody cancelled it"


def the_reason_is_right(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    job, reason = record.job, _code(record.job["reason"])
    if job["state"] == "failed" and reason is None:
        yield "it failed without a reason"
    if job["state"] in {"succeeded", "cancelled"} and reason is not None:
        yield f"it is {job['state']} and has the reason {reason}"
    failures = _failures(record)
    if failures != job["failures"]:
        yield f"it counts {job['failures']} failures, its history {failures}"
    if job["state"] != "failed":
        if undisturbed is not None and job["state"] == "succeeded" and undisturbed.state != "succeeded":
            yield f"it succeeded; undisturbed it ends as {undisturbed.state} ({undisturbed.reason})"
        return
    ended = record.of_type("attempt_ended")
    if ended and reason != _code(ended[-1]["data"].get("reason")):
        yield f"its reason is {reason}, its last attempt's {ended[-1]['data'].get('reason')}"
    most = job["spec"]["limits"]["max_attempts"]
    if ended and reason not in FINAL_REASONS and failures < most:
        yield f"it was given up with {reason} after {failures} failures of {most}"
    if undisturbed is not None and reason not in {undisturbed.reason, *REASONS_BY_FORCE}:
        yield f"it failed with {reason}; undisturbed it ends as {undisturbed.state} ({undisturbed.reason})"


def attempts_are_bounded(record: Record, asked: Asked, undisturbed: Undisturbed | None) -> Iterator[str]:
    """No attempt begins of itself once the failures since the last retry have reached the bound; a user may resume such a job."""
    most, failures, resumed = record.job["spec"]["limits"]["max_attempts"], 0, False
    for event in record.events:
        if event["type"] == "claimed":
            if failures >= most and not resumed:
                yield f"event {event['seq']}: attempt {event['data']['attempt']} begins after {failures} failures of {most}"
            resumed = False
        elif event["type"] == "state":
            failures = 0 if event["data"].get("retry") else failures
            resumed = resumed or event["data"]["from"] == "paused"
        failures += _is_failure(event)


RULES: Sequence[Rule] = (
    events_are_numbered_without_a_gap,
    every_move_is_legal,
    it_ends_once,
    one_attempt_writes_at_a_time,
    attempts_are_in_order,
    the_result_is_the_last_attempts,
    metrics_have_no_gap_and_no_repeat,
    announcements_follow_each_other,
    weights_are_the_undisturbed_runs,
    files_are_what_they_are_said_to_be,
    the_user_has_the_last_word,
    the_reason_is_right,
    attempts_are_bounded,
)


def _failures(record: Record) -> int:
    """Attempts since the last retry that ended by the job's own fault or a lost worker."""
    count = 0
    for event in record.events:
        count = 0 if event["type"] == "state" and event["data"].get("retry") else count + _is_failure(event)
    return count


def _is_failure(event: Json) -> bool:
    code = _code(event["data"].get("reason")) if event["type"] == "attempt_ended" else None
    return code is not None and code not in FREE_REASONS


def _code(reason: Any) -> str | None:
    return None if reason is None else str(reason["code"])


def _difference(found: Sequence[Point], wanted: Sequence[Point]) -> str:
    steps = [step for step, _ in found], [step for step, _ in wanted]
    if steps[0] != steps[1][: len(found)]:
        return f"steps {steps[0]}, undisturbed {steps[1]}"
    if len(found) < len(wanted):
        return f"it ends at step {steps[0][-1] if found else 0}, undisturbed at {steps[1][-1]}"
    wrong = next(i for i, point in enumerate(found) if point != wanted[i])
    return f"at step {found[wrong][0]} it is {found[wrong][1]!r}, undisturbed {wanted[wrong][1]!r}"


def _short(data: Json) -> str:
    text = json.dumps(data, default=str)
    return text if len(text) <= 240 else text[:239] + "…"
