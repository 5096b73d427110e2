"""Every row, struck at an experiment: none of its runs is made twice, each ends with its bits, and the answer is the undisturbed one's.

What each fault does to a single job is tried elsewhere; here it is done while four runs of one question wait, train and end.
"""

from __future__ import annotations

import random
import signal
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import select

from powergrad.client import ApiError, Client, Experiment, Retries, Unreachable
from powergrad.jobs import keys
from powergrad.jobs.tables import idempotency_keys
from tests.data.test_check import armed
from tests.faults import history, questions
from tests.faults.conftest import LEASE, Site, gone, small_spec
from tests.faults.moments import frozen, frozen_between_writes, kill_all, pass_by, trainers_of, tree_of, unguarded
from tests.faults.questions import Answered, answered, ask, at_work, check, jobs_of, question
from tests.faults.test_broker_faults import directory_deleted, emptied, file_corrupted, killed_for
from tests.faults.test_job_faults import hurting
from tests.faults.test_specs import BODIES
from tests.faults.test_stack import second_stack
from tests.faults.test_upgrade import end_everything
from tests.faults.test_uploads import HOSTILE, ODD, uploaded
from tests.faults.test_user_faults import in_a_checkpoint
from tests.faults.test_webhooks import SPELLINGS
from tests.faults.test_worker_faults import ring
from tests.jobs.builders import do
from tests.pictures import flowers
from tests.receivers import receiving
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

TTL_S = float(LEASE["POWERGRAD_LEASE_TTL_S"])
SHORT_S = 3.0  # of a database that is away: less than trainers wait
LONG_S = TTL_S + 4.0
PATIENT = Retries(count=100, first_s=0.1, cap_s=0.5)

Fault = Callable[[Site, Experiment, random.Random], None]


@pytest.fixture(scope="session")
def expected(site: Site) -> Answered:
    """The answer of an experiment that nothing happened to."""
    asked = ask(site)
    found = answered(site, asked)
    assert len(found.runs) == questions.ARMS * questions.SEEDS
    assert {run.state for run in found.runs.values()} == {"succeeded"}
    assert len({run.weights_sha256 for run in found.runs.values()}) == len(found.runs), "four runs that can be told apart"
    return found


# --- rows 1 to 6: processes, the broker, the database


def trainer_killed(site: Site, experiment: Experiment, dice: random.Random) -> None:
    at_work(site, experiment, dice)[1].kill()


def template_killed(site: Site, experiment: Experiment, dice: random.Random) -> None:
    at_work(site, experiment, dice)
    site.the("powergrad: template").kill()


def worker_tree_killed(site: Site, experiment: Experiment, dice: random.Random) -> None:
    at_work(site, experiment, dice)
    family = tree_of(site.the("powergrad: worker"))
    kill_all(dice.sample(family, len(family)))
    until(lambda: all(gone(process) for process in family), within_s=2.0)


def trainer_frozen(site: Site, experiment: Experiment, dice: random.Random) -> None:
    with frozen(at_work(site, experiment, dice)[1]):
        pass_by(TTL_S + dice.uniform(0.5, 2.0))


def worker_frozen(site: Site, experiment: Experiment, dice: random.Random) -> None:
    at_work(site, experiment, dice)
    with frozen_between_writes(site, site.the("powergrad: worker")):
        pass_by(TTL_S + dice.uniform(0.5, 2.0))


def of_the_broker(fault: Callable[[Site, random.Random], None]) -> Fault:
    def struck(site: Site, experiment: Experiment, dice: random.Random) -> None:
        at_work(site, experiment, dice)
        fault(site, dice)

    return struck


