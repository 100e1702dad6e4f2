"""`stillhouse bench restart`: from a killed rank to the next step, beside Ray Train and DeepSpeed
as their documentation joins them.

Both train the same model on two ranks with the same ZeRO stage and commit as often, on one Ray
cluster, one after the other; each round begins with the other one. A rank is killed once there is a
commit, several times in a row. The time until Ray Train calls the training function again is
measured as well: it is a lower bound for whatever runs on Ray Train.
"""

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic, sleep, time

import psutil
import ray.train
from ray.train.torch import TorchTrainer
from rich.table import Table

from stillhouse import pipeline
from stillhouse.bench.as_documented import train_as_documented
from stillhouse.bench.cost import Timings
from stillhouse.bench.output import figures_table, shown, terminal, write_record
from stillhouse.bench.provenance import Provenance
from stillhouse.bench.setting import on_two_cores, prepare
from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.heartbeat import StopRequest
from stillhouse.cluster.placement import placement
from stillhouse.cluster.processes import local_secrets
from stillhouse.cluster.session import attached, settle_ray_train
from stillhouse.config import Config
from stillhouse.errors import RunError
from stillhouse.pipeline import Plan, make_plan
from stillhouse.student.job import TrainJob
from stillhouse.student.workers import fit
from stillhouse.tracking import CheckpointEvent, Journal, TrainEvent, read_journal

