"""`python -P -m api`: one uvicorn process."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
from typing import Any

import structlog
import uvicorn
from pydantic import ValidationError
from setproctitle import setproctitle
from sqlalchemy.exc import SQLAlchemyError

from api.head import BoundedHead
from api.main import create_app
from api.parts import Parts
from api.routes.health import schema_problem
from api.settings import ApiSettings, is_loopback, wrong_variables
from powergrad.jobs import keys, logs

EX_CONFIG = 78  # sysexits.h: a setting is wrong; starting again does not help
GRACE_S = 2
# Short turns for threads: the event loop gives the GIL away at every send, and gets it back when the thread that stores has had its turn.
# Against Python's 5 ms: 15 % more submissions a second, half their p95
SWITCH_INTERVAL_S = 0.0005

log = structlog.get_logger("api")


class Server(uvicorn.Server):
    """uvicorn that cuts off who does not read, and at its end ends the streams first: it would wait for both."""

    def __init__(self, config: uvicorn.Config, parts: Parts) -> None:
        super().__init__(config)
        self._parts = parts

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers if self.started else ():
            for listener in server.sockets:
                _cut_off_the_stalled(listener, after_s=self._parts.settings.stalled_s)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._parts.stop_streams()
        await super().shutdown(sockets)


def main() -> int:
    setproctitle("powergrad: api")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        settings = ApiSettings()
    except ValidationError as error:
        sys.stderr.write("".join(f"powergrad api: {line}\n" for line in wrong_variables(error)))
        return EX_CONFIG
    logs.configure(settings.log_format)
    logs.catch_unhandled()
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    try:
        app = create_app(settings)
    except OSError as error:  # the folder of a SQLite file
        wrong = f"{error.filename}: cannot be made ({error.strerror}): POWERGRAD_DATA_DIR or POWERGRAD_DATABASE_URL must name another place"
        sys.stderr.write(f"powergrad api: {wrong}\n")
        return EX_CONFIG
    try:
        outdated = schema_problem(app.state.parts.store)
    except SQLAlchemyError as error:
        outdated = None  # it may come yet: until then every route says 503
        log.warning("database does not answer", error=str(error).splitlines()[0])
    if outdated is not None:
        log.error("will not start", database=outdated)
        return EX_CONFIG
    if (unsafe := _exposed(app.state.parts)) is not None:
        sys.stderr.write(f"powergrad api: {unsafe}\n")
        return EX_CONFIG
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=BoundedHead,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=75,
    )
    # uvicorn raises the signal again when it has ended well; an end that was asked for is exit code 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _spare_the_collector()
    Server(config, app.state.parts).run()
    return 0


def _exposed(parts: Parts) -> str | None:
    """Why the server must not listen where it is to; None where it may.

    While the database is away nobody knows; then it may, as it opens nothing there without a key that the database holds.
    """
    host = parts.settings.host
    if is_loopback(host):
        return None
    try:
        with parts.store.read() as tx:
            if keys.have_working(tx):
                return None
    except SQLAlchemyError:
        return None
    return (
        f"POWERGRAD_HOST={host}: other machines can reach this address, and there is no key that they would have to show. Make one: "
        "powergrad keys create. Or listen on 127.0.0.1, and come from another machine by ssh -L 8642:127.0.0.1:8642 THIS_HOST"
    )


def _cut_off_the_stalled(listener: Any, *, after_s: float) -> None:
    """Let the kernel reset connections whose other end takes nothing of what is sent; who connects here inherits it.

    uvicorn waits for such a reader for ever, and so does closing the connection, which would send the rest first.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(after_s * 1000))


def _spare_the_collector() -> None:
    """What is loaded by now stays: looking through it again and again took an eighth to a third of a submission."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


if __name__ == "__main__":
    sys.exit(main())
