"""Sends what the outbox owes: a thread in every API process, any number of them at once.

One event loop holds many tries, so that a receiver that takes its twenty seconds costs a socket. Each try has a connection of its own, to
an address that was checked; it follows no redirect, asks no proxy, and ends in time whatever the other side does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpcore2
import structlog

from powergrad import __version__
from powergrad.addresses import AddressRefused, AllowList, Resolve, addresses_of, checked, target
from powergrad.jobs import outbox
from powergrad.jobs.outbox import Delivery, Due, Result
from powergrad.jobs.store import Store, is_unavailable

LOOK_S = 1.0
SWEEP_S = 3600.0
STEP_S = 10.0
"""Longest that resolving, connecting, or any one read may take."""
TRY_S = 20.0
"""Longest that a try may take; well below the lease of one."""
MOST_ANSWER_BYTES, DRAIN_S = 64 * 1024, 1.0  # the status is all that counts; to read on is courtesy, or the receiver sees a reset
MOST_AT_ONCE, MOST_OF_AN_OWNER, MOST_OF_A_HOST = 32, 8, 2
LOOKED_AT = 256  # receivers a round
GRACE_S = 3.0

log = structlog.get_logger(__name__)


class FixedAddresses(httpcore2.AsyncNetworkBackend):
    """Connects to these addresses and to nothing else, whatever host it is told; TLS still asks for the certificate of the host's name."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._real = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the interface of httpcore2
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        failed: Exception = httpcore2.ConnectError(f"{host}: no address")
        for address in self._addresses:
            try:
                return await self._real.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        raise failed


@dataclass
class Load:
    """The tries at work, by owner and by host: none may take all the places."""

    owners: Counter[str] = field(default_factory=Counter)
    hosts: Counter[str] = field(default_factory=Counter)

    def take(self, one: Due | Delivery) -> bool:
        """Count it in, if there is a place for it."""
        host = host_of(one.url)
        fits = self.owners.total() < MOST_AT_ONCE and self.owners[one.owner] < MOST_OF_AN_OWNER and self.hosts[host] < MOST_OF_A_HOST
        if fits:
            self.owners[one.owner] += 1
            self.hosts[host] += 1
        return fits

    def free(self, one: Delivery) -> None:
        for counter, key in ((self.owners, one.owner), (self.hosts, host_of(one.url))):
            counter[key] -= 1
            if counter[key] <= 0:
                del counter[key]

    @property
    def full_owners(self) -> list[str]:
        return [owner for owner, count in self.owners.items() if count >= MOST_OF_AN_OWNER]

    def copy(self) -> Load:
        return Load(self.owners.copy(), self.hosts.copy())


