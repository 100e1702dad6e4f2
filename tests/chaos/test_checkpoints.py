"""A rank killed at any phase of a checkpoint, and a bit flipped in any of its files: the newest
whole one is used, and nothing changes."""

import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple

import boto3
import pytest

from helpers.checkpoints import ORIGIN, make, snapshot_of
from helpers.faults import FaultyS3, Matches, Request, everything
from helpers.history import require_kept
from helpers.mortals import Halt, Mortals
from helpers.ranks import RankGroup
from helpers.training import restored_through
from helpers.world import TinyWorld
from stillhouse.checkpoint.choice import newest, newest_step
from stillhouse.checkpoint.manifest import Commit
from stillhouse.checkpoint.writer import CheckpointWriter
from stillhouse.retry import Patience
from stillhouse.store.object_store import Blobs
from stillhouse.student.job import TrainJob
from stillhouse.tracking import CheckpointEvent, DamagedEvent, JournalReader, RunEvent, TrainEvent

COLLECTIVES_S = 3.0  # the time-out of the process group in tests of restoring
STEPS, EVERY = (
    20,
    4,
    # the second checkpoint is due at step 8, and is taken then or, while the first is on its way,
    # soon after
)
_STEP = re.compile(r"step-(\d{8})")


class Phase(NamedTuple):
    """A moment in the life of the second checkpoint: a request that never gets through, or a row
    after which rank 0 stands still."""

    victim: int
    second_is_whole: bool
    request: Matches | None = None
    halt: type[TrainEvent | CheckpointEvent] | None = None


def puts(name: str) -> Matches:
    return lambda request: (
        request.method == "PUT" and name in request.path and step_in(request.path) > EVERY
    )


def manifests(request: Request) -> bool:
    return (
        request.method == "PUT"
        and re.search(r"step-\d{8}\.json", request.path) is not None
        and step_in(request.path) > EVERY
    )


def deletes(request: Request) -> bool:
    return request.method == "POST" and "delete" in request.path


def step_in(name: str) -> int:
    match = _STEP.search(name)
    return int(match[1]) if match else 0


PHASES = {
    "before the snapshot": Phase(0, False, halt=TrainEvent),
    "in the upload of the first rank's first file": Phase(
        0, False, puts("mp_rank_00_model_states.pt")
    ),
    "in the upload of the last rank's last file": Phase(
        1, False, puts("pp_rank_1_mp_rank_00_optim_states.pt")
    ),
    "when a rank's files are there, before it says so": Phase(
        1, False, puts("part-00001-of-00002.json")
    ),
    "when all parts are there, before the manifest": Phase(0, False, manifests),
    "after the manifest": Phase(0, True, halt=CheckpointEvent),
    "while the one before is deleted": Phase(0, True, deletes),
}


