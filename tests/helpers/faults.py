"""Faults on the way to a store: a proxy in front of an S3 server that holds, refuses or slows down
the requests that a test names.

Invariant: a request whose client has gone away is never passed on, so that a killed writer's chunk
stays unwritten, as it would without a proxy. Signatures are passed on as they came; the tests' S3
server does not look at them.
"""

import re
import select
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from typing import NamedTuple
from urllib.parse import urlsplit

_LOOK_EVERY_S = 0.05
_CHUNK = re.compile(r"/chunks/(?:[0-9a-f]{2}/)?(\d{10})\.safetensors")
_FIRST_BYTE = re.compile(r"bytes (\d+)-")
_NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class Request(NamedTuple):
    method: str
    path: str

    @property
    def chunk(self) -> int | None:
        """The number of the chunk that it is about."""
        match = _CHUNK.search(self.path)
        return int(match[1]) if match else None


Matches = Callable[[Request], bool]


def publications(*, but: Collection[int] = ()) -> Matches:
    """Every publication of a chunk, except for those of these numbers."""
    return lambda request: (
        request.method == "PUT" and request.chunk is not None and request.chunk not in but
    )


def everything(_request: Request) -> bool:
    return True


@dataclass(slots=True, eq=False)
class Fault:
    matches: Matches
    status: int | None  # what is answered in the server's place; None: it is passed on
    seconds: float  # that it is kept before
    times: float  # that it still strikes
    truncates: bool = False  # what the server answers is handed on by half, well-formed
    is_late: bool = False  # the answer is kept, and not the request


class FaultyS3:
    """The proxy. Its faults begin and end while requests are under way; the newest that matches a
    request strikes."""

    def __init__(self, upstream: str) -> None:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_request(self) -> None:
                proxy._serve(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_request

            def log_message(self, *_: object) -> None:
                pass

        self._upstream = urlsplit(upstream)
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._held: list[Request] = []
        self._passed: list[Request] = []
        self._refused: list[tuple[int, Request]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def held(self) -> list[Request]:
        """What waits here now."""
        with self._lock:
            return list(self._held)

    @property
    def passed(self) -> list[Request]:
        """What reached the server so far, in order."""
        with self._lock:
            return list(self._passed)

    @property
    def refused(self) -> list[tuple[int, Request]]:
        """What was answered in the server's place, with its status, in order."""
        with self._lock:
            return list(self._refused)

    def hold(self, matches: Matches) -> Fault:
        """Keep matching requests until the fault ends, or until their clients give up."""
        return self._begin(Fault(matches, None, float("inf"), float("inf")))

    def hold_answers(self, matches: Matches) -> Fault:
        """Pass matching requests on, and keep what the server answers, as `hold` keeps requests."""
        return self._begin(Fault(matches, None, float("inf"), float("inf"), is_late=True))

    def slow(self, matches: Matches, *, seconds: float) -> Fault:
        """Keep each matching request for so long before it is passed on."""
        return self._begin(Fault(matches, None, seconds, float("inf")))

    def refuse(self, matches: Matches, *, status: int, times: float = float("inf")) -> Fault:
        """Answer matching requests with the status in the server's place, so many times."""
        return self._begin(Fault(matches, status, 0.0, times))

    def truncate(self, matches: Matches, *, times: float) -> Fault:
        """Hand on half of what the server answers to matching requests, as if the object were no
        longer, so many times."""
        return self._begin(Fault(matches, None, 0.0, times, truncates=True))

    def end(self, *faults: Fault) -> None:
        """End these faults, or every one; what they hold goes on."""
        with self._lock:
            self._faults = [fault for fault in self._faults if faults and fault not in faults]

    def __enter__(self) -> "FaultyS3":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _begin(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.insert(0, fault)
        return fault

    def _strike(self, request: Request) -> Fault | None:
        with self._lock:
            fault = next(
                (each for each in self._faults if each.times > 0 and each.matches(request)), None
            )
            if fault is not None:
                fault.times -= 1
            return fault

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        request = Request(handler.command, handler.path)
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        fault = self._strike(request)
        is_late = fault is not None and fault.is_late
        if fault is not None and not is_late and not self._kept(request, fault, handler.connection):
            handler.close_connection = True
            return
        if fault is not None and fault.status is not None:
            with self._lock:
                self._refused.append((fault.status, request))
            _answer(
                handler, fault.status, {"Content-Type": "application/xml"}, _error(fault.status)
            )
            return
        with self._lock:
            self._passed.append(request)
        try:
            answer = self._ask(handler, body)
        except OSError:  # the server has ended
            handler.close_connection = True
            return
        if fault is not None and is_late and not self._kept(request, fault, handler.connection):
            handler.close_connection = True
            return
        _answer(handler, *(_halved(*answer) if fault is not None and fault.truncates else answer))

    def _kept(self, request: Request, fault: Fault, client: socket.socket) -> bool:
        """Keep a request for as long as its fault wants; False where the client went away
        meanwhile."""
        until = monotonic() + fault.seconds
        with self._holding(request):
            while monotonic() < until and fault in self._faults:
                if _has_gone(client, wait_s=min(_LOOK_EVERY_S, max(until - monotonic(), 0.0))):
                    return False
        return not _has_gone(client, wait_s=0.0)

    @contextmanager
    def _holding(self, request: Request) -> Iterator[None]:
        with self._lock:
            self._held.append(request)
        try:
            yield
        finally:
            with self._lock:
                self._held.remove(request)

    def _ask(
        self, handler: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection(str(self._upstream.hostname), self._upstream.port, timeout=60)
        try:
            headers = {
                name: value
                for name, value in handler.headers.items()
                if name.lower() not in _NOT_PASSED_ON
            }
            connection.request(
                handler.command,
                handler.path,
                body=body or None,
                headers=headers | {"Content-Length": str(len(body))},
            )
            answer = connection.getresponse()
            found = {
                name: value
                for name, value in answer.getheaders()
                if name.lower() not in _NOT_PASSED_ON
            }
            length = answer.getheader("Content-Length")
            if handler.command == "HEAD" and length is not None:
                found["Content-Length"] = length
            return answer.status, found, answer.read()
        finally:
            connection.close()


def _answer(
    handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes
) -> None:
    try:
        handler.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)
    except OSError:  # the client went away
        handler.close_connection = True


def _halved(status: int, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
    if status not in (200, 206):
        return status, headers, body
    start = int(match[1]) if (match := _FIRST_BYTE.match(headers.get("Content-Range", ""))) else 0
    half = body[: len(body) // 2]
    end = start + len(half)
    lies = {"Content-Range": f"bytes {start}-{end - 1}/{end}"} if status == 206 else {}
    return status, headers | lies, half


def _error(status: int) -> bytes:
    known = {
        403: ("AccessDenied", "Access denied."),
        503: ("SlowDown", "Please reduce your request rate."),
    }
    code, words = known.get(status, ("InternalError", "We encountered an internal error."))
    return (
        "<?xml version='1.0' "
        f"encoding='UTF-8'?><Error><Code>{code}</Code><Message>{words}</Message></Error>"
    ).encode()


def _has_gone(client: socket.socket, *, wait_s: float) -> bool:
    """Whether a client has hung up; waits for it as long as this."""
    look = select.poll()  # `select` knows no descriptors above 1023, and a long soak has more
    look.register(client, select.POLLIN)
    try:
        return bool(look.poll(1000 * wait_s)) and client.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        return True
