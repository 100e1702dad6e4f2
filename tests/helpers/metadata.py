"""A metadata server on loopback that behaves as a cloud's own does: the same paths, headers and
refusals."""

import json
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from typing import Any, Literal

AWS_TOKEN = "/latest/api/token"
AWS_ACTION = "/latest/meta-data/spot/instance-action"
GCP_PREEMPTED = "/computeMetadata/v1/instance/preempted"
AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
AZURE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_FLAVOR = {"Metadata-Flavor": "Google"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said in the cloud's place."""

    status: int = 200
    text: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    after_s: float = 0.0


class MetadataServer:
    """Use it as a context manager. `answers` says what a path answers instead of what its cloud
    would; `asked` is what came in."""

    def __init__(
        self, cloud: Literal["aws", "gcp", "azure"], *, token_seconds: float | None = None
    ) -> None:
        server = self
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str]] = []
        self._cloud, self._token_seconds = cloud, token_seconds
        self._tokens: dict[str, float] = {}
        self._events: list[dict[str, Any]] = []
        self._action: str | None = None
        self._preempted = False
        self._closed = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_request(self) -> None:
                server._serve(self)

            do_GET = do_PUT = do_request

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def announce(
        self, deadline: float, *, machine: str = "worker_0", event: str = "Preempt"
    ) -> None:
        """From now on this machine ends at `deadline`, in unix seconds; on gcp in half a minute.
        Azure's events name their machine."""
        moment = datetime.fromtimestamp(deadline, tz=UTC)
        self._action = json.dumps(
            {"action": "terminate", "time": moment.strftime("%Y-%m-%dT%H:%M:%SZ")}
        )
        self._preempted = True
        self._events.append(
            {
                "EventId": "602d9444-d2cd-49c7-8624-8643e7171297",
                "EventStatus": "Scheduled",
                "EventType": event,
                "ResourceType": "VirtualMachine",
                "Resources": [machine],
                "NotBefore": format_datetime(moment, usegmt=True),
                "Description": "",
                "EventSource": "Platform",
                "DurationInSeconds": -1,
            }
        )

    def withdraw(self) -> None:
        """There is another machine in this one's place, whose end nobody has announced."""
        self._action, self._preempted, self._events = None, False, []

    def begin(self) -> None:
        """What Azure has scheduled has begun: it no longer says when."""
        self._events = [
            event | {"EventStatus": "Started", "NotBefore": ""} for event in self._events
        ]

    def __enter__(self) -> "MetadataServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append((handler.command, handler.path))
        answer = self.answers.get(handler.path) or getattr(self, f"_{self._cloud}")(handler)
        self._closed.wait(answer.after_s)
        try:
            handler.send_response_only(answer.status)
            handler.send_header("Content-Length", str(len(answer.text.encode())))
            for name, value in answer.headers:
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(answer.text.encode())
        except OSError:
            pass  # nobody waited for it

    def _aws(self, handler: BaseHTTPRequestHandler) -> Answer:
        if handler.path == AWS_TOKEN:
            ttl = handler.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
            if handler.command != "PUT" or ttl is None or handler.headers.get("X-Forwarded-For"):
                return Answer(405 if handler.command != "PUT" else 400)
            token = f"AQAEA{len(self._tokens):08d}=="
            self._tokens[token] = monotonic() + (
                float(ttl) if self._token_seconds is None else self._token_seconds
            )
            return Answer(text=token)
        if (
            self._tokens.get(handler.headers.get("X-aws-ec2-metadata-token", ""), 0.0)
            <= monotonic()
        ):
            return Answer(401)
        return (
            Answer(text=self._action)
            if handler.path == AWS_ACTION and self._action
            else Answer(404)
        )

    def _gcp(self, handler: BaseHTTPRequestHandler) -> Answer:
        if handler.headers.get("Metadata-Flavor") != "Google":
            return Answer(403, "Missing Metadata-Flavor:Google header.")
        if handler.path == "/computeMetadata/v1/":
            return Answer(text="instance/\noslogin/\nproject/\n", headers=tuple(_FLAVOR.items()))
        if handler.path == GCP_PREEMPTED:
            return Answer(
                text="TRUE" if self._preempted else "FALSE", headers=tuple(_FLAVOR.items())
            )
        return Answer(404)

    def _azure(self, handler: BaseHTTPRequestHandler) -> Answer:
        if handler.headers.get("Metadata") != "true":
            return Answer(400, '{"error": "Bad request. Required metadata header not specified"}')
        if handler.path == "/metadata/versions":
            return Answer(text='{"apiVersions": ["2020-07-01", "2021-02-01"]}')
        if handler.path == AZURE_EVENTS:
            return Answer(
                text=json.dumps({"DocumentIncarnation": len(self._events), "Events": self._events})
            )
        return Answer(text="worker_0") if handler.path == AZURE_NAME else Answer(404)
