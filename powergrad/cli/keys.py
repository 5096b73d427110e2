"""`powergrad keys` and `powergrad quota`: who may call the server, and how much. They work on its database, because the first key has to come
from somewhere and the last may have been lost.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from powergrad.cli import console
from powergrad.cli.console import EXIT_CODES, Code, JsonOption, Problem
from powergrad.cli.up import default_data_dir

if TYPE_CHECKING:
    from powergrad.jobs.quotas import Quota
    from powergrad.jobs.store import Store

NO_LIMIT = "none"

app = typer.Typer(
    help="Make, list and revoke the keys that callers show. Where there is one, the server asks every caller for one.",
    no_args_is_help=True,
    epilog=EXIT_CODES,
)

DataDirOption = Annotated[
    Path | None,
    typer.Option(
        help="The server's data directory, if its database lies there; POWERGRAD_DATABASE_URL names another.",
        parser=console.path,
        metavar="PATH",
        envvar="POWERGRAD_DATA_DIR",
        show_default="~/.powergrad",
    ),
]


@app.command(epilog=EXIT_CODES)
def create(
    owner: Annotated[
        str, typer.Option(help="Whose jobs the key shows and makes. `local` has those from before there were keys.")
    ] = "local",
    name: Annotated[str, typer.Option(help="A name to know the key by.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(metavar="read|submit|admin", help="What it is good for; each includes those before it.", show_default="submit"),
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="The same as --scope admin: it manages keys and quotas too.")] = False,
    expires: Annotated[
        str | None, typer.Option(metavar="30d", help="It ends so long from now: 45m, 12h, 30d, 8w.", show_default="never")
    ] = None,
    as_json: JsonOption = False,
    data_dir: DataDirOption = None,
) -> None:
    """Make a key and print it, this once."""
    from powergrad.jobs import keys
    from powergrad.jobs.rows import LOCAL_OWNER

    if admin and scope:
        raise Problem("--admin and --scope: give one of the two; --admin is --scope admin", code=Code.USAGE)
    scopes = frozenset({keys.Scope.ADMIN}) if admin else frozenset(_scope(one) for one in scope or ())
    ttl_s = None if expires is None else console.seconds(expires, option="--expires")
    with _opened(data_dir) as store, store.write() as tx:
        is_first = not keys.are_configured(tx)
        try:
            key = keys.create(tx, owner=owner, name=name, scopes=scopes or frozenset({keys.Scope.SUBMIT}), ttl_s=ttl_s)
        except ValueError as error:
            raise Problem(str(error), code=Code.USAGE) from None
        made, place = keys.get(tx, key), _shown_place(store)
    if as_json:
        console.print_json({**made, "key": key})
    else:
        sys.stdout.write(f"{key}\n")
        sys.stdout.flush()
    console.say(f"This key of [bold]{escape(owner)}[/] is in {escape(place)} as a hash only: nothing can show it again.")
    console.say("Clients take it from the environment: export POWERGRAD_API_KEY=…")
    if is_first:
        console.say("It is the first: from now on the server asks every caller for a key.")
        if keys.Scope.ADMIN not in scopes:
            console.say("[yellow]No key manages keys and quotas yet:[/] powergrad keys create --admin")
        if owner != LOCAL_OWNER:
            console.say("Jobs from before there were keys belong to [bold]local[/]: powergrad keys create shows them again.")


@app.command("list", epilog=EXIT_CODES)
def list_keys(as_json: JsonOption = False, data_dir: DataDirOption = None) -> None:
    """List the keys, newest first, without what opens the server."""
    from powergrad.jobs import keys

    with _opened(data_dir) as store, store.read() as tx:
        found, place = keys.listed(tx), _shown_place(store)
    if as_json:
        console.print_json(found)
    elif not found:
        console.say(f"No key is in {escape(place)}: the server is for its own machine, and asks for none.")
    else:
        console.print_table(("key", "owner", "name", "scopes", "state", "created", "expires"), [_cells(key) for key in found])


@app.command(epilog=EXIT_CODES)
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="Id of the key: the twelve characters after pg_.")],
    as_json: JsonOption = False,
    data_dir: DataDirOption = None,
) -> None:
    """Revoke a key. A running server knows within a second; sessions that it began end with it."""
    from powergrad.jobs import keys
    from powergrad.jobs.errors import KeyNotFound

    with _opened(data_dir) as store, store.write() as tx:
        try:
            revoked = keys.revoke(tx, key.removeprefix("pg_") if keys.id_of(key) is None else key)
        except KeyNotFound as error:
            raise Problem(f"{_shown_place(store)}: {error}") from None
        is_locked = not keys.have_working(tx)
    if as_json:
        console.print_json(revoked)
    console.say(f"{revoked['id']} of {escape(revoked['owner'])} opens nothing any more.")
    if is_locked:
        console.say("[yellow]No working key is left: until there is one, the server opens nothing to anybody.[/]")


def quota(
    owner: Annotated[str, typer.Argument(help="As keys name it.")],
    queued: Annotated[str | None, typer.Option(metavar="N", help="Jobs in the queue.")] = None,
    running: Annotated[str | None, typer.Option(metavar="N", help="Jobs that run at a time.")] = None,
    gpu_hours: Annotated[
        str | None,
        typer.Option(metavar="H", help="Hours on one GPU, over all jobs ever; on two GPUs each counts twice, on half of one half."),
    ] = None,
    gib: Annotated[str | None, typer.Option(metavar="G", help="GiB of checkpoints, artifacts and uploaded data sets.")] = None,
    lift: Annotated[bool, typer.Option("--none", help="Lift every limit first.")] = False,
    as_json: JsonOption = False,
    data_dir: DataDirOption = None,
) -> None:
    """Show what an owner has and may have, and set limits; a limit called `none` is lifted, those not named stay."""
    from powergrad.jobs import quotas

    _check_owner(owner)
    limits = {
        "max_queued": _limit("--queued", queued, 1, is_whole=True),
        "max_running": _limit("--running", running, 1, is_whole=True),
        "max_gpu_s": _limit("--gpu-hours", gpu_hours, 3600),
        "max_bytes": _limit("--gib", gib, 2**30),
    }
    named = {field: None if value == NO_LIMIT else value for field, value in limits.items() if value is not None}
    with _opened(data_dir) as store, store.write() as tx:
        if lift or named:
            quotas.grant(tx, owner, _with(quotas.Quota() if lift else quotas.granted(tx, owner), named))
        found = quotas.usage(tx, owner)
    if as_json:
        console.print_json(found)
    else:
        console.print_table(("of " + owner, "used", "granted"), _usage_cells(found))


def have_working(data_dir: Path) -> bool:
    """Whether the database of a stack on this directory holds a key that works; nothing is made where there is none. Raises Problem."""
    from powergrad.jobs import keys, migrate

    url = _database_url(data_dir)
    if url.startswith("sqlite") and not (data_dir / "powergrad.db").exists() and not os.environ.get("POWERGRAD_DATABASE_URL"):
        return False
    with _database(url) as store:
        if not migrate.is_current(store):
            return False  # an older release's database has no keys
        with store.read() as tx:
            return keys.have_working(tx)


@contextmanager
def _opened(data_dir: Path | None) -> Iterator[Store]:
    """The server's database, made where there is none yet. Raises Problem."""
    from powergrad.jobs import migrate

    with _database(_database_url(data_dir)) as store:
        if not migrate.is_current(store):
            _make(store)
        yield store


