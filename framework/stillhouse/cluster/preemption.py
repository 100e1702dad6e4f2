"""Preemption notices: the announcement that a machine will be taken away, and its deadline.

The clouds announce it on a metadata server that every machine reaches at a link-local address;
Kubernetes and Slurm send SIGTERM. Nothing here ever ends a run: a server that is absent, hangs or
answers nonsense has announced nothing. Requests go to the server directly, without proxies and
redirects, so that no other server can answer in its place.
"""

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException
from types import FrameType
from typing import Literal
from urllib.parse import urlsplit

_log = logging.getLogger(__name__)

Source = Literal["aws", "gcp", "azure", "sigterm", "ray"]
Cloud = Literal["aws", "gcp", "azure"]

_LINK_LOCAL = "http://169.254.169.254"
_TIMEOUT_S = 2.0
_MOST_BYTES = 1 << 20
_LOOK_AGAIN_S = 60.0  # for a cloud, where none has answered yet
_GCP_LEFT_S = 30.0  # from the mark to the end: cloud.google.com/compute/docs/instances/preemptible
# events that end a machine; the others pause it
_AZURE_ENDS = ("Preempt", "Terminate", "Reboot", "Redeploy")


@dataclass(frozen=True, slots=True)
class PreemptionNotice:
    """The announced end of a machine. Its data has to be safe elsewhere by `deadline`."""

    source: Source
    deadline: float  # unix seconds
    detail: str  # what was announced, in the source's own words


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The URL of each cloud's metadata server."""

    aws: str = _LINK_LOCAL
    gcp: str = _LINK_LOCAL  # its name, metadata.google.internal, would need a name server
    azure: str = _LINK_LOCAL


# takes the time in unix seconds; the notice, or None where there is none. May raise what
# `_NO_ANSWER` lists
Ask = Callable[[float], PreemptionNotice | None]


class NoAnswer(Exception):
    """A metadata server's answer cannot be used: an unexpected status, or nonsense."""


_NO_ANSWER = (NoAnswer, OSError, HTTPException)


def aws(endpoint: str, now: float) -> PreemptionNotice | None:
    """EC2's spot interruption notice, about two minutes ahead, by IMDSv2. A rebalance
    recommendation is no notice.

    In a container the instance's hop limit has to be 2:
    docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html
    """
    token = {"X-aws-ec2-metadata-token": _aws_token(endpoint)}
    found = _get(endpoint, "/latest/meta-data/spot/instance-action", token, absent=404)
    if found is None:
        return None
    values = _parsed(found)
    deadline = _unix_seconds(values.get("time"), empty=now)
    return PreemptionNotice("aws", deadline, f"spot instance-action {values.get('action')}")


def gcp(endpoint: str, now: float) -> PreemptionNotice | None:
    """Compute Engine's mark on a preempted spot machine, 30 s ahead."""
    found = _get_gcp(endpoint, "/computeMetadata/v1/instance/preempted")
    if found is None or found.strip().upper() != "TRUE":
        return None
    return PreemptionNotice("gcp", now + _GCP_LEFT_S, "instance/preempted is TRUE")


def azure(endpoint: str, now: float) -> PreemptionNotice | None:
    """Azure's scheduled events that end this machine, 30 s ahead at least. Events of the other
    machines of a scale set are left out."""
    found = _parsed(_get_azure(endpoint, "/metadata/scheduledevents?api-version=2020-07-01"))
    events = [event for event in _list_in(found, "Events") if isinstance(event, dict)]
    endings = [event for event in events if event.get("EventType") in _AZURE_ENDS]
    if not endings:
        return None
    name = _azure_name(endpoint)
    notices = [
        PreemptionNotice(
            "azure",
            _unix_seconds(event.get("NotBefore"), empty=now),
            f"scheduled event {event['EventType']}",
        )
        for event in endings
        if name is None or name in _names_in(event)
    ]
    return min(notices, key=lambda notice: notice.deadline, default=None)


_CLOUDS: Mapping[Cloud, Callable[[str, float], PreemptionNotice | None]] = {
    "aws": aws,
    "gcp": gcp,
    "azure": azure,
}


def cloud_here(endpoints: Endpoints) -> Cloud | None:
    """The cloud whose metadata server answers in that cloud's own way; None where none does."""
    probes: Mapping[Cloud, Callable[[], object]] = {
        "gcp": lambda: _get_gcp(endpoints.gcp, "/computeMetadata/v1/"),
        "azure": lambda: _parsed(_get_azure(endpoints.azure, "/metadata/versions"))["apiVersions"],
        "aws": lambda: _aws_token(endpoints.aws),
    }
    for cloud, probe in probes.items():
        with suppress(*_NO_ANSWER, KeyError):
            probe()
            return cloud
    return None


def local_sources(
    kind: Literal["auto", "aws", "gcp", "azure", "off"], endpoints: Endpoints
) -> list[Ask]:
    """The sources of notices on this machine. `auto` looks for the cloud at the first call, which
    may take seconds: call it in a thread."""
    if kind == "off":
        return []
    here: Cloud | None = None if kind == "auto" else kind
    next_look = 0.0

    def ask(now: float) -> PreemptionNotice | None:
        nonlocal here, next_look
        if here is None and now >= next_look:
            here, next_look = cloud_here(endpoints), now + _LOOK_AGAIN_S
        return _CLOUDS[here](getattr(endpoints, here), now) if here is not None else None

    return [ask]


