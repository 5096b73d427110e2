"""Pairs by construction, through real training: arms that compute the same differ by exactly 0, and PGT at α = 1 is training without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from powergrad import trainer
from powergrad.experiments import statistics
from powergrad.jobs import recording
from powergrad.jobs.claims import Claim, Offer, effective_spec
from powergrad.jobs.experiments import queries
from powergrad.jobs.states import End, Outcome
from powergrad.jobs.store import Store
from powergrad.protocol import Done, Message, TrainerConfig
from tests.jobs import builders as b
from tests.jobs.experiments import builders as e

SMALL: dict[str, Any] = {"data": {"dataset": "digits", "image_size": 8, "batch_size": 256}, "model": {"name": "resnet8"}, "epochs": 2}
ONE_THREAD = Offer(worker="w", device="cpu", gpus=0, cpu_threads=1)


def train_really(store: Store, claim: Claim, folder: Path) -> None:
    """As a supervisor has it trained, in this process."""
    run_dir = folder / claim.run.job_id
    run_dir.mkdir()
    config = TrainerConfig(
        run_id=claim.run.job_id,
        attempt=claim.run.attempt,
        spec=effective_spec(claim).training(),
        run_dir=str(run_dir),
        data_root=str(folder),
        cpu_threads=claim.cpu_threads,
    )
    said: list[Message] = []
    assert isinstance(trainer.run(config, emit=said.append, orders=trainer.StandingOrders()), Done)
    with store.write() as tx:
        recording.record(tx, claim.run, said)
        recording.finish(tx, claim.run, End(Outcome.SUCCEEDED))


def test_arms_that_compute_the_same_differ_by_exactly_nothing(sqlite_store: Store, tmp_path: Path) -> None:
    """α = 1, an α that goes from 1 to 1, and a job of no experiment whose spec says nothing of a loss."""
    grid = {"loss.alpha": [1.0, {"start": 1.0, "end": 1.0}, 0.3]}
    experiment_id = e.submit(sqlite_store, spec=SMALL, grid=grid, seeds=2)
    with sqlite_store.write() as tx:
        from powergrad.jobs import submission

        plain = submission.submit(tx, submission.Submission(b.spec(**SMALL))).job_id
    while (claim := b.claim(sqlite_store, ONE_THREAD)) is not None:
        train_really(sqlite_store, claim, tmp_path)
    e.advance(sqlite_store)
    with sqlite_store.read() as tx:
        findings = statistics.analyse(queries.evidence(tx, experiment_id), resamples=0)
    same, other = findings["arms"][1]["difference"], findings["arms"][2]["difference"]
    assert same is not None
    assert (same["n"], same["mean"], same["sd"], same["conclusion"]) == (2, 0.0, 0.0, "identical")
    assert other is not None
    assert other["mean"] != 0.0  # the arms are trained, and not copied
    first = next(run for run in e.runs(sqlite_store, experiment_id) if (run.arm, run.seed) == (0, 0))
    for name in ("val_top1", "val_loss", "train_loss"):
        assert b.row(sqlite_store, first.job_id).latest[name] == b.row(sqlite_store, plain).latest[name]