PLAIN, CALLED, OURS = "Ray Train + DeepSpeed", "of which until its function is called", "stillhouse"
_NUM_RANKS, _COMMIT_EVERY, _ZERO_STAGE = 2, 5, 2
_ENDLESS_STEPS = 1_000_000
_WAIT_S, _LOOK_EVERY_S = 300.0, 0.1
_LAST_STEP_S = 2.0  # a step that was nearly done may still end after the kill; no restart is faster
_WORKER = "ray::RayTrainWorker"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a training has written down so far, in unix seconds."""

    steps: Sequence[float]  # the end of each
    commits: Sequence[float]
    calls: Sequence[float] = ()  # of the training function


@dataclass(frozen=True, slots=True)
class Restart:
    """Seconds from a kill."""

    to_step: float  # that came next
    to_call: float | None = None  # of the training function


def bench_restart(
    work_dir: Path, *, num_rounds: int, num_kills: int, command: str, out: Path | None
) -> None:
    """Measure in a new directory under `work_dir`, print the table, and write all that was measured
    to `out`."""
    settle_ray_train()  # for both: how soon a dead rank is seen is a setting of Ray's
    # both ways, round by round
    with on_two_cores():
        provenance = Provenance.of(command)
        folder = work_dir / provenance.started.replace(":", "")
        folder.mkdir(parents=True)
        config = prepare(folder, num_steps=_COMMIT_EVERY * 4)
        with attached(config.cluster) as available:
            plan = _filled(config, folder)
            rounds = [
                _round(plan, folder / f"round-{number + 1}", available, number, num_kills)
                for number in range(num_rounds)
            ]
    timings = Timings(
        {way: [seconds for one in rounds for seconds in one[way]] for way in (PLAIN, CALLED, OURS)}
    )

    # what was measured, in a file and in words
    write_record(
        out,
        "restart",
        provenance,
        seconds={way: asdict(timings.of(way)) for way in timings.seconds},
        ours_over_plain=asdict(timings.ratio(OURS, PLAIN)),
        every_restart=dict(timings.seconds),
    )
    console = terminal()
    console.print(table(timings))
    console.print(f"Load average at the start: {provenance.load_average}.")


def table(timings: Timings) -> Table:
    """Medians (least to most)."""
    title = f"From a killed rank of {_NUM_RANKS} to the next step, ZeRO {_ZERO_STAGE}"
    found = figures_table(title, ["", "seconds", f"over\n{PLAIN}"])
    for way in timings.seconds:
        found.add_row(way, shown(timings.of(way), ".1f"), shown(timings.ratio(way, PLAIN), ".2f"))
    return found


def _filled(config: Config, folder: Path) -> Plan:
    """A run whose chunks are all there."""
    changes = {
        "num_workers": _NUM_RANKS,
        "zero_stage": _ZERO_STAGE,
        "checkpoint_every_steps": _COMMIT_EVERY,
        "max_steps": None,
    }
    student = config.student.model_copy(update=changes)
    store = config.store.model_copy(update={"url": str(folder / "store")})
    plan = make_plan(
        config.model_copy(update={"student": student, "store": store}),
        run_dir=folder / "fill",
        cache_dir=folder / "cache",
    )
    pipeline.produce(plan)
    return plan


def _round(
    plan: Plan, folder: Path, available: Mapping[str, float], number: int, num_kills: int
) -> dict[str, list[float]]:
    ways = {
        PLAIN: partial(_plain, plan, folder / "plain", available),
        OURS: partial(_ours, plan, folder / "ours", available),
    }
    found = {way: ways[way](num_kills) for way in (reversed(ways) if number % 2 else ways)}
    return {
        PLAIN: [each.to_step for each in found[PLAIN]],
        CALLED: [each.to_call for each in found[PLAIN] if each.to_call is not None],
        OURS: [each.to_step for each in found[OURS]],
    }


def _ours(
    plan: Plan, folder: Path, available: Mapping[str, float], num_kills: int
) -> list[Restart]:
    # a training that ends when it is stopped
    run_dir, student, store_url = folder / "run", plan.config.student, plan.config.store.url
    run_dir.mkdir(parents=True)
    job = TrainJob("student", student, plan.recipe, store_url, run_dir, _ENDLESS_STEPS)
    journal, coordinator = Journal(job.journal), Coordinator.create(job.journal)
    train = partial(
        fit,
        (job,),
        where=placement(job.section, available),
        threads=plan.config.cluster.threads,
        secrets=local_secrets(),
        notices="off",
        coordinator=coordinator,
        teachers_at_work=False,
        journal=journal,
    )

    request = StopRequest("stop", _WAIT_S, "measured")

    # its events so far
    def seen() -> Seen:
        events = read_journal(job.journal) if job.journal.exists() else []
        steps, commits = (
            [event.time for event in events if isinstance(event, kind)]
            for kind in (TrainEvent, CheckpointEvent)
        )
        return Seen(steps, commits)

    with _in_the_background(train, stop=partial(coordinator.request_stop, "student", request)):
        return measured(seen, _kill_a_rank, num_kills=num_kills)


def _plain(
    plan: Plan, folder: Path, available: Mapping[str, float], num_kills: int
) -> list[Restart]:
    # a training as the documentation has it
    folder.mkdir(parents=True)
    section = plan.config.student
    sequences_at_once = section.micro_batch_sequences * _NUM_RANKS
    arguments = {
        "folder": str(folder.resolve()),
        "zero_stage": _ZERO_STAGE,
        "commit_every": _COMMIT_EVERY,
        "model": section.model,
        "batch": section.micro_batch_sequences,
        "length": plan.config.corpus.sequence_length,
        "accumulate": section.global_batch_sequences // sequences_at_once,
        "threads": plan.config.cluster.threads,
    }
    trainer = TorchTrainer(
        train_as_documented,
        train_loop_config=arguments,
        scaling_config=ray.train.ScalingConfig(
            num_workers=_NUM_RANKS, resources_per_worker=placement(section, available).times(1)
        ),
        run_config=ray.train.RunConfig(
            name="plain",
            storage_path=str((folder / "ray").resolve()),
            failure_config=ray.train.FailureConfig(max_failures=-1),
        ),
    )

    # its times so far
    def seen() -> Seen:
        return Seen(*(_times_in(folder / name) for name in ("steps", "commits", "calls")))

    with _in_the_background(trainer.fit, stop=(folder / "stop").touch):
        return measured(seen, _kill_a_rank, num_kills=num_kills)


def _times_in(path: Path) -> list[float]:
    return [float(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextmanager
def _in_the_background(
    train: Callable[[], object], *, stop: Callable[[], object]
) -> Iterator[None]:
    """Train in a thread while the block runs, then stop the training and wait for its end."""
    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join()


def measured(
    seen: Callable[[], Seen], kill: Callable[[], None], *, num_kills: int
) -> list[Restart]:
    """The restarts after `num_kills` kills, each made once the present group of ranks has committed
    and taken a step more."""
    found: list[Restart] = []
    since = time()
    for _ in range(num_kills):
        _until(partial(_has_gone_on, seen, since))
        killed = time()
        kill()
        since = killed + _LAST_STEP_S
        _until(partial(_has_stepped, seen, since))
        step, call = (
            next((each - killed for each in times if each > since), None)
            for times in (seen().steps, seen().calls)
        )
        assert step is not None
        found.append(Restart(step, call))
    return found


def _has_gone_on(seen: Callable[[], Seen], since: float) -> bool:
    now = seen()
    return any(since < commit < now.steps[-1] for commit in now.commits)


def _has_stepped(seen: Callable[[], Seen], since: float) -> bool:
    return seen().steps[-1] > since


def _kill_a_rank() -> None:
    random.choice(_ranks()).kill()


def _ranks() -> list[psutil.Process]:
    """The processes of the ranks, which this process's own cluster has started."""
    children = psutil.Process().children(recursive=True)
    return [each for each in children if _name_of(each).startswith(_WORKER)]


def _name_of(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


def _until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + _WAIT_S
    while not condition():
        if monotonic() > deadline:
            raise RunError(f"no step within {_WAIT_S:.0f} s; the logs of Ray say more")
        sleep(_LOOK_EVERY_S)
