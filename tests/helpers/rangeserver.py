"""A server of the tests' own that speaks enough S3 to be read and written: HEAD, GET with Range,
PUT and deletions, on loopback.

What it serves may lie in a file, so objects can be larger than memory. It is slow, breaks off, or
answers a status where a test says so.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic
from typing import NamedTuple
from urllib.parse import urlsplit

_AT_ONCE = 256 << 10
_KEY = re.compile(rb"<Key>(.*?)</Key>")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Asked(NamedTuple):
    """A request, and the bytes of the object that it was for."""

    method: str
    path: str
    start: int
    end: int


class Refusal(NamedTuple):
    """What is answered to everything."""

    status: int
    code: str


@dataclass(eq=False)
class RangeServer:
    """Its objects by path, /bucket/key, and how it behaves."""

    objects: dict[str, bytes | Path] = field(default_factory=dict)
    bytes_per_s: float = float("inf")  # on each connection
    breaks_off_after: int | None = None  # bytes of a body; the connection is closed then
    silent_from: int | None = None  # the byte of an object before which every answer stops coming
    refusal: Refusal | None = None
    honours_conditions: bool = True  # If-None-Match: *
    asked: list[Asked] = field(default_factory=list)
    bytes_sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    # at its end: whoever is kept waiting may go
    released: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""

    @contextmanager
    def running(self) -> Iterator["RangeServer"]:
        server = _Server(("127.0.0.1", 0), _Handler)
        server.behaviour = self
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            self.released.set()
            server.shutdown()
            thread.join()
            server.server_close()


def sparse_file(path: Path, num_bytes: int) -> Path:
    """A file of this size that takes little room, of which no two stretches of a MiB are alike."""
    with path.open("wb") as file:
        for at in range(0, num_bytes - 8, 1 << 20):
            file.seek(at)
            file.write(at.to_bytes(8, "little"))
        file.truncate(num_bytes)
    return path


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    behaviour: RangeServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        here = self.server.behaviour
        if self._refused():
            return None
        path = urlsplit(self.path).path
        found = here.objects.get(path)
        if found is None:
            return self._answer(404, _error("NoSuchKey"))
        size = found.stat().st_size if isinstance(found, Path) else len(found)
        wanted = _RANGE.fullmatch(self.headers["Range"] or "")
        start, end = (int(wanted[1]), min(int(wanted[2]) + 1, size)) if wanted else (0, size)
        with here.lock:
            here.asked.append(Asked(self.command, path, start, end))
        if wanted and start >= size:
            return self._answer(416, _error("InvalidRange"))
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{size}"} if wanted else {}
        self._head(206 if wanted else 200, end - start, headers)
        if self.command != "HEAD":
            self._send(found, start, end)
        return None

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        here = self.server.behaviour
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._refused():
            return
        with here.lock:
            is_taken = (
                self.path in here.objects
                and self.headers["If-None-Match"] == "*"
                and here.honours_conditions
            )
            if not is_taken:
                here.objects[self.path] = body
        self._answer(412 if is_taken else 200, b"")

    def do_POST(self) -> None:
        """Many deletions at once: what obstore asks for even where there is one."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._refused():
            return
        keys = [key.decode() for key in _KEY.findall(body)]
        for key in keys:
            self.server.behaviour.objects.pop(f"{urlsplit(self.path).path}/{key}", None)
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self._answer(
            200,
            f"<?xml version='1.0' encoding='UTF-8'?>"
            f"<DeleteResult>{deleted}</DeleteResult>".encode(),
        )

    def _refused(self) -> bool:
        refusal = self.server.behaviour.refusal
        if refusal is not None:
            self._answer(refusal.status, _error(refusal.code))
        return refusal is not None

    def _answer(self, status: int, body: bytes) -> None:
        self._head(status, len(body), {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        own = {
            "Content-Length": str(length),
            "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
            "ETag": '"1"',
        }
        for name, value in (own | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, found: bytes | Path, start: int, end: int) -> None:
        """At the pace of the connection, by what a file system hands to the socket itself where it
        is a file."""
        here, began, at = self.server.behaviour, monotonic(), start
        last = end if here.breaks_off_after is None else min(end, start + here.breaks_off_after)
        last = last if here.silent_from is None else min(last, max(start, here.silent_from))
        file = found.open("rb") if isinstance(found, Path) else None
        try:
            while at < last:
                size = min(_AT_ONCE, last - at)
                if file is None:
                    assert isinstance(found, bytes)
                    self.wfile.write(found[at : at + size])
                else:
                    size = os.sendfile(self.connection.fileno(), file.fileno(), at, size)
                at += size
                with here.lock:
                    here.bytes_sent += size
                here.released.wait(
                    max(0.0, (at - start) / here.bytes_per_s - (monotonic() - began))
                )
            if here.silent_from is not None and last < end:
                here.released.wait()
        except OSError:
            self.close_connection = True
        finally:
            if file is not None:
                file.close()
        self.close_connection = self.close_connection or last < end

    def log_message(self, *_: object) -> None:
        """Quietly."""


def _error(code: str) -> bytes:
    return (
        f"<?xml version='1.0' encoding='UTF-8'?>\n<Error>\n<Code>{code}</Code><Message>status "
        "503, timed out</Message></Error>"
    ).encode()
