"""The doorbell's name: the one message there is says "there is work" and carries nothing.

It may come late, twice or never: the row is the job. Both who rings (the API, sweepers) and who hears (the worker) take the names from here.
"""

from __future__ import annotations

TASK = "powergrad.work"
QUEUE = "powergrad"
EXPIRES_S = 60.0  # nobody needs an old ring: idle workers look for themselves, and sweepers ring again
SEND_TIMEOUT_S = 0.2  # a broker that is away must not hold up anybody