@contextmanager
def sigterm(grace_s: float, *, clock: Callable[[], float] = time.time) -> Iterator[Ask]:
    """SIGTERM as a notice: while the block lasts, it announces an end in `grace_s` seconds, and
    ends nothing by itself. Main thread only.

    Yields the source, which answers at once. A second SIGTERM changes nothing: the deadline of the
    first one stands.
    """
    notices: list[PreemptionNotice] = []

    def receive(_number: int, _frame: FrameType | None) -> None:
        notices.append(PreemptionNotice("sigterm", clock() + grace_s, "SIGTERM"))

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield lambda _now: notices[0] if notices else None
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


class PreemptionWatch:
    """A thread that asks the sources until one announces the end; a context manager. Nothing waits
    for the thread, its own exit included."""

    def __init__(
        self,
        sources: Sequence[Ask],
        *,
        every_s: float = 2.0,
        on_notice: Callable[[PreemptionNotice], None] | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """`on_notice` is called once, in the thread, after `notice` has been set."""
        self._sources, self._every_s = sources, every_s
        self._on_notice, self._clock = on_notice, clock
        self._notice: PreemptionNotice | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="notices", daemon=True)

    @property
    def notice(self) -> PreemptionNotice | None:
        """The notice, or None so far. Once it is there, it stays."""
        return self._notice

    def __enter__(self) -> "PreemptionWatch":
        if self._sources:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.is_set():
            for ask in self._sources:
                with suppress(*_NO_ANSWER):
                    self._notice = ask(self._clock())
                if self._notice is not None:
                    left_s = self._notice.deadline - self._clock()
                    _log.info("this machine ends in %.0f s: %s", left_s, self._notice.detail)
                    if self._on_notice is not None:
                        self._on_notice(self._notice)
                    return
            self._over.wait(self._every_s)


def _aws_token(endpoint: str) -> str:
    """A token for one request, so that it cannot be too old for the next."""
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _request("PUT", endpoint, "/latest/api/token", lifetime)[1].strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise NoAnswer("this is no token")
    return token


def _get_gcp(endpoint: str, path: str) -> str | None:
    """Raises NoAnswer where another server than Google's answers."""
    return _get(endpoint, path, {"Metadata-Flavor": "Google"}, flavor="Google")


def _get_azure(endpoint: str, path: str) -> str:
    return _get(endpoint, path, {"Metadata": "true"}) or ""


def _azure_name(endpoint: str) -> str | None:
    """This machine's name as events have it; None where the server does not give it: then any
    event may be this machine's."""
    path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
    with suppress(*_NO_ANSWER):
        found = _get_azure(endpoint, path)
        return found.strip().lower() if found else None
    return None


def _names_in(event: Mapping[str, object]) -> list[str]:
    return [str(resource).lower() for resource in _list_in(event, "Resources")]


def _list_in(values: Mapping[str, object], name: str) -> list[object]:
    found = values.get(name)
    return found if isinstance(found, list) else []


def _get(
    endpoint: str,
    path: str,
    headers: Mapping[str, str],
    *,
    absent: int = 0,
    flavor: str | None = None,
) -> str | None:
    """The text at a path; None where the status is `absent`. Raises NoAnswer at every other status,
    and where the answer's flavor is another."""
    status, text, found_flavor = _request("GET", endpoint, path, headers, allowed=(200, absent))
    if flavor is not None and found_flavor != flavor:
        raise NoAnswer(f"the answer's Metadata-Flavor is {found_flavor}, not {flavor}")
    return text if status == 200 else None


def _request(
    method: str,
    endpoint: str,
    path: str,
    headers: Mapping[str, str],
    *,
    allowed: Sequence[int] = (200,),
) -> tuple[int, str, str | None]:
    """Status, text and flavor of an answer. Uses neither proxies nor redirects."""
    try:
        where = urlsplit(endpoint)
        connection = HTTPConnection(where.hostname or "", where.port, timeout=_TIMEOUT_S)
    except ValueError as error:
        raise NoAnswer(f"{endpoint} is no endpoint: {error}") from None
    try:
        connection.request(method, where.path.rstrip("/") + path, headers=dict(headers))
        answer = connection.getresponse()
        text = answer.read(_MOST_BYTES).decode(errors="replace")
        if answer.status not in allowed:
            raise NoAnswer(f"{method} {path} was answered with {answer.status}")
        return answer.status, text, answer.getheader("Metadata-Flavor")
    finally:
        connection.close()


def _parsed(text: str) -> dict[str, object]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoAnswer(f"this is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise NoAnswer("this is JSON, but no object")
    return values


def _unix_seconds(text: object, *, empty: float) -> float:
    """A time in ISO 8601 or as in mail (RFC 5322), in UTC where it has no zone; `empty` for an
    empty text, which means that the event has begun. Raises NoAnswer on another text."""
    if text == "":
        return empty
    if not isinstance(text, str):
        raise NoAnswer(f"{text!r} is not a time")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            moment = parsedate_to_datetime(text)
        except ValueError:
            raise NoAnswer(f"{text!r} is not a time") from None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
