"""What the compose file and the images promise, as far as it stands in the files; scripts/test-compose holds it against real containers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from powergrad.jobs.keys import KEY, TOLD

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOT = {"migrate", "locks"}
PIN = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_has_few_rights(name: str) -> None:
    service = SERVICES[name]
    assert (service["read_only"], service["cap_drop"], service["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"])
    assert service["init"] is True
    assert service["restart"] == ("no" if name in ONE_SHOT else "unless-stopped")
    assert "privileged" not in service


def test_ports_are_this_machines_unless_asked() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"api", "prometheus", "grafana"}
    assert all(port.startswith("${POWERGRAD_BIND:-127.0.0.1}:") for ports in published.values() for port in ports)


def test_monitoring_is_there_when_it_is_asked_for_only() -> None:
    asked = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert asked == {
        "worker": ["gpu"],
        "worker-cpu": ["cpu"],
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
        "dcgm-exporter": ["monitoring-gpu"],
    }


def test_every_file_that_is_mounted_is_there() -> None:
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ()) if volume.startswith("./")]
    assert mounted
    assert [path for path in mounted if not (ROOT / path).exists()] == []


def test_monitoring_scrapes_and_shows_what_compose_starts() -> None:
    folder = ROOT / "docker/monitoring"
    powergrad, dcgm = yaml.safe_load((folder / "prometheus-compose.yml").read_text())["scrape_configs"]
    assert powergrad["static_configs"] == [{"targets": ["api:8642"]}]
    assert powergrad["authorization"]["credentials_file"] == "/run/secrets/metrics_key"
    assert dcgm["dns_sd_configs"][0]["names"][0] in SERVICES
    (source,) = yaml.safe_load((folder / "grafana/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((folder / "grafana/dashboards/powergrad.yml").read_text())["providers"]
    assert f"./docker/monitoring/dashboards:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]


def test_no_secret_has_a_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    secrets = re.findall(r"\$\{(\w*(?:PASSWORD|ADMIN)\w*)(:\?[^}]*)?", text)
    assert {name for name, _ in secrets} == {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "GRAFANA_PASSWORD", "POWERGRAD_FIRST_ADMIN"}
    assert all("./scripts/init-env" in rule for _, rule in secrets)


def test_a_worker_is_given_longer_to_stop_than_a_checkpoint_takes() -> None:
    from worker.settings import WorkerSettings

    for name in ("worker", "worker-cpu"):
        assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) > WorkerSettings(data_dir=Path("/data")).stop_grace_s


def test_the_gpu_worker_has_all_gpus_and_the_cpu_worker_none() -> None:
    (device,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", "all", ["gpu"])
    assert SERVICES["worker-cpu"]["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert (SERVICES["worker"]["profiles"], SERVICES["worker-cpu"]["profiles"]) == (["gpu"], ["cpu"])


def test_images_hold_the_versions_that_were_tested() -> None:
    tested = dict(PIN.findall((ROOT / "requirements.txt").read_text()))
    for image in ("api", "worker", "build"):
        pins = dict(PIN.findall((ROOT / f"docker/requirements-{image}.txt").read_text()))
        assert pins
        # an image has Python 3.12, the tests run on 3.11 too: what is only there for the one is not in the other
        assert {name: (version, tested[name]) for name, version in pins.items() if tested.get(name, version) != version} == {}


def test_images_have_what_the_packages_ask_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(*of: str) -> set[str]:
        found: set[str] = set()
        for one in (one for extra in of for one in extras[extra]):
            inner = re.fullmatch(r"powergrad\[([\w,]+)\]", one)
            found |= names(*inner[1].split(",")) if inner else {re.split(r"[\[><=]", one)[0]}
        return found

    def pinned(image: str) -> set[str]:
        return set(dict(PIN.findall((ROOT / f"docker/requirements-{image}.txt").read_text())))

    assert names("server", "client") <= pinned("api")
    assert names("worker", "client", "tensorboard", "mlflow", "s3") | {"torch", "torchvision"} <= pinned("worker")
    assert not {"torch", "torchvision", "scipy", "matplotlib", "numpy"} & pinned("api")


# --- scripts/init-env


def init_env(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "scripts").mkdir(exist_ok=True)
    shutil.copy(ROOT / "scripts/init-env", folder / "scripts")
    return subprocess.run(["scripts/init-env", *arguments], cwd=folder, capture_output=True, text=True, check=False)


def variables(folder: Path) -> dict[str, str]:
    lines = (folder / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def test_init_env_prints_the_key_once_and_keeps_its_hash(tmp_path: Path) -> None:
    done = init_env(tmp_path, "--gpu")
    assert done.returncode == 0, done.stderr
    key = KEY.fullmatch(done.stdout.strip())
    assert key is not None
    written = variables(tmp_path)
    assert written["POWERGRAD_FIRST_ADMIN"] == f"{key[1]}:{sha256(key[2].encode()).hexdigest()}"
    assert TOLD.fullmatch(written["POWERGRAD_FIRST_ADMIN"])
    assert key[2] not in (tmp_path / ".env").read_text()
    assert written["COMPOSE_PROFILES"] == "gpu"
    assert len({written["POSTGRES_PASSWORD"], written["REDIS_PASSWORD"]}) == 2
    assert min(len(written["POSTGRES_PASSWORD"]), len(written["REDIS_PASSWORD"])) >= 32
    assert os.stat(tmp_path / ".env").st_mode & 0o777 == 0o600


def test_init_env_writes_all_that_compose_asks_for(tmp_path: Path) -> None:
    assert init_env(tmp_path, "--cpu").returncode == 0
    asked = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text()))
    assert asked <= set(variables(tmp_path))


def test_init_env_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=kept\n")
    done = init_env(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert ".env is there already" in done.stderr
    assert (tmp_path / ".env").read_text() == "POSTGRES_PASSWORD=kept\n"


def test_init_env_names_its_options(tmp_path: Path) -> None:
    done = init_env(tmp_path, "--tpu")
    assert done.returncode == 1
    assert "--tpu: unknown. --cpu, --gpu" in done.stderr
    assert not (tmp_path / ".env").exists()
    assert "./scripts/init-env --cpu" in init_env(tmp_path, "--help").stdout