def _make(store: Store) -> None:
    """Make the tables in an empty database. Raises Problem for one of another release: the server's own upgrade is to change that."""
    from sqlalchemy import inspect

    from powergrad.jobs import migrate

    if inspect(store.engine).get_table_names():
        raise Problem(
            f"{_shown_place(store)}: its tables are not this release's.",
            advice="Upgrade it with the server stopped: powergrad up does so at its start, or python -P -m powergrad.jobs.migrate",
        )
    migrate.migrate(store)


@contextmanager
def _database(url: str) -> Iterator[Store]:
    try:
        from sqlalchemy.exc import ArgumentError, SQLAlchemyError

        from powergrad.jobs.store import Store
    except ImportError as error:
        raise Problem(f"{error.name} is missing.", advice="pip install 'powergrad[server]'") from None
    store = None
    try:
        _make_private(url)
        store = Store(url)
        yield store
    except (ArgumentError, ImportError, ValueError) as error:
        if store is not None:
            raise
        raise Problem(
            "POWERGRAD_DATABASE_URL: must be sqlite:////ABSOLUTE/PATH.db or postgresql+psycopg://USER:PASSWORD@HOST/DB"
        ) from error
    except SQLAlchemyError as error:
        where = _shown_place(store) if store else "the database"
        raise Problem(f"{where}: {str(error).splitlines()[0]}") from None
    finally:
        if store is not None:
            store.close()


def _make_private(url: str) -> None:
    """The folder of a SQLite file, made as `powergrad up` makes it: for its user alone."""
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def _database_url(data_dir: Path | None) -> str:
    place = (data_dir or default_data_dir()).expanduser().absolute()
    return os.environ.get("POWERGRAD_DATABASE_URL") or f"sqlite:///{place / 'powergrad.db'}"


def _shown_place(store: Store) -> str:
    return store.url.database or "memory" if store.is_sqlite else store.url.render_as_string(hide_password=True)


def _scope(text: str) -> Any:
    from powergrad.jobs.keys import Scope

    try:
        return Scope(text)
    except ValueError:
        raise Problem(f"--scope {text}: must be {', '.join(Scope)}", code=Code.USAGE) from None


def _check_owner(owner: str) -> None:
    from powergrad.spec import NAME_PATTERN

    if not re.fullmatch(NAME_PATTERN, owner):
        raise Problem(f"owner={owner!r}: must match {NAME_PATTERN}", code=Code.USAGE)


def _limit(option: str, text: str | None, unit: int, *, is_whole: bool = False) -> float | int | str | None:
    """A limit in its own unit; NO_LIMIT to lift it; None to let it stay."""
    if text is None or text == NO_LIMIT:
        return text
    if not re.fullmatch(r"[0-9]{1,9}" if is_whole else r"[0-9]{1,9}(\.[0-9]{1,6})?", text):
        raise Problem(f"{option} {text}: must be a {'whole ' if is_whole else ''}number from 0 to 999999999, or none", code=Code.USAGE)
    return int(text) if is_whole else round(float(text) * unit)


def _with(quota: Quota, limits: dict[str, Any]) -> Quota:
    from dataclasses import replace

    return replace(quota, **limits)


def _cells(key: dict[str, Any]) -> list[str]:
    dates = [(str(key[field] or "–"))[:16].replace("T", " ") for field in ("created_at", "expires_at")]
    return [str(key["id"]), str(key["owner"]), str(key["name"]) or "–", ", ".join(key["scopes"]), str(key["state"]), *dates]


def _usage_cells(usage: dict[str, Any]) -> list[list[str]]:
    rows = [("queued jobs", "queued", 1), ("running jobs", "running", 1), ("GPU hours", "gpu_seconds", 3600), ("GiB", "bytes", 2**30)]
    return [[title, _amount(usage[field]["used"], unit), _amount(usage[field]["granted"], unit)] for title, field, unit in rows]


def _amount(value: float | None, unit: int) -> str:
    if value is None:
        return "no limit"
    return f"{value:,}" if unit == 1 else f"{value / unit:,.2f}"
