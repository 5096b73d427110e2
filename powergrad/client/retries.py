"""When a call is made again, and how long to wait before it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import httpx2

from powergrad.client.errors import retry_after_s

TRY_LATER = frozenset({429, 503})
NEVER_ARRIVED = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


@dataclass(frozen=True)
class Retries:
    """Up to `count` repetitions; waits double from `first_s` to `cap_s`, each cut by up to half at random so that clients spread out."""

    count: int = 5
    first_s: float = 0.25
    cap_s: float = 8.0
    longest_wait_s: float = 60.0
    """A Retry-After beyond this is not waited for: the refusal goes to the caller, who can."""
    dice: random.Random = field(default_factory=random.Random, compare=False)

    def wait_after(self, outcome: httpx2.Response | httpx2.TransportError, *, tries: int, repeatable: bool) -> float | None:
        """Seconds to wait before the next try, or None: this outcome stands.

        tries: requests made so far, this one included.  repeatable: whether doing it twice is the same as doing it once. Where it is
        not, only what certainly did nothing is repeated: a connection that never came about, and 429.
        """
        if tries > self.count or not self._may_pass(outcome, repeatable=repeatable):
            return None
        asked = retry_after_s(outcome) if isinstance(outcome, httpx2.Response) else None
        if asked is not None:
            return asked if asked <= self.longest_wait_s else None
        return min(self.cap_s, self.first_s * 2.0 ** (tries - 1)) * self.dice.uniform(0.5, 1.0)

    @staticmethod
    def _may_pass(outcome: httpx2.Response | httpx2.TransportError, *, repeatable: bool) -> bool:
        if isinstance(outcome, httpx2.Response):
            return outcome.status_code in TRY_LATER if repeatable else outcome.status_code == 429
        if isinstance(outcome, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
            return False
        return repeatable or isinstance(outcome, NEVER_ARRIVED)
