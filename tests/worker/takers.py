"""A process that takes and gives back parts of made-up GPUs as fast as it can, and ends badly when another holds what it holds.

    python -m tests.worker.takers FOLDER SEED

Whatever it holds it marks by files that must not be there: two holders of one quarter cannot both make them.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from tests.worker.test_slots import worker
from worker.slots import TakenSlots

GPUS, TURNS, PATIENCE_S = 2, 20, 60.0


def main(folder: Path, seed: int) -> None:
    dice, slots = random.Random(seed), worker(folder / "locks", GPUS)
    deadline, turns = time.monotonic() + PATIENCE_S, 0
    while turns < TURNS:
        if time.monotonic() > deadline:
            raise SystemExit(f"{turns} turns of {TURNS} within {PATIENCE_S:g} s")
        wanted = dice.choice([0.25, 0.5, 0.75, 1, 2])
        with slots.take() as taken:
            if taken is not None and slots.resize(taken, wanted) is None:
                mark(folder, taken)
                turns += 1


def mark(folder: Path, taken: TakenSlots) -> None:
    marks = [folder / f"{index}-{token}" for index, token in sorted(taken.held)]
    for path in marks:
        path.touch(exist_ok=False)
    for path in marks:
        path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
