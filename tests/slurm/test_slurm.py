"""`launch/slurm/run.sbatch` on a real Slurm, as its page says: it runs to the end, gives way when
it has to, and goes on from there."""

import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.command import as_toml
from helpers.environments import ROOT
from helpers.scene import curve
from helpers.slurm import FIRST, SECOND, URGENT, Job, Slurm, wait_until
from helpers.world import TinyWorld, merged
from stillhouse.tracking import ChunkEvent, EndEvent, RunEvent, StartEvent, TrainEvent, read_journal

# five starts of everything; half a minute each on a free machine, minutes on a busy one
pytestmark = pytest.mark.timeout(1800)

RANK, TEACHER = "ray::RayTrainWorker", "ray::_TeacherActor"
# from which the script makes two places for ranks on the first node, and two for teachers on the
# other
GPUS_PER_NODE = 2
CHANGES = {
    "teacher": {
        "device": "cpu",
        "resources": {"teacher": 1.0},
        "min_replicas": 2,
        "max_replicas": 2,
    },
    "student": {
        "device": "cpu",
        "resources": {"student": 1.0},
        "num_workers": 2,
        "max_steps": 300,
        "checkpoint_every_steps": 100,
    },
}


@dataclass(frozen=True)
class Submitted:
    """A run in Slurm's hands."""

    job: Job
    run_dir: Path
    # kind of process -> nodes on which one was seen
    places: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    @property
    def events(self) -> list[RunEvent]:
        return read_journal(self.run_dir / "journal.jsonl")

    @property
    def outcome(self) -> tuple[str, str, str]:
        return self.job["JobState"], self.job["ExitCode"], self.job["Restarts"]

    def wait_for_end(self) -> None:
        """Wait for its end, and look where its processes are."""
        wait_until(self._is_done)

    def wait_until_trained(self, *, attempt: int, num_steps: int) -> None:
        """Wait until that attempt has taken so many steps."""

        def trained() -> bool:
            events = self.events
            starts = [index for index, event in enumerate(events) if isinstance(event, StartEvent)]
            assert not self.job.has_ended(), self.job.log()
            return (
                len(starts) == attempt
                and sum(isinstance(event, TrainEvent) for event in events[starts[-1] :])
                >= num_steps
            )

        wait_until(trained)

    def _is_done(self) -> bool:
        for node in (FIRST, SECOND):
            for kind in (RANK, TEACHER):
                if any(title.startswith(kind) for title in self.job.slurm.titles(node)):
                    self.places[kind].add(node)
        return self.job.has_ended()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm.open(tmp_path_factory.mktemp("slurm"), gpus_per_node=GPUS_PER_NODE) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Of somebody who has typed what the page says, and nothing before."""
    home, tools = tmp_path_factory.mktemp("home"), Path(sys.executable).parent
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")
    } | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    subprocess.run([tools / "stillhouse", "node", "token"], env=environment, check=True)
    return environment


@dataclass(frozen=True)
class Sbatch:
    """The command that the page gives, for runs in the tiny world."""

    slurm: Slurm
    world: TinyWorld
    environment: Mapping[str, str]

    def __call__(self, run_dir: Path, **changes: dict[str, Any]) -> Submitted:
        config = run_dir.with_suffix(".toml")
        config.write_text(
            as_toml(
                merged(
                    merged(self.world.values, CHANGES | {"store": {"url": f"{run_dir}-store"}}),
                    changes,
                )
            )
        )
        words = (
            "--nodes=2",
            f"--gpus-per-node={GPUS_PER_NODE}",
            ROOT / "launch/slurm/run.sbatch",
            config,
            run_dir,
        )
        return Submitted(self.slurm.submit(*words, environment=self.environment), run_dir)


@pytest.fixture(scope="module")
def sbatch(slurm: Slurm, tiny_world: TinyWorld, environment: Mapping[str, str]) -> Sbatch:
    return Sbatch(slurm, tiny_world, environment)


@pytest.fixture(scope="module")
def undisturbed(sbatch: Sbatch, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    run = sbatch(tmp_path_factory.mktemp("undisturbed") / "run")
    run.wait_for_end()
    return run


def test_a_job_ends_well_with_every_chunk_made_once(undisturbed: Submitted) -> None:
    assert undisturbed.outcome == ("COMPLETED", "0:0", "0"), undisturbed.job.log()
    start, *events, end = undisturbed.events
    assert isinstance(start, StartEvent)
    assert isinstance(end, EndEvent)
    assert end.outcome == "done"
    assert Counter(event.chunk for event in events if isinstance(event, ChunkEvent)) == Counter(
        range(start.num_chunks)
    )
    assert [step for step, *_ in curve(events)] == list(range(1, start.total_steps + 1))


def test_ranks_are_on_the_first_node_and_teachers_on_the_other(undisturbed: Submitted) -> None:
    assert undisturbed.places == {RANK: {FIRST}, TEACHER: {SECOND}}


def test_a_job_told_to_go_and_then_preempted_goes_on_from_its_commits_to_the_same_bits(
    slurm: Slurm, sbatch: Sbatch, undisturbed: Submitted, tmp_path: Path
) -> None:
    run = sbatch(tmp_path / "run")
    run.wait_until_trained(attempt=1, num_steps=10)
    run.job.terminate()
    run.wait_until_trained(attempt=2, num_steps=10)
    urgent = slurm.submit(
        f"--partition={URGENT}", "--nodes=2", "--exclusive", "--wrap=true", environment=os.environ
    )
    run.wait_for_end()
    assert urgent["JobState"] == "COMPLETED"
    assert run.outcome == ("COMPLETED", "0:0", "2"), run.job.log()
    events = run.events
    assert [event.attempt for event in events if isinstance(event, StartEvent)] == [1, 2, 3]
    assert [event.outcome for event in events if isinstance(event, EndEvent)] == [
        "interrupted",
        "interrupted",
        "done",
    ]
    # no step was taken twice
    assert len([event for event in events if isinstance(event, TrainEvent)]) == len(curve(events))
    assert curve(events) == curve(undisturbed.events)


def test_a_run_that_fails_fails_its_job_with_its_own_exit_code_and_leaves_nothing(
    slurm: Slurm, sbatch: Sbatch, tmp_path: Path
) -> None:
    run = sbatch(tmp_path / "run", store={"url": "memory://"})
    run.wait_for_end()
    assert run.outcome == ("FAILED", "2:0", "0"), run.job.log()
    # Ray's dashboard forks processes that end seconds after it
    wait_until(
        lambda: not any("ray" in title for node in (FIRST, SECOND) for title in slurm.titles(node))
    )
