"""How much of the GPUs a job has: whole ones, or one to three quarters of one with as much of its memory."""

from __future__ import annotations

QUARTERS = 4
PARTS = (0.25, 0.5, 0.75)
MOST = 64
RULE = f"must be {', '.join(f'{part:g}' for part in PARTS[:-1])} or {PARTS[-1]:g} for a part of one GPU, or a whole number from 0 to {MOST}"
SLACK = 0.1  # of a part's memory: the driver keeps some for itself, and whoever works beside it is a little above its own part

_PARTS_IN_WORDS = {0.25: "a quarter of a GPU", 0.5: "half a GPU", 0.75: "three quarters of a GPU"}


def amount(gpus: float) -> int | float:
    """The same number, an int where it is whole. Raises ValueError for what is neither whole nor a number of quarters below 1."""
    if gpus in PARTS:
        return gpus
    if gpus != int(gpus) or not 0 <= gpus <= MOST:
        raise ValueError(RULE)
    return int(gpus)


def quarters(part: float) -> int:
    """How many quarters a part of a GPU is."""
    return round(part * QUARTERS)


def in_words(gpus: float) -> str:
    """`half a GPU`, `1 GPU`, `4 GPUs`."""
    return _PARTS_IN_WORDS.get(gpus) or ("1 GPU" if gpus == 1 else f"{gpus:g} GPUs")


def quarters_with_memory(total_bytes: int, used_bytes: int) -> int:
    """How many quarters of a GPU have their memory free, 0 to 4.

    What is promised to trainers beside it and not yet used by them counts as free: nobody but the driver knows whose the used bytes are.
    """
    part = total_bytes / QUARTERS * (1 - SLACK)
    return max(0, min(QUARTERS, int((total_bytes - used_bytes) / part))) if part > 0 else QUARTERS
