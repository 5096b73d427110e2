"""Commands about the server: what it runs on and what it knows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from powergrad.cli import completion, console
from powergrad.cli.console import JsonOption, UrlOption


def workers(as_json: JsonOption = False, url: UrlOption = None) -> None:
    """List the live workers, their devices and what they run."""
    with console.connect(url) as client:
        found = client.workers()
    if as_json:
        console.print_json(found)
    elif not found:
        console.say("No worker is alive: queued jobs wait. `powergrad up` starts one.")
    else:
        console.print_table(("worker", "host", "state", "slots", "devices", "runs"), [_worker_cells(worker) for worker in found])


def models(as_json: JsonOption = False, url: UrlOption = None) -> None:
    """List the networks a spec may name."""
    with console.connect(url) as client:
        found = client.models()
    if as_json:
        console.print_json(found)
    elif not found:
        console.say("No worker has said yet what it can train.")
    else:
        console.print_table(("model", "family", "parameters", "norm"), [_model_cells(model) for model in found])


def presets(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="Print this one's spec, as JSON that `powergrad submit -` takes.", autocompletion=completion.preset_names
        ),
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """List the paper's experiments, or print one as a job spec."""
    with console.connect(url) as client:
        if name is not None:
            preset = client.preset(name)
            console.print_json(preset if as_json else preset["spec"])
            return
        found = client.presets()
    if as_json:
        console.print_json(found)
    else:
        console.print_table(("preset", "title", "paper's val top-1"), [_preset_cells(one) for one in found])


def _preset_cells(preset: dict[str, Any]) -> list[str]:
    return [str(preset["name"]), str(preset["title"]), console.percent(preset["paper"]["val_top1"])]


def _worker_cells(worker: dict[str, Any]) -> list[str]:
    devices = ", ".join(_device(device) for device in worker.get("devices") or []) or "–"
    running = ", ".join(str(job) for job in worker.get("running") or []) or "nothing"
    return [
        str(worker["id"]),
        str(worker.get("host", "–")),
        str(worker.get("state", "–")),
        str(len(worker.get("slots") or [])),
        devices,
        running,
    ]


def _device(device: dict[str, Any]) -> str:
    memory, quarters = device.get("memory_bytes"), device.get("quarters_in_use")
    told = [*([console.size(memory)] if memory else []), *([f"{quarters} of 4 quarters in use"] if quarters else [])]
    return f"{device.get('name', '?')} ({', '.join(told)})" if told else str(device.get("name", "?"))


def _model_cells(model: dict[str, Any]) -> list[str]:
    parameters = model.get("parameters")
    return [
        str(model["name"]),
        str(model.get("family", "–")),
        f"{parameters / 1e6:.1f} M" if isinstance(parameters, int | float) else "–",
        ", ".join(model.get("norms") or []) or "–",
    ]
