"""Which log points count in the speed of a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from benchmarks import slots


@dataclass
class Logged:
    """A runner that has logged one more of its speeds at each look, the first after `late` looks."""

    script: Sequence[float]
    late: int = 0
    _looks: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        self._looks = iter(range(1, self.late + len(self.script) + 1))

    def speeds(self) -> list[float]:
        return list(self.script[: max(0, next(self._looks) - self.late)])


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "POLL_S", 0)


def test_the_first_epoch_does_not_count() -> None:
    assert slots.joint_speed([Logged([1, 1, 1, 1, 100, 300, 200])], points=3) == 200


def test_a_group_is_as_fast_as_its_members_together() -> None:
    assert slots.joint_speed([Logged([1] * 4 + [100] * 3), Logged([1] * 4 + [70] * 3)], points=3) == 170


def test_points_from_before_all_were_warm_do_not_count() -> None:
    early = Logged([1, 1, 1, 1, 900, 900, 100, 100])
    late = Logged([1, 1, 1, 1, 50, 50], late=2)
    assert slots.joint_speed([early, late], points=2) == 150
