"""Promises of the notices: each cloud's announcement is understood as it makes it, and nothing else
is taken for one."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from time import monotonic, sleep, time

import pytest

from helpers.metadata import (
    AWS_ACTION,
    AWS_TOKEN,
    AZURE_EVENTS,
    AZURE_NAME,
    GCP_PREEMPTED,
    Answer,
    MetadataServer,
)
from stillhouse.cluster.nodes import machine_notices, metadata_endpoints
from stillhouse.cluster.preemption import (
    Cloud,
    Endpoints,
    PreemptionNotice,
    PreemptionWatch,
    aws,
    azure,
    cloud_here,
    gcp,
    local_sources,
    sigterm,
)

CLOUDS: tuple[Cloud, ...] = ("aws", "gcp", "azure")
WHERE = {"aws": AWS_ACTION, "gcp": GCP_PREEMPTED, "azure": AZURE_EVENTS}
DEADLINE = datetime(2031, 5, 4, 3, 2, 1, tzinfo=UTC).timestamp()


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest) -> Cloud:
    name: Cloud = request.param
    return name


@pytest.fixture
def server(cloud: Cloud) -> Iterator[MetadataServer]:
    with MetadataServer(cloud) as server:
        yield server


def everywhere(server: MetadataServer) -> Endpoints:
    """The clouds share one address, so a machine finds one server there, whichever it asks for."""
    return Endpoints(server.url, server.url, server.url)


def watched(watch: PreemptionWatch, *, within_s: float = 20.0) -> PreemptionNotice | None:
    deadline = monotonic() + within_s
    while watch.notice is None and monotonic() < deadline:
        sleep(0.01)
    return watch.notice


def ask(cloud: Cloud, server: MetadataServer, now: float) -> PreemptionNotice | None:
    (source,) = local_sources(cloud, everywhere(server))
    return source(now)


def test_each_cloud_says_nothing_and_then_when(cloud: Cloud, server: MetadataServer) -> None:
    now = DEADLINE - 120
    assert ask(cloud, server, now) is None
    server.announce(DEADLINE)
    notice = ask(cloud, server, now)
    assert notice is not None
    assert notice.source == cloud
    assert notice.deadline == (now + 30 if cloud == "gcp" else DEADLINE)


def test_the_cloud_of_a_machine_is_found_by_asking(cloud: Cloud, server: MetadataServer) -> None:
    assert cloud_here(everywhere(server)) == cloud
    (auto,) = local_sources("auto", everywhere(server))
    assert auto(DEADLINE - 120) is None
    server.announce(DEADLINE)
    assert auto(DEADLINE - 118) == ask(cloud, server, DEADLINE - 118)


def test_a_machine_without_a_cloud_asks_again_only_after_a_while() -> None:
    with MetadataServer("aws") as server:
        server.answers[AWS_TOKEN] = Answer(403)
        (auto,) = local_sources("auto", everywhere(server))
        assert [auto(1000.0), auto(1002.0), auto(1059.0)] == [None] * 3
        assert len(server.asked) == 3  # one question for each cloud
        del server.answers[AWS_TOKEN]
        server.announce(DEADLINE)
        assert auto(1060.0) is not None


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2031-05-04T03:02:01Z", DEADLINE),
        ("2031-05-04T03:02:01", DEADLINE),
        ("2031-05-04T05:02:01+02:00", DEADLINE),
        ("Sun, 04 May 2031 03:02:01 GMT", DEADLINE),
        ("Sun, 04 May 2031 08:32:01 +0530", DEADLINE),
        ("Sat, 03 May 2031 20:02:01 -0700", DEADLINE),
    ],
)
def test_a_deadline_is_read_in_its_own_time_zone(
    written: str, meant: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    with MetadataServer("aws") as server:
        server.answers[AWS_ACTION] = Answer(text=f'{{"action": "stop", "time": "{written}"}}')
        assert aws(server.url, 0.0) == PreemptionNotice("aws", meant, "spot instance-action stop")
    assert datetime.fromtimestamp(meant, tz=timezone(timedelta(hours=2))).hour == 5


def test_an_aws_token_that_expires_at_once_or_is_refused_is_no_notice() -> None:
    with MetadataServer("aws", token_seconds=0.0) as server:
        server.announce(DEADLINE)
        with PreemptionWatch(local_sources("aws", everywhere(server)), every_s=0.01) as watch:
            assert watched(watch, within_s=0.3) is None
        assert server.asked.count(("GET", AWS_ACTION)) > 1


def test_a_token_is_fresh_for_every_question() -> None:
    with MetadataServer("aws", token_seconds=5.0) as server:
        assert [aws(server.url, 0.0), aws(server.url, 0.0)] == [None, None]
        assert server.asked == [("PUT", AWS_TOKEN), ("GET", AWS_ACTION)] * 2


def test_an_answer_without_googles_flavor_is_not_believed() -> None:
    with MetadataServer("gcp") as server:
        server.announce(DEADLINE)
        assert gcp(server.url, 100.0) == PreemptionNotice(
            "gcp", 130.0, "instance/preempted is TRUE"
        )
        server.answers[GCP_PREEMPTED] = Answer(text="TRUE")
        with PreemptionWatch(local_sources("gcp", everywhere(server)), every_s=0.01) as watch:
            assert watched(watch, within_s=0.3) is None


@pytest.mark.parametrize("event", ["Preempt", "Terminate", "Reboot", "Redeploy"])
def test_azure_ends_a_machine_in_four_ways(event: str) -> None:
    with MetadataServer("azure") as server:
        server.announce(DEADLINE, event=event)
        assert azure(server.url, 0.0) == PreemptionNotice(
            "azure", DEADLINE, f"scheduled event {event}"
        )


def test_azures_events_count_when_they_end_this_machine_the_soonest_first() -> None:
    with MetadataServer("azure") as server:
        server.announce(DEADLINE, event="Freeze")
        server.announce(DEADLINE, machine="worker_1")
        assert azure(server.url, 0.0) is None
        server.announce(DEADLINE + 60, machine="WORKER_0", event="Reboot")
        server.announce(DEADLINE)
        assert azure(server.url, 0.0) == PreemptionNotice(
            "azure", DEADLINE, "scheduled event Preempt"
        )
        server.answers[AZURE_NAME] = Answer(500)
        assert azure(server.url, 0.0) is not None  # it might be this one
        server.begin()
        assert azure(server.url, 77.0) == PreemptionNotice("azure", 77.0, "scheduled event Preempt")


REFUSALS = {
    "5xx": Answer(503, "try again"),
    "a login page": Answer(200, "<html>please sign in</html>"),
    "no text": Answer(200, ""),
    "a list": Answer(200, "[]", (("Metadata-Flavor", "Google"),)),
    "a nest": Answer(200, "[" * 100_000),
    "another shape": Answer(200, '{"action": 3, "time": 4, "Events": {"EventType": "Preempt"}}'),
    "no time": Answer(
        200,
        '{"action": "terminate", "time": "soon", "Events": [{"EventType": "Preempt", "NotBefore": '
        '"soon"}]}',
    ),
    "bytes": Answer(200, "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())
def test_what_makes_no_sense_announces_nothing_and_the_next_answer_counts(
    cloud: Cloud, server: MetadataServer, refusal: Answer
) -> None:
    server.announce(DEADLINE)
    server.answers[WHERE[cloud]] = refusal
    with PreemptionWatch(local_sources(cloud, everywhere(server)), every_s=0.01) as watch:
        assert watched(watch, within_s=0.2) is None
        del server.answers[WHERE[cloud]]
        assert watched(watch) is not None


def test_a_redirect_is_not_followed(cloud: Cloud, server: MetadataServer) -> None:
    with MetadataServer(cloud) as elsewhere:
        elsewhere.announce(DEADLINE)
        server.answers[WHERE[cloud]] = Answer(
            302, headers=(("Location", elsewhere.url + WHERE[cloud]), ("Metadata-Flavor", "Google"))
        )
        with PreemptionWatch(local_sources(cloud, everywhere(server)), every_s=0.01) as watch:
            assert watched(watch, within_s=0.2) is None
        assert elsewhere.asked == []


def test_no_proxy_is_asked(
    cloud: Cloud, server: MetadataServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server.announce(DEADLINE)
    assert ask(cloud, server, DEADLINE - 60) is not None


def test_a_server_that_hangs_holds_up_neither_the_start_nor_the_end(
    cloud: Cloud, server: MetadataServer
) -> None:
    server.answers = {path: Answer(after_s=60.0) for path in (*WHERE.values(), AWS_TOKEN)}
    began = monotonic()
    with PreemptionWatch(local_sources(cloud, everywhere(server))) as watch:
        while not server.asked:
            sleep(0.01)
        assert watch.notice is None
    assert monotonic() - began < 1.5


def test_a_server_that_hung_once_is_asked_again() -> None:
    with MetadataServer("gcp") as server:
        server.announce(DEADLINE)
        server.answers[GCP_PREEMPTED] = Answer(after_s=60.0)
        with PreemptionWatch(local_sources("gcp", everywhere(server)), every_s=0.01) as watch:
            while not server.asked:
                sleep(0.01)
            server.answers.clear()
            assert watched(watch) is not None


def test_nobody_there_announces_nothing(cloud: Cloud) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert cloud_here(Endpoints(nowhere, nowhere, nowhere)) is None
        for endpoint in (nowhere, "no url", "http://", "http://[::1", "http://x:port"):
            with PreemptionWatch(
                local_sources(cloud, Endpoints(endpoint, endpoint, endpoint)), every_s=0.01
            ) as watch:
                assert watched(watch, within_s=0.05) is None
                assert watch._thread.is_alive()


def test_off_asks_nobody_and_starts_no_thread() -> None:
    before = threading.active_count()
    with PreemptionWatch(local_sources("off", Endpoints())) as watch:
        assert threading.active_count() == before
        assert watch.notice is None


def test_a_notice_is_told_once_and_stays() -> None:
    told: list[PreemptionNotice] = []
    answers = iter(
        [None, PreemptionNotice("ray", 5.0, "draining"), PreemptionNotice("ray", 9.0, "again")]
    )
    with PreemptionWatch(
        [lambda _now: next(answers)], every_s=0.01, on_notice=told.append
    ) as watch:
        assert watched(watch) == PreemptionNotice("ray", 5.0, "draining")
        watch._thread.join(10)
    assert not watch._thread.is_alive()
    assert told == [watch.notice]


def test_one_source_that_fails_does_not_silence_another() -> None:
    def broken(_now: float) -> PreemptionNotice | None:
        raise ConnectionResetError

    with PreemptionWatch(
        [broken, lambda now: PreemptionNotice("ray", now, "draining")], clock=lambda: 42.0
    ) as watch:
        assert watched(watch) == PreemptionNotice("ray", 42.0, "draining")


def test_sigterm_is_a_notice_and_the_old_handler_comes_back() -> None:
    earlier = []
    before = signal.signal(signal.SIGTERM, lambda *_: earlier.append("old"))
    try:
        with sigterm(25.0, clock=lambda: 100.0) as ask_for_it:
            assert ask_for_it(time()) is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert ask_for_it(time()) == PreemptionNotice("sigterm", 125.0, "SIGTERM")
            os.kill(os.getpid(), signal.SIGTERM)
            assert ask_for_it(time()) == PreemptionNotice("sigterm", 125.0, "SIGTERM")
        assert earlier == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert earlier == ["old"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_variables_of_the_clouds_own_tools_are_honoured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert metadata_endpoints() == Endpoints()
    with MetadataServer("aws") as server:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url + "/")
        monkeypatch.setenv("GCE_METADATA_HOST", server.host)
        server.announce(DEADLINE)
        with machine_notices("aws") as watch:
            assert watched(watch) == PreemptionNotice(
                "aws", DEADLINE, "spot instance-action terminate"
            )
    with MetadataServer("gcp") as server:
        monkeypatch.setenv("GCE_METADATA_HOST", server.host)
        server.announce(DEADLINE)
        with machine_notices("gcp") as watch:
            assert watched(watch) is not None


def test_the_module_reads_no_environment() -> None:
    source = (Path(__file__).parents[2] / "framework/stillhouse/cluster/preemption.py").read_text()
    assert "environ" not in source
    assert "getenv" not in source
