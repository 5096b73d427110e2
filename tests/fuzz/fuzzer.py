"""schemathesis against a site: every operation of the document, with right and wrong data, alone and one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.fuzz.site import CHECKPOINT, ROOT, Owner, Site

REQUEST_TIMEOUT_S = 30
START_S = 120  # beyond the time that was asked for: imports, shrinking what was found
CONFIG = """
[generation]
database = "none"

[checks.positive_data_acceptance]
# 404, 409, 412, 416, 429: what only the server knows
expected-statuses = ["2xx", "304", "404", "409", "412", "416", "429"]

[auth.openapi.key]
bearer = "${FUZZ_KEY}"
"""


@dataclass(frozen=True)
class Found:
    """How a run ended. report: what schemathesis printed."""

    is_clean: bool
    report: str


def fuzz(site: Site, *, seconds: int, seed: int, phases: str = "coverage,fuzzing,stateful", more: tuple[str, ...] = ()) -> Found:
    """Send requests for about so long; the same seed sends the same ones."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        config = Path(folder) / "schemathesis.toml"
        config.write_text(CONFIG)
        command = [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "--config-file",
            str(config),
            "run",
            f"{site.url}/openapi.json",
            "--phases",
            phases,
        ]
        command += ["--max-time", str(seconds), "--seed", str(seed), "--request-timeout", str(REQUEST_TIMEOUT_S), "--checks", "all"]
        command += ["--suppress-health-check", "all", "--no-color", "--warnings", "off", *more]
        done = subprocess.run(command, cwd=folder, env=_environment(site), capture_output=True, timeout=seconds + START_S, check=False)
    report = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    return Found(done.returncode == 0, report)


def _environment(site: Site) -> dict[str, str]:
    told = {
        "key": site.admin,
        "other_key": site.bert.key,
        "anna": site.anna.name,
        "bert": site.bert.name,
        "ids": {owner.name: [*owner.jobs.values(), owner.experiment] for owner in (site.anna, site.bert)},
        "known": _known(site),
        "started_at": datetime.now(UTC).isoformat(),
        "kept": [*_kept(site.anna), *_kept(site.bert), *(key.split("_")[1] for key in (site.admin, site.anna.key, site.bert.key))],
    }
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks",
        "FUZZ_SITE": json.dumps(told),
        "FUZZ_KEY": site.admin,
        "NO_PROXY": "127.0.0.1",
    }


def _known(site: Site) -> dict[str, Any]:
    return {
        "job_id": [*site.anna.jobs.values(), site.bert.jobs["succeeded"]],
        "experiment_id": [site.anna.experiment, site.bert.experiment],
        "checkpoint_id": ["best", "latest", CHECKPOINT],
        "name": ["labels.json", "preprocessing.json"],
    }


def _kept(owner: Owner) -> list[str]:
    return [owner.name, *owner.jobs.values(), owner.experiment]
