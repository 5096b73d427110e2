"""What every test may ask for."""

from __future__ import annotations

import os

# before torch is imported: tests fork, and the fork of a process that has computed on several threads hangs in its own computation
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.stores"]

# the machine's speed is no fact about the code: no deadlines; the same examples in every run unless HYPOTHESIS_PROFILE=explore
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))
