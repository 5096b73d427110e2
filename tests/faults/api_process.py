"""The API as a process of its own, to be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from powergrad.cli.stack import ask, free_port
from powergrad.jobs.store import Store
from tests.worker.conftest import until

ROOT = Path(__file__).parents[2]
NO_BROKER = "redis://127.0.0.1:1/0"  # nothing listens on port 1
STARTS_WITHIN_S = 60.0


@dataclass
class ApiProcess:
    """A real API process over a SQLite store that can be killed and started again on its port."""

    folder: Path
    store: Store
    settings: dict[str, str] = field(default_factory=dict)
    """More of its environment."""
    port: int = field(default_factory=lambda: free_port("127.0.0.1"))
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "POWERGRAD_DATA_DIR": str(self.folder),
            "POWERGRAD_DATABASE_URL": self.store.url.render_as_string(),
            "POWERGRAD_PORT": str(self.port),
            "REDIS_URL": NO_BROKER,
            **self.settings,
        }
        log = (self.folder / "api.log").open("ab")
        self.process = subprocess.Popen([sys.executable, "-P", "-m", "api"], env=environment, cwd=self.folder, stdout=log, stderr=log)
        until(lambda: ask("127.0.0.1", self.port, "/healthz")[0] == 200, within_s=STARTS_WITHIN_S)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def log(self) -> str:
        return (self.folder / "api.log").read_text()

    def rss_mib(self) -> float:
        assert self.process is not None
        return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20

    def connections(self) -> int:
        assert self.process is not None
        return sum(one.status == psutil.CONN_ESTABLISHED for one in psutil.Process(self.process.pid).net_connections("tcp"))

    def streams(self) -> int:
        """Open streams, as the server counts them."""
        lines = ask("127.0.0.1", self.port, "/metrics")[1].splitlines()
        return int(float(next(line.split()[1] for line in lines if line.startswith("powergrad_streams "))))
