"""Sessions on a cluster: what is waited for, what the repr of secrets hides, and how answers and
errors of other processes come back."""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic

import pytest

from helpers.calls import must_not_be_called
from helpers.remote import die, join, refuse, trip
from helpers.world import TinyWorld
from stillhouse.cluster.nodes import await_room
from stillhouse.cluster.placement import Placement, teacher_needs
from stillhouse.cluster.processes import Secrets, call_remotely, cause_of, local_secrets
from stillhouse.cluster.session import attached
from stillhouse.config import ClusterSection, TeacherSection, resolved_json
from stillhouse.errors import ChunkError, ConfigError, RunError
from stillhouse.evaluation.scores import EvaluationJob
from stillhouse.store import ChunkMissing
from stillhouse.teacher.actor import TeacherJob

TOKEN = "hf_thisMustNotBeSeen"
SHARED = Placement(0.1, 0.0, {})


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_waits_for_machines_that_may_still_join_and_says_for_what() -> None:
    heard: list[str] = []
    needs = teacher_needs(TeacherSection(model="m", resources={"spot": 1}))
    with pytest.raises(ConfigError, match="too small for this run"):
        await_room(needs, ClusterSection(address="auto", join_s=1.5), waiting=heard.append)
    assert set(heard) == {"spot: 1 needed (1 teachers), 0 in the cluster"}
    with pytest.raises(
        ConfigError, match="too small for this run"
    ):  # nobody else joins a cluster that this command started
        await_room(needs, ClusterSection(), waiting=must_not_be_called)


def test_a_token_is_found_and_shown_nowhere(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    secrets = local_secrets()
    assert secrets.hub_token == TOKEN
    plan = tiny_world.plan(tmp_path / "run")
    evaluation = EvaluationJob(
        plan.config.teacher, {}, 300, plan.config.evaluate, "cpu", 1, secrets
    )
    job = TeacherJob(plan.config.teacher, plan.recipe, plan.config.store.url, 1, "off")
    for shown in (
        repr(secrets),
        str(secrets),
        f"{secrets!s:>50}",
        repr([secrets]),
        repr(evaluation),
    ):
        assert TOKEN not in shown
    written = [
        pickle.dumps(plan.config),
        pickle.dumps(job),
        pickle.dumps(plan.jobs),
        resolved_json(plan.config).encode(),
    ]
    for data in (*written, plan.recipe.canonical_json()):
        assert TOKEN.encode() not in data


def test_a_process_adopts_the_token_and_none_takes_none_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_own")
    Secrets(None).adopt()
    assert os.environ["HF_TOKEN"] == "hf_own"
    Secrets(TOKEN).adopt()
    assert local_secrets().hub_token == TOKEN


def test_an_attached_process_uses_its_cluster_as_it_is(ray_cluster: dict[str, float]) -> None:
    with attached(ClusterSection(address="nobody.invalid:1")) as available:
        assert available["CPU"] == ray_cluster["CPU"]
    with attached(ClusterSection()) as again:  # it did not end with the block
        assert again["CPU"] == ray_cluster["CPU"]


ATTACH = """
import sys
from stillhouse.cluster.session import attached
from stillhouse.config import ClusterSection
from stillhouse.errors import ConfigError
for address in sys.argv[1:]:
    try:
        with attached(ClusterSection(address=address)):
            print("attached")
    except ConfigError as error:
        print(error)
"""


START = """
from stillhouse.cluster.session import attached
from stillhouse.config import ClusterSection
from stillhouse.errors import RunError
try:
    with attached(ClusterSection(num_cpus=1)):
        print("attached")
except RunError as error:
    print(error)
"""


def test_a_ray_that_does_not_start_is_a_failed_run_in_words_and_leaves_nothing() -> None:
    place = Path(tempfile.mkdtemp(dir="/tmp", prefix="s-"))  # the path of a socket is short
    broken = {"RAY_TMPDIR": str(place), "RAY_GCS_SERVER_PORT": "no port"}
    done = subprocess.run(
        [sys.executable, "-c", START],
        env=os.environ | broken,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert "Ray did not start on this machine" in done.stdout
    assert "the same command goes on later" in done.stdout
    assert "Traceback" not in done.stderr
    assert list(place.iterdir()) == []
    place.rmdir()


def test_an_address_at_which_nobody_answers_is_said_at_once() -> None:
    """In a process of its own, since this one may be attached already."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        here = f"127.0.0.1:{taken.getsockname()[1]}"
        addresses = [
            here,
            f"ray://{here}",
            f"nobody.invalid:{taken.getsockname()[1]}",
            "nonsense",
            "local",
            "",
        ]
        began = monotonic()
        answer = subprocess.run(
            [sys.executable, "-c", ATTACH, *addresses],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    lines = answer.stdout.splitlines()
    assert len(lines) == len(addresses)
    for line, address in zip(lines, addresses, strict=True):
        assert f"no Ray cluster answers at '{address}'" in line
        assert "start one with `stillhouse node head`, or leave cluster.address out" in line
    assert monotonic() - began < 50  # Ray itself takes minutes


@pytest.mark.parametrize(
    "token",
    [{"RAY_AUTH_TOKEN_PATH": os.devnull}, {"RAY_AUTH_TOKEN": "  "}],
    ids=["a blank file", "blank"],
)
def test_a_blank_token_for_a_cluster_is_a_mistake_in_words(token: dict[str, str]) -> None:
    knowing = {
        name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"
    } | token
    with socket.create_server(("127.0.0.1", 0)) as head:
        command = [sys.executable, "-c", ATTACH, f"127.0.0.1:{head.getsockname()[1]}"]
        done = subprocess.run(
            command, env=knowing, capture_output=True, text=True, check=False, timeout=60
        )
    assert "lets in who has its token" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("ray_cluster")
def test_a_call_is_answered_by_another_process() -> None:
    words, pid = call_remotely(join, "cut", "the", "heads", where=SHARED)
    assert words == "cut the heads"
    assert pid != os.getpid()


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_ours_arrives_as_itself() -> None:
    with pytest.raises(ChunkMissing) as caught:
        call_remotely(refuse, "chunk 3 is not there", where=SHARED)
    assert type(caught.value) is ChunkMissing
    assert str(caught.value) == "chunk 3 is not there"
    assert caught.value.__suppress_context__  # a user reads one message


@pytest.mark.usefixtures("ray_cluster")
def test_any_other_error_arrives_as_itself_with_the_trace_of_where_it_was_raised() -> None:
    with pytest.raises(KeyError) as caught:
        call_remotely(trip, "a bug", where=SHARED)
    assert type(caught.value) is KeyError
    assert "in trip" in str(caught.value.__cause__)


@pytest.mark.usefixtures("ray_cluster")
def test_a_process_that_dies_is_a_run_that_failed() -> None:
    with pytest.raises(RunError, match="the process of `die` was lost"):
        call_remotely(die, where=SHARED)


def test_the_cause_of_an_error_that_wraps_none_is_itself() -> None:
    error = ChunkError("as it is")
    assert cause_of(error) is error
