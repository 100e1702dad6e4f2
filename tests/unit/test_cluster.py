"""Who goes where, what is missing for it, what secrets do not show, and how answers and errors come back from other processes."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest

from helpers.remote import die, join, refuse, trip
from helpers.world import TinyWorld
from stillhouse.cluster import (
    Placement,
    Secrets,
    attached,
    call_remotely,
    cause_of,
    gather,
    local_secrets,
    placement,
    require_room,
    shortages,
    student_crew,
    teacher_crew,
)
from stillhouse.config import ClusterSection, StudentSection, TeacherSection, resolved_json
from stillhouse.errors import ChunkError, ConfigError, RunError
from stillhouse.evaluate import EvaluationJob
from stillhouse.store import ChunkMissing
from stillhouse.teacher.actor import TeacherJob

CPUS_ONLY = {"CPU": 8.0, "memory": 1e9}
WITH_GPUS = {"CPU": 8.0, "GPU": 4.0}
TOKEN = "hf_thisMustNotBeSeen"
SHARED = Placement(0.1, 0.0, {})


def teacher(**values: object) -> TeacherSection:
    return TeacherSection.model_validate({"model": "m"} | values)


def student(**values: object) -> StudentSection:
    return StudentSection.model_validate({"model": "m"} | values)


@pytest.mark.parametrize(
    ("values", "available", "expected"),
    [
        ({}, CPUS_ONLY, (1.0, 0.0, "cpu")),
        ({}, WITH_GPUS, (1.0, 1.0, "cuda")),
        ({"num_gpus": 0.5}, WITH_GPUS, (1.0, 0.5, "cuda")),
        ({"num_gpus": 0}, WITH_GPUS, (1.0, 0.0, "cpu")),
        ({"device": "cpu"}, WITH_GPUS, (1.0, 0.0, "cpu")),
        ({"device": "cuda"}, CPUS_ONLY, (1.0, 1.0, "cuda")),  # the cluster may not have it: then it is a shortage
        ({"num_gpus": 2, "num_cpus": 0.25}, CPUS_ONLY, (0.25, 2.0, "cuda")),
    ],
)
def test_a_process_goes_where_its_section_says(values: dict[str, object], available: dict[str, float], expected: tuple[float, float, str]):
    where = placement(teacher(**values), available)
    assert (where.num_cpus, where.num_gpus, where.device) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "cuda", "num_gpus": 0}, "device is 'cuda' but num_gpus is 0; ask for at least a fraction"),
        ({"device": "cpu", "num_gpus": 0.5}, "device is 'cpu' but num_gpus is 0.5; set num_gpus to 0 or leave it out"),
    ],
)
def test_a_device_and_gpus_that_contradict_each_other_are_refused(values: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        placement(student(**values), WITH_GPUS)


def test_what_many_processes_need_is_added_up_without_zeros():
    assert Placement(0.5, 0.0, {"spot": 1.0}).times(3) == {"CPU": 1.5, "spot": 3.0}
    assert Placement(2.0, 0.25, {}).times(2) == {"CPU": 4.0, "GPU": 0.5}


def test_a_cluster_that_is_large_enough_is_short_of_nothing():
    crews = teacher_crew(teacher(min_replicas=3, max_replicas=99, num_cpus=1)) | student_crew(student(num_workers=50, num_cpus=0.1))
    assert shortages(crews, CPUS_ONLY) == []
    require_room(crews, CPUS_ONLY)
    tenths = student_crew(student(num_workers=10, num_cpus=0.1))
    assert shortages(tenths, {"CPU": 1.0}) == []  # ten tenths are one, rounding or not


def test_every_shortage_says_what_is_needed_by_whom_and_what_is_there():
    crews = teacher_crew(teacher(min_replicas=3, max_replicas=4, num_cpus=2, resources={"spot": 1})) | student_crew(
        student(num_workers=4, device="cuda")
    )
    assert shortages(crews, CPUS_ONLY) == [
        "CPU: 10 needed (3 teachers and 4 student ranks), 8 in the cluster",
        "spot: 3 needed (3 teachers and 4 student ranks), 0 in the cluster",
        "GPU: 4 needed (3 teachers and 4 student ranks), 0 in the cluster",
    ]
    with pytest.raises(ConfigError) as caught:
        require_room(crews, CPUS_ONLY)
    assert "the cluster is too small for this run:\n  - CPU: 10 needed" in str(caught.value)
    assert "Lower min_replicas, num_workers, num_cpus or num_gpus" in str(caught.value)


def test_a_crew_alone_is_measured_alone():
    assert shortages(teacher_crew(teacher(min_replicas=9, max_replicas=9)), CPUS_ONLY) == ["CPU: 9 needed (9 teachers), 8 in the cluster"]
    assert shortages(student_crew(student(num_workers=8)), CPUS_ONLY) == []


def test_machines_that_are_still_on_their_way_are_waited_for():
    crews = teacher_crew(teacher(resources={"teacher": 1}))
    looks = iter([CPUS_ONLY, CPUS_ONLY | {"teacher": 1.0}])
    assert gather(crews, within_s=60.0, look=lambda: next(looks)) == CPUS_ONLY | {"teacher": 1.0}
    with pytest.raises(ConfigError, match="teacher: 1 needed"):
        gather(crews, within_s=0.0, look=lambda: CPUS_ONLY)


def test_a_token_is_found_and_shown_nowhere(tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    secrets = local_secrets()
    assert secrets.hub_token == TOKEN
    made = tiny_world.plan(tmp_path / "run")
    evaluation = EvaluationJob(made.config.teacher, {}, 300, made.config.evaluate, "cpu", 1, secrets)
    job = TeacherJob(made.config.teacher, made.recipe, made.config.store.url, 1, "off")
    for shown in (repr(secrets), str(secrets), f"{secrets!s:>50}", repr([secrets]), repr(evaluation)):
        assert TOKEN not in shown
    written = [pickle.dumps(made.config), pickle.dumps(job), pickle.dumps(made.jobs()), resolved_json(made.config).encode()]
    for data in (*written, made.recipe.canonical_json()):
        assert TOKEN.encode() not in data


def test_a_process_adopts_the_token_and_none_takes_none_away(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_own")
    Secrets(None).adopt()
    assert os.environ["HF_TOKEN"] == "hf_own"
    Secrets(TOKEN).adopt()
    assert local_secrets().hub_token == TOKEN


def test_an_attached_process_uses_its_cluster_as_it_is(ray_cluster: dict[str, float]):
    with attached(ClusterSection(address="nobody.invalid:1")) as available:
        assert available["CPU"] == ray_cluster["CPU"]
    with attached(ClusterSection()) as again:  # it did not end with the block
        assert again["CPU"] == ray_cluster["CPU"]


ATTACH = """
import sys
from stillhouse.cluster import attached
from stillhouse.config import ClusterSection
from stillhouse.errors import ConfigError
for address in sys.argv[1:]:
    try:
        with attached(ClusterSection(address=address)):
            print("attached")
    except ConfigError as error:
        print(error)