@pytest.fixture(scope="module")
def job(
    tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str
) -> TrainJob:
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="checkpoints")
    student = {
        "checkpoint_every_steps": EVERY,
        "keep_checkpoints": 1,
        "max_steps": STEPS,
        "init": "config",
    }
    plan = tiny_world.plan(tmp_path_factory.mktemp("run"), student=student)
    tiny_world.fill_store(plan)
    return plan.jobs[0]


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultyS3]:
    with FaultyS3(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def steady(job: TrainJob, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A training that nothing disturbed, with its last two checkpoints in a directory."""
    steady = in_folder(job, tmp_path_factory.mktemp("steady"), keep_checkpoints=2)
    Mortals(steady, world_size=2, environment={}).finish()
    return steady


def in_folder(job: TrainJob, folder: Path, **changes: Any) -> TrainJob:
    return replace(job, run_dir=folder, section=job.section.model_copy(update=changes))


def rows_of(job: TrainJob) -> list[RunEvent]:
    return list(JournalReader(job.journal).new_events())


def losses(events: list[RunEvent]) -> list[tuple[int, float, float]]:
    return [
        (event.step, event.loss, event.grad_norm)
        for event in events
        if isinstance(event, TrainEvent)
    ]


def until(condition: Callable[[], object], *, within_s: float = 120.0) -> None:
    deadline = monotonic() + within_s
    while not condition():
        assert monotonic() < deadline, "not within its time"
        sleep(0.02)


@pytest.mark.parametrize("name", PHASES)
def test_a_rank_killed_at_any_phase_of_a_checkpoint_leaves_the_newest_whole_one(
    job: TrainJob, steady: TrainJob, proxy: FaultyS3, tmp_path: Path, name: str
) -> None:
    phase = PHASES[name]
    killed = in_folder(job, tmp_path, checkpoint_url=f"s3://checkpoints/{tmp_path.name}")
    halt = None if phase.halt is None else Halt(phase.halt, EVERY + 1, tmp_path / "reached")
    if phase.request is not None:
        proxy.hold(phase.request)
    ranks = Mortals(killed, world_size=2, environment={"AWS_ENDPOINT_URL": proxy.url}, halt=halt)
    until(lambda: proxy.held if halt is None else halt.reached.exists())
    until(lambda: newest_step(killed.checkpoints) >= EVERY)
    ranks.kill(phase.victim)
    ranks.kill_all()
    until(lambda: not proxy.held)
    proxy.end()
    resumes_after = newest_step(killed.checkpoints)
    assert (resumes_after > EVERY) == phase.second_is_whole
    elsewhere = replace(killed, run_dir=tmp_path / "elsewhere")  # as if every machine were lost
    elsewhere.run_dir.mkdir()
    Mortals(elsewhere, world_size=2, environment={}).finish()
    again = rows_of(elsewhere)
    assert losses(again) == losses(rows_of(steady))[resumes_after:]
    assert not any(isinstance(event, DamagedEvent) for event in again)
    assert newest_step(killed.checkpoints) == STEPS
    require_kept(rows_of(killed), again, checkpoints={"student": killed.checkpoints})


def test_training_does_not_wait_for_a_store_that_holds_its_checkpoints_up(
    job: TrainJob, steady: TrainJob, proxy: FaultyS3, tmp_path: Path
) -> None:
    """Up to the last step, which has to be committed before the training ends; meanwhile no second
    snapshot is taken."""
    slow = in_folder(job, tmp_path, checkpoint_url=f"s3://checkpoints/{tmp_path.name}")
    proxy.hold(lambda request: request.method == "PUT" and "optim_states" in request.path)
    ranks = Mortals(slow, world_size=2, environment={"AWS_ENDPOINT_URL": proxy.url})
    until(lambda: len(losses(rows_of(slow) if slow.journal.exists() else [])) == STEPS)
    assert {step_in(request.path) for request in proxy.held} == {EVERY}
    proxy.end()
    ranks.finish()
    assert losses(rows_of(slow)) == losses(rows_of(steady))
    assert [event.step for event in rows_of(slow) if isinstance(event, CheckpointEvent)] == [
        EVERY,
        STEPS,
    ]
    require_kept(rows_of(slow), checkpoints={"student": slow.checkpoints})


def test_a_checkpoint_waits_for_a_store_that_is_away_says_why_and_is_committed_when_it_is_back(
    job: TrainJob, proxy: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job.checkpoints  # its bucket is there
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.refuse(lambda request: request.method == "PUT", status=503)
    url, committed, delays = (
        f"s3://checkpoints/{tmp_path.name}",
        list[tuple[Commit, float, float]](),
        list[tuple[int, str]](),
    )

    def on_commit(*plan: Any) -> None:
        committed.append(plan)

    only: dict[str, Any] = {
        "origin": ORIGIN,
        "attempt": "a",
        "rank": 0,
        "world_size": 1,
        "keep": 1,
        "patience": Patience(request_s=0.2),
    }
    with CheckpointWriter(
        url, **only, on_commit=on_commit, on_delay=lambda *delay: delays.append(delay)
    ) as writer:
        writer.submit(snapshot_of(3))
        until(lambda: len(proxy.refused) >= 10)
        ((step, why),) = delays
        assert step == 3
        assert "too busy" in why
        assert (writer.busy, committed) == (True, [])
        proxy.end()
        assert writer.wait()
        assert len(delays) == len(committed) == 1
    assert newest(url) == committed[0][0]


def test_a_bucket_that_is_away_while_a_group_restarts_is_waited_for_by_every_rank(
    rank_groups: dict[int, RankGroup], s3_endpoint: str, proxy: FaultyS3, tmp_path: Path
) -> None:
    """It is away for longer than a collective may take; and when it is back, the first answer for a
    file comes cut short."""
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="away")
    url = f"s3://away/{tmp_path.name}"
    make(url, 10, 20)
    patience = Patience(request_s=0.2, tell_after_s=0.5, last_pause_s=0.5)
    outage = proxy.refuse(everything, status=503)
    with ThreadPoolExecutor(1) as threads:
        restoring = threads.submit(
            rank_groups[2].call, restored_through, url, proxy.url, patience, COLLECTIVES_S
        )
        until(lambda: restoring.done() or proxy.refused)
        began = monotonic()
        until(lambda: restoring.done() or monotonic() - began > 1.2 * COLLECTIVES_S)
        proxy.truncate(
            lambda request: (
                request.method == "GET" and "step-00000020.a/model_states.bin" in request.path
            ),
            times=1,
        )
        proxy.end(outage)
        (first, told_first), (second, told_second) = restoring.result(timeout=120)
    assert (first, second) == ("step 20", "step 20")
    assert [len(told_first), len(told_second)] == [1, 0]
    assert "too busy" in told_first[0]
    assert sorted(Blobs(url).names()) == ["step-00000010.json", "step-00000020.json"]


def test_a_bucket_that_stays_away_ends_the_restart_on_every_rank(
    rank_groups: dict[int, RankGroup], s3_endpoint: str, proxy: FaultyS3
) -> None:
    assert s3_endpoint != proxy.url
    proxy.refuse(everything, status=503)
    patience = Patience(request_s=0.1, tell_after_s=0.0, end_after_s=0.5, last_pause_s=0.1)
    answers = rank_groups[2].call(
        restored_through, "s3://away/nothing", proxy.url, patience, COLLECTIVES_S
    )
    assert all("too busy" in answer and "given up" in answer for answer, _ in answers)


FILES = {
    "manifest": "step-00000020.json",
    "part": "step-00000020.*/part-00001-of-00002.json",
    "model state": "step-00000020.*/mp_rank_00_model_states.pt",
    "optimiser state": "step-00000020.*/*pp_rank_1_mp_rank_00_optim_states.pt",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found_and_named_and_the_one_before_is_used(
    steady: TrainJob, tmp_path: Path, kind: str
) -> None:
    copy = in_folder(steady, tmp_path)
    shutil.copytree(steady.checkpoints, copy.checkpoints)
    before, _ = sorted(step_in(path.name) for path in Path(copy.checkpoints).glob("*.json"))
    (damaged,) = Path(copy.checkpoints).glob(FILES[kind])
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    Mortals(copy, world_size=2, environment={}).finish()
    assert losses(rows_of(copy)) == losses(rows_of(steady))[before:]
    (event,) = (event for event in rows_of(copy) if isinstance(event, DamagedEvent))
    assert damaged.name in event.problem
    assert newest_step(copy.checkpoints) == STEPS
    require_kept(rows_of(steady), rows_of(copy), checkpoints={"student": copy.checkpoints})
