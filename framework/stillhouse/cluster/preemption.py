"""Notices: a machine says that it will be taken away, and by when.

The clouds say so on a metadata server that every machine reaches at a link-local address;
Kubernetes and Slurm send SIGTERM. Nothing here ever ends a run: a server that is absent, hangs or
talks nonsense has announced nothing. It is asked directly, and neither through a proxy nor wherever
it redirects to, so that nobody else can answer in its place.
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
# the others pause a machine, and let it go on
_AZURE_ENDS = (
    "Preempt",
    "Terminate",
    "Reboot",
    "Redeploy",
)


@dataclass(frozen=True, slots=True)
class PreemptionNotice:
    """The end of a machine, announced. What it holds has to be safe elsewhere by `deadline`."""

    source: Source
    deadline: float  # unix seconds
    detail: str  # what was announced, in the source's own words


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where each cloud's metadata server answers, as URLs."""

    aws: str = _LINK_LOCAL
    gcp: str = _LINK_LOCAL  # its name, metadata.google.internal, would need a name server
    azure: str = _LINK_LOCAL


# at this moment, in unix seconds: has the end been announced? May raise what `_NO_ANSWER` lists
Ask = Callable[[float], PreemptionNotice | None]


class NoAnswer(Exception):
    """A metadata server answered in a way that says nothing: another status, or no sense."""


_NO_ANSWER = (NoAnswer, OSError, HTTPException)


def aws(endpoint: str, now: float) -> PreemptionNotice | None:
    """EC2's spot interruption notice, about two minutes ahead, by IMDSv2. A rebalance
    recommendation is a guess, and no notice.

    In a container the instance's hop limit has to be 2:
    docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html
    """
    found = _get(
        endpoint,
        "/latest/meta-data/spot/instance-action",
        {"X-aws-ec2-metadata-token": _aws_token(endpoint)},
        absent=404,
    )
    if found is None:
        return None
    values = _parsed(found)
    return PreemptionNotice(
        "aws",
        _unix_seconds(values.get("time"), empty=now),
        f"spot instance-action {values.get('action')}",
    )


def gcp(endpoint: str, now: float) -> PreemptionNotice | None:
    """Compute Engine's mark on a preempted spot machine, 30 s ahead."""
    found = _get(
        endpoint,
        "/computeMetadata/v1/instance/preempted",
        {"Metadata-Flavor": "Google"},
        flavor="Google",
    )
    if found is None or found.strip().upper() != "TRUE":
        return None
    return PreemptionNotice("gcp", now + _GCP_LEFT_S, "instance/preempted is TRUE")


def azure(endpoint: str, now: float) -> PreemptionNotice | None:
    """Azure's scheduled events that end this machine, 30 s ahead at least; those of its neighbours
    in a scale set are not its own."""
    document = _parsed(
        _get(endpoint, "/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
        or ""
    )
    events = [
        event for event in _list_in(document, "Events") if event.get("EventType") in _AZURE_ENDS
    ]
    if not events:
        return None
    name = _azure_name(endpoint)
    ours = [event for event in events if name is None or name in _names_in(event)]
    notices = [
        PreemptionNotice(
            "azure",
            _unix_seconds(event.get("NotBefore"), empty=now),
            f"scheduled event {event['EventType']}",
        )
        for event in ours
    ]
    return min(notices, key=lambda notice: notice.deadline, default=None)


_CLOUDS: Mapping[Cloud, Callable[[str, float], PreemptionNotice | None]] = {
    "aws": aws,
    "gcp": gcp,
    "azure": azure,
}


def cloud_here(endpoints: Endpoints) -> Cloud | None:
    """The cloud whose metadata server answers as only it does; None where none does."""
    probes: Mapping[Cloud, Callable[[], object]] = {
        "gcp": lambda: _get(
            endpoints.gcp, "/computeMetadata/v1/", {"Metadata-Flavor": "Google"}, flavor="Google"
        ),
        "azure": lambda: _parsed(
            _get(endpoints.azure, "/metadata/versions", {"Metadata": "true"}) or ""
        ).__getitem__("apiVersions"),
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
    """Whom to ask on this machine. `auto` finds out at the first question, which may take seconds:
    ask in a thread."""
    match kind:
        case "off":
            return []
        case "auto":
            return [_whichever_answers(endpoints)]
        case "aws" | "gcp" | "azure":
            return [_asking(kind, endpoints)]


def _asking(cloud: Cloud, endpoints: Endpoints) -> Ask:
    return lambda now: _CLOUDS[cloud](getattr(endpoints, cloud), now)


def _whichever_answers(endpoints: Endpoints) -> Ask:
    here: Cloud | None = None
    next_look = 0.0

    def ask(now: float) -> PreemptionNotice | None:
        nonlocal here, next_look
        if here is None and now >= next_look:
            here, next_look = cloud_here(endpoints), now + _LOOK_AGAIN_S
        return _asking(here, endpoints)(now) if here is not None else None

    return ask


@contextmanager
def sigterm(grace_s: float, *, clock: Callable[[], float] = time.time) -> Iterator[Ask]:
    """While the block lasts, SIGTERM is the notice of an end in `grace_s` seconds, and ends nothing
    by itself. Main thread only.

    Yields whom to ask; asking costs nothing. A second SIGTERM changes nothing: the first one's
    deadline stands.
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
    """Asks in a thread until somebody announces the end; use it as a context manager. It holds up
    nobody: not even its own end waits."""

    def __init__(
        self,
        sources: Sequence[Ask],
        *,
        every_s: float = 2.0,
        on_notice: Callable[[PreemptionNotice], None] | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """`on_notice` is called once, in the thread, after `notice` has been set."""
        self._sources, self._every_s, self._on_notice, self._clock = (
            sources,
            every_s,
            on_notice,
            clock,
        )
        self._notice: PreemptionNotice | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="notices", daemon=True)

    @property
    def notice(self) -> PreemptionNotice | None:
        """What has been announced; once it is there, it stays."""
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
                    _log.info(
                        "this machine ends in %.0f s: %s",
                        self._notice.deadline - self._clock(),
                        self._notice.detail,
                    )
                    if self._on_notice is not None:
                        self._on_notice(self._notice)
                    return
            self._over.wait(self._every_s)


def _aws_token(endpoint: str) -> str:
    """A token for one question, so that none can be too old for the next."""
    token = _request(
        "PUT", endpoint, "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )[1].strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise NoAnswer("this is no token")
    return token


def _azure_name(endpoint: str) -> str | None:
    """This machine's name among those of an event; None where it cannot be had: then every event
    may be its own."""
    with suppress(*_NO_ANSWER):
        found = _get(
            endpoint,
            "/metadata/instance/compute/name?api-version=2021-02-01&format=text",
            {"Metadata": "true"},
        )
        return found.strip().lower() if found else None
    return None


def _names_in(event: Mapping[str, object]) -> list[str]:
    resources = event.get("Resources")
    return [str(resource).lower() for resource in resources] if isinstance(resources, list) else []


def _list_in(document: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    found = document.get(name)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _get(
    endpoint: str,
    path: str,
    headers: Mapping[str, str],
    *,
    absent: int = 0,
    flavor: str | None = None,
) -> str | None:
    """The text there; None where the status is `absent`. Raises NoAnswer at every other status, and
    without the flavor asked for."""
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
    """Status, text and flavor of an answer. This client knows neither proxies nor redirects."""
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
    """A moment written as ISO 8601 or as in mail (RFC 5322), in UTC where no zone is said; `empty`
    where nothing is: it has begun."""
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