class Deliverer:
    """Claims due deliveries, sends them and stores what came of it, until stopped.

    tls: None trusts the system's authorities (or those that SSL_CERT_FILE names).
    """

    def __init__(
        self,
        store: Store,
        allow: AllowList,
        *,
        look_s: float = LOOK_S,
        resolve: Resolve = addresses_of,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._store, self._allow, self._look_s, self._resolve, self._tls = store, allow, look_s, resolve, tls
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = threading.Event()
        self._wake = asyncio.Event()
        self._load = Load()
        self._tries: set[asyncio.Task[None]] = set()
        self._grace_s = GRACE_S
        self._sweep_at = 0.0

    def start(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="deliverer", daemon=True)
        self._thread.start()

    def stop(self, *, grace_s: float = GRACE_S) -> None:
        """Claim no more, and let tries that are at work end for so long. What is cut off is sent again once its lease has lapsed."""
        self._grace_s = grace_s
        self._stopping.set()
        self.wake()
        if self._thread is not None:
            self._thread.join(timeout=grace_s + 10)

    def wake(self) -> None:
        """Look for due deliveries now."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._wake.set)

    # --- the loop, in its thread

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._tls is None:
            self._tls = await asyncio.to_thread(httpcore2.default_ssl_context)
        while not self._stopping.is_set():
            self._wake.clear()  # first: who ends while we look is to be seen
            if not await self._began_some():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._look_s):
                        await self._wake.wait()
        await self._wind_up()

    async def _began_some(self) -> bool:
        try:
            claimed = await asyncio.to_thread(self._claimed, self._load.copy())
        except Exception as error:  # noqa: BLE001 - the deliverer outlives its rounds
            _tell(error)
            return False
        for delivery in claimed:
            self._load.take(delivery)
            trying = asyncio.create_task(self._deliver(delivery))
            self._tries.add(trying)
            trying.add_done_callback(self._tries.discard)
        return bool(claimed)

    def _claimed(self, load: Load) -> list[Delivery]:
        if time.monotonic() >= self._sweep_at:
            with self._store.write() as tx:
                outbox.sweep(tx)
            self._sweep_at = time.monotonic() + SWEEP_S
        with self._store.read() as tx:
            waiting = outbox.due(tx, limit=LOOKED_AT, except_owners=load.full_owners)
        wanted = [one for one in waiting if load.take(one)]
        if not wanted:
            return []
        with self._store.write() as tx:
            found = (outbox.claim(tx, one.id) for one in wanted)
            return [delivery for delivery in found if delivery is not None]

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            result = await tried(delivery, allow=self._allow, resolve=self._resolve, tls=self._tls)
            state = await asyncio.to_thread(self._settled, delivery, result)
            to = {"delivery": delivery.id, "host": host_of(delivery.url), "attempt": delivery.attempt}
            log.info("webhook", **to, state=state, status=result.status, error=result.error)
        except Exception as error:  # noqa: BLE001 - the lease lapses, and it is sent again
            _tell(error)
        finally:
            self._load.free(delivery)
            self._wake.set()

    def _settled(self, delivery: Delivery, result: Result) -> str | None:
        with self._store.write() as tx:
            return outbox.settle(tx, delivery, result)

    async def _wind_up(self) -> None:
        if self._tries:
            await asyncio.wait(self._tries, timeout=self._grace_s)
        for late in self._tries:
            late.cancel()
        await asyncio.gather(*self._tries, return_exceptions=True)


# --- one try ---------------------------------------------------------------------------------------------------------------------


async def tried(delivery: Delivery, *, allow: AllowList, resolve: Resolve, tls: ssl.SSLContext | None) -> Result:
    """What comes of one call of the receiver."""
    try:
        async with asyncio.timeout(TRY_S):
            return _judged(await _posted(delivery, allow=allow, resolve=resolve, tls=tls))
    except AddressRefused as error:
        return Result(None, f"not called: {error}", is_final=True)
    except (TimeoutError, httpcore2.TimeoutException):
        return Result(None, f"no answer within {STEP_S:g} s")
    except (OSError, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        return Result(None, f"no answer: {str(error) or type(error).__name__}")
    except Exception as error:  # it must come to its end like any other, and not be claimed for ever
        log.exception("webhooks: a try failed")
        return Result(None, f"a defect of the server: {type(error).__name__}")


def _judged(status: int) -> Result:
    if 200 <= status < 300:
        return Result(status)
    more = {outbox.GONE: ": it wants no more calls", **dict.fromkeys(range(300, 400), ": redirects are not followed")}
    return Result(status, f"the receiver answered {status}{more.get(status, '')}", is_final=status == outbox.GONE)


async def _posted(delivery: Delivery, *, allow: AllowList, resolve: Resolve, tls: ssl.SSLContext | None) -> int:
    found = target(delivery.url, allow=allow)
    async with asyncio.timeout(STEP_S):
        addresses = checked(found, await _resolved(found.host, found.port, resolve), allow=allow)
    url = httpcore2.URL(scheme=found.scheme.encode(), host=found.host.encode(), port=found.port, target=found.path.encode())
    headers: list[tuple[bytes | str, bytes | str]] = [
        ("Host", found.authority),
        ("Content-Type", "application/json"),
        ("User-Agent", f"powergrad/{__version__}"),
        *outbox.signed_headers(delivery, now_ms=time.time_ns() // 1_000_000).items(),
    ]
    steps = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), STEP_S)}
    async with (
        httpcore2.AsyncConnectionPool(ssl_context=tls, max_connections=1, network_backend=FixedAddresses(addresses)) as pool,
        pool.stream("POST", url, headers=headers, content=delivery.body.encode(), extensions=steps) as response,
    ):
        await _drain(response)
        return response.status


async def _drain(response: httpcore2.Response) -> None:
    read = 0
    with contextlib.suppress(TimeoutError, httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError):
        async with asyncio.timeout(DRAIN_S):
            async for chunk in response.aiter_stream():
                read += len(chunk)
                if read >= MOST_ANSWER_BYTES:
                    return


async def _resolved(host: str, port: int, resolve: Resolve) -> Sequence[str]:
    """In a thread of its own, not of a pool: one that hangs in the resolver holds up neither other tries nor the end of the process."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Sequence[str]] = loop.create_future()

    def settle(found: Sequence[str] | None, error: Exception | None) -> None:
        if answer.done():  # nobody waits any more
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(found or ())

    def ask() -> None:
        found, failed = None, None
        try:
            found = resolve(host, port)
        except Exception as error:  # noqa: BLE001 - raised again where it is awaited
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, found, failed)

    threading.Thread(target=ask, name="resolver", daemon=True).start()
    return await answer


def host_of(url: str) -> str:
    """The host in a URL; empty where there is none, which is refused when it is tried."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _tell(error: Exception) -> None:
    if is_unavailable(error):
        log.warning("webhooks: database away", error=str(error).splitlines()[0])
    else:
        log.exception("webhooks: a round failed")
