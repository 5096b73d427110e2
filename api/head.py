"""uvicorn's HTTP, with a bound to how long a request's head may be: httptools keeps what it is sent until the head ends, without one."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD_BYTES = 64 << 10  # beyond what came with the first bytes of the head, which is at most the event loop's 256 KiB


class BoundedHead(HttpToolsProtocol):
    """Answers 400 and hangs up when a head goes on and on: anyone could fill the memory otherwise, without a key."""

    _is_in_head = False
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        was_in_head = self._is_in_head
        super().data_received(data)
        # only what lies wholly within one head is counted: its last bytes may have brought a large body along
        self._head_bytes = self._head_bytes + len(data) if was_in_head and self._is_in_head else 0
        if self._head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of the request has more than {MOST_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()
