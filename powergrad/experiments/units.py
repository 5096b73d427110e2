"""How an experiment's numbers are named and written: shares in percent, losses in nats, what has no value as a dash."""

from __future__ import annotations

from dataclasses import dataclass

NOTHING = "–"
_SPLITS = {"train": "training", "val": "validation", "test": "test", "ema_val": "validation (averaged weights)"}
_KINDS = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "loss": "loss", "ece": "calibration error"}


@dataclass(frozen=True)
class Unit:
    """What a metric is measured in."""

    name: str
    """`%`, as it stands after a value; empty where there is none."""
    of_difference: str
    """`points`: a difference of two shares is no share."""
    scale: float
    """Stored values times this are shown."""
    digits: int
    """After the point."""

    def value(self, stored: float | None) -> str:
        """`91.23`, without the unit."""
        return NOTHING if stored is None else f"{stored * self.scale:,.{self.digits}f}".replace("-", "−")

    def difference(self, stored: float | None) -> str:
        """`+0.42`, without the unit; what rounds to nothing has no sign."""
        if stored is None:
            return NOTHING
        text = f"{stored * self.scale:+,.{self.digits}f}"
        return text[1:] if float(text.replace(",", "")) == 0 else text.replace("-", "−")


PERCENT = Unit("%", "points", 100.0, 2)
POINTS = Unit("points", "points", 100.0, 2)
NATS = Unit("nats", "nats", 1.0, 4)
PLAIN = Unit("", "", 1.0, 4)
RATE = Unit("images/s", "images/s", 1.0, 0)
EPOCHS = Unit("epochs", "epochs", 1.0, 1)
SECONDS = Unit("s", "s", 1.0, 1)
JOULES = Unit("J", "J", 1.0, 0)


def unit(metric: str) -> Unit:
    """Of a metric, by its name."""
    if metric == "gap":
        return POINTS
    if metric.endswith(("top1", "top5", "ece")):
        return PERCENT
    if metric.endswith("loss"):
        return NATS
    return RATE if metric.endswith("_per_s") else PLAIN


def in_words(metric: str) -> str:
    """`validation top-1 accuracy`; a name that is not known stays as it is."""
    if metric == "gap":
        return "generalisation gap"
    split, _, kind = metric.rpartition("_")
    if split in _SPLITS and kind in _KINDS:
        return f"{_SPLITS[split]} {_KINDS[kind]}"
    return {"images_per_s": "throughput"}.get(metric, metric)


def titled(metric: str) -> str:
    """In words, with its unit: `validation top-1 accuracy (%)`."""
    name = unit(metric).name
    return f"{in_words(metric)} ({name})" if name else in_words(metric)


def p_value(p: float | None) -> str:
    """`0.012`, `< 0.001`."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def printable(text: str) -> str:
    """The text on one line, with no letter in it that a file format forbids."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))


def shortened(text: str, most: int) -> str:
    """Printable, and at most so many letters: the middle is left out, for names differ at their ends."""
    text = printable(text)
    head = (most - 1) * 2 // 3
    return text if len(text) <= most else f"{text[:head]}…{text[head + 1 - most :]}"
