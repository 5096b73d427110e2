"""`powergrad webhooks`: the secret that signs them, and whether they were heard."""

from __future__ import annotations

import itertools
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from powergrad.cli import console
from powergrad.cli.console import EXIT_CODES, Code, Finish, JsonOption, UrlOption

if TYPE_CHECKING:
    from powergrad.client import Client, Delivery, WebhookSecret

LOOK_S = 0.2
STATE_STYLES = {"pending": "yellow", "delivered": "green", "failed": "red"}

app = typer.Typer(
    help="Show the secret that signs webhooks, what was sent, and send a test.",
    no_args_is_help=True,
    epilog=EXIT_CODES,
)

DeliveryArgument = Annotated[str, typer.Argument(metavar="ID", help="A delivery's id, as `powergrad webhooks deliveries` lists it.")]


@app.command(epilog=EXIT_CODES)
def secret(as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Print the secret that signs your webhooks; it is made at the first call."""
    with console.connect(url) as client:
        _print_secret(client.webhook_secret(), as_json=as_json)


@app.command(epilog=EXIT_CODES)
def rotate(as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Make a new secret and print it. The old one signs beside it for 24 hours."""
    with console.connect(url) as client:
        _print_secret(client.rotate_webhook_secret(), as_json=as_json)


def _print_secret(found: WebhookSecret, *, as_json: bool) -> None:
    if as_json:
        console.print_json(found.model_dump(mode="json"))
        return
    sys.stdout.write(f"{found.secret}\n")
    sys.stdout.flush()
    if found.previous_until is not None:
        console.say(f"The secret before it signs too, until {found.previous_until:%Y-%m-%d %H:%M} UTC.")


@app.command(epilog=EXIT_CODES)
def deliveries(
    job: Annotated[str | None, typer.Option("--job", "-j", help="Only those of this job: an id, a part of one, or `last`.")] = None,
    state: Annotated[
        str | None, typer.Option("--state", "-s", metavar="pending|delivered|failed", help="Only those in this state.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many, the newest.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """List what was sent in the last 30 days, newest first."""
    with console.connect(url) as client:
        job_id = None if job is None else console.find(client, job)
        found = list(itertools.islice(client.deliveries(job=job_id, state=state, page_size=min(limit, 100)), limit))
    if as_json:
        console.print_json([one.model_dump(mode="json") for one in found])
    elif not found:
        console.say("Nothing was sent yet. A job with a webhook tells of its moves.")
    else:
        console.print_table(("delivery", "event", "job", "state", "tries", "answer", "made"), [_cells(one) for one in found])


def _cells(one: Delivery) -> list[str]:
    answer = str(one.status) if one.status is not None else one.error or "–"
    return [one.id, one.event, one.job or "–", one.state, str(one.attempt), answer, console.ago(one.created_at)]


@app.command("test", epilog=EXIT_CODES)
def send_test(
    receiver: Annotated[str, typer.Argument(metavar="URL", help="Whom to call: https, at a public address or a host the server allows.")],
    wait_s: Annotated[float, typer.Option("--wait", min=0.0, metavar="SECONDS", help="How long to wait for the first try's end.")] = 30.0,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Send an event `webhook.test`, and say what came of it."""
    with console.connect(url) as client:
        _show(_tried(client, client.test_webhook(receiver), wait_s), as_json=as_json)


@app.command(epilog=EXIT_CODES)
def retry(
    delivery: DeliveryArgument,
    wait_s: Annotated[float, typer.Option("--wait", min=0.0, metavar="SECONDS", help="How long to wait for the try's end.")] = 30.0,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Send a delivery again, now, and say what came of it."""
    with console.connect(url) as client:
        _show(_tried(client, client.retry_delivery(delivery), wait_s), as_json=as_json)


def _tried(client: Client, made: Delivery, wait_s: float) -> Delivery:
    """The delivery when its next try has come to something, or as it is after `wait_s`."""
    deadline, seen = time.monotonic() + wait_s, made
    while time.monotonic() < deadline:
        if seen.state != "pending" or (seen.attempt > made.attempt and seen.error is not None):
            return seen
        time.sleep(LOOK_S)
        seen = client.delivery(made.id)
    return seen


def _show(seen: Delivery, *, as_json: bool) -> None:
    """Raises Finish where nobody heard it."""
    if as_json:
        console.print_json(seen.model_dump(mode="json"))
    else:
        console.stdout().print(f"{seen.id} [{STATE_STYLES.get(seen.state, 'default')}]{seen.state}[/]")
        if seen.state != "delivered":
            console.say(seen.error or "No answer yet.")
        if seen.next_try_at is not None:
            console.say(f"[dim]The next try is at {seen.next_try_at:%H:%M:%S} UTC: powergrad webhooks deliveries[/]")
    if seen.state != "delivered":
        raise Finish(Code.FAILED)