def locked_for(seconds: float, *, api_too: bool = False) -> Fault:
    """Nobody can write; the API is killed at its beginning, too, and finds a database that it cannot write to."""

    def struck(site: Site, experiment: Experiment, dice: random.Random) -> None:
        at_work(site, experiment, dice)
        with closing(sqlite3.connect(site.data_dir / "powergrad.db", timeout=10.0, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            if api_too:
                site.the("powergrad: api").kill()
            pass_by(seconds)
            connection.execute("ROLLBACK")
        until(site.is_ready)

    return struck


# --- rows 10 to 14: checkpoints, the user's orders, the whole stack


def killed_in_a_checkpoint(site: Site, experiment: Experiment, dice: random.Random) -> None:
    victim = until(lambda: next((job for job in jobs_of(site, experiment) if job.state == "running"), None))
    trainer = in_a_checkpoint(site, victim.id)
    trainer.kill()


def stopped_at_random_steps(site: Site, experiment: Experiment, dice: random.Random) -> None:
    """A run at a time, with a checkpoint where it stops."""
    for _ in range(2):
        job_id, _ = at_work(site, experiment, dice)
        with suppress(ApiError):  # it may have ended since
            site.client.pause(job_id)
            site.until_state(job_id, "paused", "succeeded")
            site.client.resume(job_id)


def paused_as_a_whole(site: Site, experiment: Experiment, dice: random.Random) -> None:
    at_work(site, experiment, dice)
    for _ in range(2):
        experiment.pause()
    until(lambda: {str(job.state) for job in jobs_of(site, experiment)} <= {"paused", "succeeded"}, within_s=120.0)
    assert experiment.refresh().state == "paused"
    for _ in range(2):
        with suppress(ApiError):  # the second finds it running
            experiment.resume()


def paused_with_a_dead_worker(site: Site, experiment: Experiment, dice: random.Random) -> None:
    at_work(site, experiment, dice)
    with unguarded(site):
        kill_all(tree_of(site.the("powergrad: worker")))
        experiment.pause()
        until(lambda: {str(job.state) for job in jobs_of(site, experiment)} <= {"paused", "succeeded"}, within_s=TTL_S + 5.0)
    experiment.resume()


def everything_told_to_end(site: Site, experiment: Experiment, dice: random.Random) -> None:
    at_work(site, experiment, dice)
    end_everything(site, dice)
    site.start()


def another_stack(site: Site, experiment: Experiment, dice: random.Random) -> None:
    at_work(site, experiment, dice)
    assert second_stack(site).returncode == 1


# --- rows 15 to 19: what is sent to the stack meanwhile


def hostile_archives(site: Site, experiment: Experiment, dice: random.Random) -> None:
    at_work(site, experiment, dice)
    for kind in ("upwards", "through a link", "Unicode twins", "zip bomb"):
        name, make, status = HOSTILE[kind]
        (site.data_dir.parent / name).write_bytes(make())
        with pytest.raises(ApiError) as refused:
            site.client.upload_dataset(site.data_dir.parent / name, "evil")
        assert refused.value.status == status
        (site.data_dir.parent / name).unlink()


def odd_images(site: Site, experiment: Experiment, dice: random.Random) -> None:
    at_work(site, experiment, dice)
    for kind in ("truncated", "50,000²"):
        entries, state, _ = ODD[kind]
        assert uploaded(site, site.data_dir.parent, flowers() | entries).state == state


def broken_questions(site: Site, experiment: Experiment, dice: random.Random) -> None:
    at_work(site, experiment, dice)
    with httpx2.Client(base_url=site.client.base_url, trust_env=False, timeout=60.0) as http:
        for name, body in BODIES.items():
            answer = http.post("/v1/experiments", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code in {400, 413, 422}, f"{name}: {answer.status_code} {answer.text[:300]}"
    assert next(iter(site.client.experiments())).id == experiment.id, "nothing was made of them"


def private_addresses(site: Site, experiment: Experiment, dice: random.Random) -> None:
    at_work(site, experiment, dice)
    with receiving() as victim:
        for host in SPELLINGS:
            with pytest.raises(ApiError) as refused:
                ask(site, webhook={"url": f"https://{host}:{victim.port}/"})
            assert refused.value.status == 422, host
        assert victim.connections == 0


def struck(row: int, fault: Fault, name: str, *, short: bool = False) -> object:
    return pytest.param(fault, id=f"{row}, {name}", marks=[pytest.mark.row(row), *([] if short else [pytest.mark.long])])


@pytest.mark.parametrize(
    "fault",
    [
        struck(1, trainer_killed, "trainer killed"),
        struck(2, template_killed, "template killed"),
        struck(3, worker_tree_killed, "worker tree killed", short=True),
        struck(4, trainer_frozen, "trainer frozen"),
        struck(4, worker_frozen, "worker frozen"),
        struck(5, of_the_broker(killed_for(2.0)), "broker killed for 2 s"),
        struck(5, of_the_broker(emptied), "broker emptied"),
        struck(5, of_the_broker(directory_deleted), "broker's directory deleted"),
        struck(5, of_the_broker(file_corrupted), "broker's file corrupted"),
        struck(6, locked_for(SHORT_S, api_too=True), "database away and API killed", short=True),
        struck(6, locked_for(LONG_S), "database locked past the margin"),
        struck(10, killed_in_a_checkpoint, "killed in a checkpoint"),
        struck(11, stopped_at_random_steps, "stopped at random steps"),
        struck(12, paused_as_a_whole, "paused"),
        struck(12, paused_with_a_dead_worker, "paused with a dead worker"),
        struck(13, everything_told_to_end, "everything told to end"),
        struck(14, another_stack, "another stack"),
        struck(15, hostile_archives, "archives"),
        struck(16, odd_images, "images"),
        struck(17, broken_questions, "questions"),
        struck(19, private_addresses, "webhooks"),
    ],
)
def test_an_experiment_ends_as_if_nothing_had_happened(site: Site, expected: Answered, dice: random.Random, fault: Fault) -> None:
    experiment = ask(site)
    fault(site, experiment, dice)
    check(site, experiment, expected)


@pytest.mark.long
@pytest.mark.row(6)
def test_and_so_it_does_on_postgresql(new_site: Callable[..., Site], expected: Answered, dice: random.Random) -> None:
    site = new_site(database="postgresql")
    server = site.postgresql
    assert server is not None
    for away_s in (0.0, SHORT_S, LONG_S):
        experiment = ask(site)
        at_work(site, experiment, dice)
        server.stop()
        pass_by(away_s)
        server.start()
        check(site, experiment, expected)
    for fault in (worker_tree_killed, trainer_killed, stopped_at_random_steps):
        experiment = ask(site)
        fault(site, experiment, dice)
        check(site, experiment, expected)


# --- row 7


@pytest.mark.long
@pytest.mark.row(7)
def test_a_question_stored_but_never_rung_for_is_answered_once(site: Site, expected: Answered, dice: random.Random) -> None:
    key = f"cut-off-{dice.getrandbits(64):x}"
    body = question()

    def send() -> None:
        with suppress(Unreachable), Client(site.client.base_url, retries=0) as client:
            client.ask(body, idempotency_key=key)

    def stored() -> str | None:
        with site.store.read() as tx:
            row = tx.one(select(idempotency_keys.c.job_id).where(idempotency_keys.c.key == key))
            return None if row is None else str(row.job_id)

    api = site.the("powergrad: api")
    with frozen(site.valkey()):
        caller = threading.Thread(target=send)
        caller.start()
        experiment_id: str = until(stored)
        api.kill()
        api.wait(10)
        caller.join()
    until(site.is_ready)
    again = site.client.ask(body, idempotency_key=key)
    assert again.id == experiment_id
    check(site, again, expected, attempts=1)


# --- row 8


@pytest.mark.long
@pytest.mark.row(8)
def test_twenty_doorbells_start_every_run_once(new_site: Callable[..., Site], expected: Answered) -> None:
    site = new_site(workers=4, slots=4)
    workers = site.processes("powergrad: worker")
    assert len(workers) == 4
    with frozen(*workers):
        experiment = ask(site)
        ring(site, times=20)
    check(site, experiment, expected, attempts=1)


# --- row 9


@pytest.mark.long
@pytest.mark.row(9)
def test_a_run_that_crashes_at_every_start_costs_the_answer_one_seed(site: Site, expected: Answered) -> None:
    experiment = ask(site, limits={"max_attempts": 2})
    victim = jobs_of(site, experiment)[0]
    with hurting(site, victim.id, lambda trainer: trainer.send_signal(signal.SIGSEGV)) as crashed:
        found = answered(site, experiment)
    assert len(crashed) == 2
    check(site, experiment, expected, spared=[questions.place_of(victim)])
    assert {place for place, run in found.runs.items() if run.state == "failed"} == {questions.place_of(victim)}
    assert any("crashed" in warning for warning in experiment.refresh().warnings), experiment.warnings
    assert experiment.verdict is not None


@pytest.mark.long
@pytest.mark.row(9)
def test_an_arm_that_diverges_fails_once_and_the_other_is_what_it_is(site: Site) -> None:
    grid = {"optimizer.lr": [0.02, 1000.0]}
    asked = {**question(model={"name": "resnet20", "norm": "none"}, precision="fp32"), "grid": grid}
    first, second = (answered(site, site.client.ask(asked)) for _ in range(2))
    assert (first.state, first.report) == (second.state, second.report)
    assert {place: (run.state, run.reason) for place, run in first.runs.items()} == {
        **{("0", seed): ("succeeded", None) for seed in range(questions.SEEDS)},
        **{("1", seed): ("failed", "diverged") for seed in range(questions.SEEDS)},
    }


# --- rows 10 and 18: checkpoints that are none


@pytest.mark.long
@pytest.mark.row(10)
@pytest.mark.parametrize("content", ["bit flip", "cut"])
def test_a_damaged_checkpoint_is_passed_over(site: Site, expected: Answered, dice: random.Random, content: str) -> None:
    experiment = ask(site)
    job_id, trainer = at_work(site, experiment, dice)
    site.until_checkpoint(job_id)
    with frozen(trainer):
        newest = max((site.job_dir(job_id) / "checkpoints").glob("a*/step-*"), key=lambda path: path.name)
        file = newest / "model.safetensors"
        whole = bytearray(file.read_bytes())
        at = dice.randrange(len(whole))
        whole[at] ^= 1 << dice.randrange(8)
        file.write_bytes(whole if content == "bit flip" else whole[:at])
        trainer.kill()
    check(site, experiment, expected, damaged=frozenset({newest.name}))


@pytest.mark.long
@pytest.mark.row(18)
def test_pickles_in_place_of_checkpoints_are_never_run(site: Site, expected: Answered, dice: random.Random, tmp_path: Path) -> None:
    experiment = ask(site)
    job_id, _ = at_work(site, experiment, dice)
    site.until_checkpoint(job_id)
    experiment.pause()
    site.until_state(job_id, "paused", "succeeded")
    folders = list((site.job_dir(job_id) / "checkpoints").glob("a*/step-*"))
    for path in (path for folder in folders for path in folder.iterdir() if path.suffix != ".json"):
        path.write_bytes(armed(tmp_path / "mark")["pt"])
    experiment.resume()
    check(site, experiment, expected, damaged=frozenset(folder.name for folder in folders))
    assert not (tmp_path / "mark").exists()


# --- row 12: cancelled


@pytest.mark.long
@pytest.mark.row(12)
@pytest.mark.parametrize("worker", ["alive", "dead"])
@pytest.mark.parametrize("state", ["queued", "running", "paused"])
def test_a_cancelled_experiment_ends_and_leaves_nothing_running(site: Site, dice: random.Random, state: str, worker: str) -> None:
    experiment = ask(site, epochs=500)
    if state != "queued":
        until(lambda: any(job.state == "running" for job in jobs_of(site, experiment)))
    if state == "paused":
        experiment.pause()
    family = tree_of(site.the("powergrad: worker"))
    with unguarded(site):
        if worker == "dead":
            kill_all(family)
        for _ in range(2):
            experiment.cancel()
        until(lambda: {str(job.state) for job in jobs_of(site, experiment)} == {"cancelled"}, within_s=10.0)
    until(lambda: experiment.refresh().is_settled, within_s=60.0)
    assert experiment.state == "cancelled"
    made = jobs_of(site, experiment)
    assert len(made) == len({questions.place_of(job) for job in made})
    for job in made:
        ended(site, job.id)


def ended(site: Site, job_id: str) -> None:
    until(lambda: not trainers_of(site, job_id), within_s=10.0)
    site.check_history(job_id)


# --- row 20


@pytest.mark.long
@pytest.mark.row(20)
def test_no_other_owner_sees_or_stops_an_experiment(new_site: Callable[..., Site], expected: Answered, dice: random.Random) -> None:
    site = new_site()
    mine, theirs, revoked = (do(site.store, keys.create, owner=owner) for owner in ("ada", "ben", "ada"))
    do(site.store, keys.revoke, revoked)
    url = site.client.base_url
    until(lambda: httpx2.get(f"{url}/v1/jobs", trust_env=False).status_code == 401)
    site.client.close()
    site.client = Client(url, api_key=mine, retries=PATIENT)
    experiment = ask(site)
    at_work(site, experiment, dice)
    for key, status in ((theirs, 404), (revoked, 401), ("wrong", 401)):
        with Client(url, api_key=key, retries=0) as other:
            held = Experiment(other, experiment.view)
            for call in (held.refresh, held.cancel):
                with pytest.raises(ApiError) as refused:
                    call()
                assert refused.value.status == status
    check(site, experiment, expected, attempts=1)


# --- row 21


@pytest.mark.long
@pytest.mark.row(21)
def test_every_runs_stream_goes_on_over_a_restart_of_the_server(site: Site, expected: Answered, dice: random.Random) -> None:
    experiment = ask(site)
    heard: dict[str, list[int]] = {job.id: [] for job in jobs_of(site, experiment)}

    def follow(job_id: str) -> None:
        with Client(site.client.base_url, retries=PATIENT) as client:
            heard[job_id].extend(event.seq for event in client.stream(job_id))

    readers = [threading.Thread(target=follow, args=(job_id,)) for job_id in heard]
    for reader in readers:
        reader.start()
    at_work(site, experiment, dice)
    site.the("powergrad: api").kill()
    check(site, experiment, expected, attempts=1)
    for reader in readers:
        reader.join(60.0)
    assert heard == {job_id: [event.seq for event in site.events(job_id)] for job_id in heard}


# --- searches


@pytest.mark.long
@pytest.mark.row(1, 3)
@pytest.mark.parametrize("wish", ["left alone", "paused"])
def test_a_search_loses_no_trial_and_its_losers_wait_with_their_checkpoints(site: Site, dice: random.Random, wish: str) -> None:
    """asha: trials that lose stop at a rung for good. The faults come while some train and others wait."""
    space = {"optimizer.lr": {"low": 0.001, "high": 0.2, "log": True}}
    search = {"trials": 5, "reduction": 2}
    experiment = site.client.ask({"spec": small_spec(epochs=4), "strategy": "asha", "space": space, "search": search})
    for fault in (worker_tree_killed, trainer_killed, *((paused_and_resumed,) if wish == "paused" else ())):
        until(lambda: jobs_of(site, experiment))
        fault(site, experiment, dice)
    until(lambda: questions.settled(site, experiment), within_s=questions.SETTLES_WITHIN_S)
    view = experiment.refresh().view.model_dump(mode="json")
    records = [site.record(job.id) for job in jobs_of(site, experiment)]
    broken = history.judge_experiment(view, [record.job for record in records], cancelled=False)
    for record in records:
        broken += history.judge(record, history.Asked(waits=True))
    assert not broken, "\n".join(f"{one.rule}: {one.evidence}" for one in broken)
    states = sorted(record.job["state"] for record in records)
    assert len(states) == 5
    assert {"succeeded", "paused"} == set(states)


def paused_and_resumed(site: Site, experiment: Experiment, dice: random.Random) -> None:
    """Its own pauses at rungs and its user's, told apart."""
    experiment.pause()
    until(lambda: not {str(job.state) for job in jobs_of(site, experiment)} & {"queued", "running", "pausing"})
    experiment.resume()
