"""A compose project of the real files on the Docker engine that DOCKER_HOST points at."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import yaml

from powergrad.cli.stack import free_port
from powergrad.client import Client, Retries

ROOT = Path(__file__).parents[2]
TAG = "under-test"
BUILT = ("powergrad-api", "powergrad-worker")
LONG_S = 1800.0
READY_S = 180.0
PATIENT = Retries(count=60, cap_s=2.0)
"""A client that waits out the fall of any container."""


def command() -> list[str]:
    """How compose is called here: the plugin, or the program of its own that came before it."""
    asked = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if asked.returncode == 0 else ["docker-compose"]


def docker(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, timeout=LONG_S)
    assert done.returncode == 0 or not check, f"docker {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


def until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Seconds until it held. Fails when it has not held by then."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"after {seconds:.0f} s still not: {what}"
        time.sleep(0.2)
    return time.monotonic() - began


@dataclass
class Project:
    """Containers, volumes and a network of one name, from a copy of the checkout's files with an .env of its own."""

    folder: Path
    name: str
    key: str
    port: int = field(default_factory=lambda: free_port("127.0.0.1"))

    @classmethod
    def fresh(cls, folder: Path, name: str) -> Project:
        """What `git clone` and `./scripts/init-env --cpu` leave."""
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for relative in listed.decode().rstrip("\0").split("\0"):
            if (ROOT / relative).is_file():  # a file that was deleted and not yet committed is listed too
                (folder / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / relative, folder / relative)
        made = subprocess.run(["scripts/init-env", "--cpu"], cwd=folder, capture_output=True, text=True, check=True)
        project = cls(folder, name, made.stdout.strip())
        project._configure()
        return project

    def again(self, name: str, folder: Path) -> Project:
        """The same files and secrets as another project: an empty stack to restore into."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        other = Project(folder, name, self.key)
        other._configure()
        return other

    def _configure(self) -> None:
        """A free port, a folder of locks and a tag of its own; and the network to build in, where the engine needs one named."""
        environment = self.folder / ".env"
        kept = [line for line in environment.read_text().splitlines() if not re.match("POWERGRAD_(PORT|LOCK_DIR|TAG)=", line)]
        own = [f"POWERGRAD_PORT={self.port}", f"POWERGRAD_LOCK_DIR={self.folder}/locks", f"POWERGRAD_TAG={TAG}"]
        environment.write_text("\n".join([*kept, *own]) + "\n")
        network = os.environ.get("POWERGRAD_BUILD_NETWORK")
        services = {name: {"build": {"network": network}} for name in ("migrate", "api", "worker", "worker-cpu")} if network else {}
        (self.folder / "docker-compose.override.yml").write_text(yaml.safe_dump({"version": "3.8", "services": services}))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "COMPOSE_PROJECT_NAME": self.name,
            "DOCKER_BUILDKIT": "1",
            "COMPOSE_DOCKER_CLI_BUILD": "1",
            "COMPOSE_PROFILES": "cpu",
        }

    def compose(self, *arguments: str, stdin: str | None = None) -> str:
        return self._run([*command(), *arguments], stdin)

    def shell(self, script: str) -> None:
        """Run lines of a document as they stand there, whichever compose this machine has."""
        as_function = 'docker() { if [ "$1" = compose ]; then shift; command $COMPOSE "$@"; else command docker "$@"; fi; }'
        self._run(["bash", "-c", f"set -eu\nCOMPOSE='{' '.join(command())}'\n{as_function}\n{script}"])

    def _run(self, words: list[str], stdin: str | None = None) -> str:
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, input=stdin, capture_output=True, text=True, check=False, timeout=LONG_S
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def up(self) -> float:
        """Seconds until the stack says that jobs can run."""
        began = time.monotonic()
        self.compose("up", "-d")
        until(self.is_ready, READY_S, "/readyz says 200")
        return time.monotonic() - began

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "5")

    def is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz", trust_env=False, timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    def client(self) -> Client:
        return Client(self.url, api_key=self.key, retries=PATIENT)

    def container(self, service: str) -> str:
        return self.compose("ps", "-q", service).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(docker("inspect", self.container(service)))[0]
        return found

    def kill(self, service: str) -> float:
        """Kill all that runs in a container but its init; seconds until Docker has started it again."""
        before = self.inspect(service)
        docker("exec", before["Id"], "sh", "-c", "kill -9 -1", check=False)

        def is_back() -> bool:
            state = self.inspect(service)["State"]
            return bool(state["Running"]) and state["StartedAt"] != before["State"]["StartedAt"]

        return until(is_back, READY_S, f"{service} is started again")
