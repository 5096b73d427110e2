"""Real receivers of webhooks: HTTP and HTTPS servers on loopback that note every connection and every call."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "hooks.test"


@dataclass(frozen=True)
class Call:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


@dataclass(frozen=True)
class Answer:
    status: int = 204
    headers: dict[str, str] = field(default_factory=dict)
    body: Iterable[bytes] = ()


@dataclass
class Receiver:
    """A running receiver. connections: how many were opened to it, whether or not anything was said."""

    address: str
    port: int
    calls: list[Call] = field(default_factory=list)
    connections: int = 0
    sent_bytes: int = 0
    answer: Callable[[Call], Answer] = lambda _: Answer()

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}/hook"

    @property
    def listed(self) -> str:
        """The receiver as the allow-list names it."""
        return f"{self.address}:{self.port}"


@contextmanager
def receiving(
    answer: Callable[[Call], Answer] = lambda _: Answer(), *, address: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[Receiver]:
    """A receiver until the block ends; a port of its own where none is given."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            call = Call(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            receiver.calls.append(call)
            said = receiver.answer(call)
            with suppress(OSError):  # the other side has had enough
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for chunk in said.body:
                    self.wfile.write(chunk)
                    receiver.sent_bytes += len(chunk)

        def log_request(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
            connection, peer = self.socket.accept()
            receiver.connections += 1
            return connection, peer

        def finish_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
            with suppress(OSError):  # a handshake that the caller ends
                super().finish_request(tls.wrap_socket(request, server_side=True) if tls else request, client_address)

    server = Server((address, port), Handler)
    receiver = Receiver(address, server.server_address[1], answer=answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="receiver")
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@dataclass(frozen=True)
class Authority:
    """A certificate for `hooks.test` alone, and who trusts it."""

    certificate: Path
    key: Path

    @classmethod
    def made_in(cls, folder: Path) -> Authority:
        made = cls(folder / "certificate.pem", folder / "key.pem")
        more = [f"subjectAltName=DNS:{NAME}", "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,digitalSignature"]
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        command += ["-subj", f"/CN={NAME}", "-keyout", str(made.key), "-out", str(made.certificate)]
        subprocess.run([*command, *(part for one in more for part in ("-addext", one))], check=True, capture_output=True)
        return made

    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate))