"""


def test_an_address_at_which_nobody_answers_is_said_at_once():
    """In a process of its own, since this one may be attached already."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        here = f"127.0.0.1:{taken.getsockname()[1]}"
        addresses = [here, f"ray://{here}", f"nobody.invalid:{taken.getsockname()[1]}", "nonsense"]
        began = monotonic()
        answer = subprocess.run([sys.executable, "-c", ATTACH, *addresses], capture_output=True, text=True, check=True, timeout=60)
    lines = answer.stdout.splitlines()
    assert len(lines) == len(addresses)
    for line, address in zip(lines, addresses, strict=True):
        assert f"no Ray cluster answers at '{address}'" in line
        assert "start one with `stillhouse node head`, or leave cluster.address out" in line
    assert monotonic() - began < 50  # Ray itself takes minutes


@pytest.mark.usefixtures("ray_cluster")
def test_a_call_is_answered_by_another_process():
    words, pid = call_remotely(join, "cut", "the", "heads", where=SHARED)
    assert words == "cut the heads"
    assert pid != os.getpid()


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_ours_arrives_as_itself():
    with pytest.raises(ChunkMissing) as caught:
        call_remotely(refuse, "chunk 3 is not there", where=SHARED)
    assert type(caught.value) is ChunkMissing
    assert str(caught.value) == "chunk 3 is not there"
    assert caught.value.__suppress_context__  # a user reads one message


@pytest.mark.usefixtures("ray_cluster")
def test_any_other_error_arrives_as_itself_with_the_trace_of_where_it_was_raised():
    with pytest.raises(KeyError) as caught:
        call_remotely(trip, "a bug", where=SHARED)
    assert type(caught.value) is KeyError
    assert "in trip" in str(caught.value.__cause__)


@pytest.mark.usefixtures("ray_cluster")
def test_a_process_that_dies_is_a_run_that_failed():
    with pytest.raises(RunError, match="the process of `die` was lost"):
        call_remotely(die, where=SHARED)


def test_the_cause_of_an_error_that_wraps_none_is_itself():
    error = ChunkError("as it is")
    assert cause_of(error) is error
