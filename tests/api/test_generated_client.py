"""A client that openapi-python-client generates from the document: without a warning, and at work on a real server."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from api.openapi import GPUS, ONE_NUMBER
from tests.api.conftest import Api

CONFIG = Path(__file__).parents[2] / "docs" / "openapi-python-client.yaml"
PACKAGE = "powergrad_api"


@pytest.fixture(scope="module")
def generated(_sqlite_api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What the generator said; the package can be imported."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(_sqlite_api.http.get("/openapi.json").text)  # the generator itself waits for 5 s at most
    command: list[str | Path] = [Path(sys.executable).with_name("openapi-python-client"), "generate", "--path", folder / "openapi.json"]
    command += ["--config", CONFIG, "--meta", "none", "--output-path", folder / PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(folder))
    yield done.stdout + done.stderr
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def part(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")


def test_the_generator_warns_of_nothing(generated: str) -> None:
    assert "warning" not in generated.lower(), generated


def test_every_operation_has_its_function(generated: str, api: Api) -> None:
    document = api.http.get("/openapi.json").json()
    missing = []
    for item in document["paths"].values():
        for operation in item.values():
            module = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in operation["operationId"])
            tag = operation.get("tags", ["default"])[0].replace("-", "_")
            if not hasattr(part(f"api.{tag}.{module}"), "sync_detailed"):
                missing.append(operation["operationId"])
    assert missing == []


def test_a_job_is_submitted_and_read(generated: str, api: Api) -> None:
    models = part("models")
    client = part("client").Client(base_url=api.url)
    spec = models.JobSpec(
        data=models.DigitsData(dataset="digits", image_size=8),
        optimizer=models.AdamWSpec(name="adamw", lr=0.002),
        loss=models.LossSpec(alpha=0.25),
        resources=models.ResourcesSpec(gpus=0.5),
        epochs=3,
    )
    job = part("api.jobs.create_job").sync(client=client, body=spec)
    assert isinstance(job, models.Job)
    stored = api.job(job.id)
    assert stored["spec"]["optimizer"]["lr"] == 0.002
    assert stored["spec"]["resources"]["gpus"] == 0.5
    read = part("api.jobs.get_job").sync(job.id, client=client)
    assert read.to_dict() | {"created_at": stored["created_at"]} == stored  # a time it spells in its own way
    assert read.created_at.isoformat(timespec="milliseconds").replace("+00:00", "Z") == stored["created_at"]
    assert isinstance(read.spec.optimizer, models.AdamWSpec)
    listed = part("api.jobs.list_jobs").sync(client=client, limit=1)
    assert [one.id for one in listed.data] == [job.id]


def test_a_refusal_comes_as_the_problem_it_is(generated: str, api: Api) -> None:
    models = part("models")
    spec = models.JobSpec(data=models.DigitsData(dataset="digits"), loss=models.LossSpec(alpha=7.0))
    told = part("api.jobs.create_job").sync_detailed(client=part("client").Client(base_url=api.url), body=spec)
    assert told.status_code == 422
    assert isinstance(told.parsed, models.Problem)
    assert {violation.pointer for violation in told.parsed.errors} == {"/loss/alpha"}


def test_the_number_of_gpus_is_the_same_said_as_one_kind() -> None:
    numbers: list[Any] = [float(Fraction(n, 16)) for n in range(-32, 66 * 16)] + list(range(-2, 67))
    one, other = jsonschema_rs.validator_for({"anyOf": GPUS}), jsonschema_rs.validator_for(ONE_NUMBER)
    assert [number for number in numbers if one.is_valid(number)] == [number for number in numbers if other.is_valid(number)]
