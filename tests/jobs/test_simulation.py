"""Workers, users and sweepers act on a few jobs at random, on a store that now and then fails before, in or after a commit; after every
step the history must hold together.

One thread and a clock that the machine turns make every failure repeatable: hypothesis prints the shortest story that breaks a rule.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy.exc import OperationalError

from tests.jobs.world import World
from tests.stores import Fault

MIGRATED: list[Path] = []
picks = st.integers(0, 99)
OFTEN = {"train": 6, "claim": 4, "wait": 3, "sweep": 3, "act": 3, "renew": 2, "finish": 2, "overtake": 3, "submit": 1, "die": 1}
HAPPENINGS = [name for name, weight in OFTEN.items() for _ in range(weight)]


class History(RuleBasedStateMachine):
    world: World | None = None

    @initialize()
    def start(self) -> None:
        self.world = World(MIGRATED[0])

    def teardown(self) -> None:
        if self.world is not None:
            self.world.calm_down()
            self.world.close()

    @rule(name=st.sampled_from(HAPPENINGS), pick=picks, amount=picks, fault=st.sampled_from([None] * 6 + list(Fault)))
    def happen(self, name: str, pick: int, amount: int, fault: Fault | None) -> None:
        # one rule: of several, hypothesis leaves out most in each example, and then hardly a worker ever meets its successor
        assert self.world is not None
        self.world.store.fault = fault
        with suppress(OperationalError):
            getattr(self.world, name)(pick, amount)
        self.world.store.fault = None

    @invariant()
    def everything_holds(self) -> None:
        if self.world is not None:
            self.world.everything_holds()


@pytest.fixture(autouse=True)
def _migrated(sqlite_file: Path) -> None:
    MIGRATED[:] = [sqlite_file]


TestHistory = pytest.mark.timeout(600)(History.TestCase)  # hypothesis takes up to five minutes to shorten a failure
TestHistory.settings = settings(max_examples=100, stateful_step_count=40)
