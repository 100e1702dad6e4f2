"""A run that an earlier tree began, in files that do not change: this tree goes on with it, reads
it and describes it to the same numbers.

Chunks are compared bit for bit. Losses may differ in their last digits, since the order of sums in
a product is the processor's.
"""

from pathlib import Path
from typing import Any

import pytest
import xxhash

from helpers.command import stillhouse
from helpers.goldenrun import GoldenRun
from stillhouse import pipeline
from stillhouse.pipeline import Plan
from stillhouse.store import ChunkStore, verify_store
from stillhouse.store.labels import labels_of, moment
from stillhouse.tracking import (
    CheckpointEvent,
    ChunkEvent,
    EvalEvent,
    StartEvent,
    TrainEvent,
    latest_train_events,
    read_journal,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")

CLOSE: dict[str, Any] = {"rel": 1e-6, "abs": 1e-9}
LISTED = "fe87516355db46cb  8aed18cfa6c5  ef-sqrt8  8 + 12 draws  230 x 16  8 of 29  44.7 kB"
FIGURES = (
    "step 6 of 10",
    "4.53 nats a token",
    "23.5",
    "1,197 tokens",
    "1.2·10⁻⁶",
    "3,127",
    "6,119",
    "0.5 %",
    "2.4 %",
    "103 kB",
    "330 kB",
    "1.82 MB",
)
NEW_STUDENT = [  # step, loss, gradient norm
    [1, 4.566211191813151, 0.10949559188796523],
    [2, 4.5786290486653645, 0.10087566818484012],
    [3, 4.555149879776129, 0.11776885068573482],
    [4, 4.509080251057942, 0.1456297959277111],
    [5, 4.487669118245443, 0.1436054945681287],
    [6, 4.502080580767463, 0.1290851845239037],
    [7, 4.503496186072085, 0.12724334285848052],
]


@pytest.fixture
def golden(tmp_path: Path) -> GoldenRun:
    return GoldenRun.copied(tmp_path / "golden")


def planned(golden: GoldenRun, run_dir: Path) -> Plan:
    return pipeline.make_plan(golden.config(), run_dir=run_dir, cache_dir=golden.folder / "cache")


def curve(run_dir: Path) -> list[float]:
    """Step, loss and gradient norm of each step in turn."""
    events = latest_train_events(read_journal(run_dir / "journal.jsonl"), "student")
    return [value for event in events for value in (event.step, event.loss, event.grad_norm)]


def expected_curve(golden: GoldenRun) -> list[float]:
    return [value for step in golden.expected["curve"] for value in step]


def test_a_run_of_an_earlier_tree_is_finished_to_the_same_numbers(golden: GoldenRun) -> None:
    plan, expected = planned(golden, golden.run_dir), golden.expected
    assert plan.recipe.fingerprint == expected["fingerprint"]
    pipeline.run(plan)

    # the attempt took up the commit of step 5
    events = read_journal(golden.run_dir / "journal.jsonl")
    starts = [index for index, event in enumerate(events) if isinstance(event, StartEvent)]
    assert len(starts) == 2
    assert [event.step for event in events[starts[1] :] if isinstance(event, TrainEvent)] == [
        6,
        7,
        8,
        9,
        10,
    ]
    assert [event.step for event in events if isinstance(event, CheckpointEvent)] == [5, 10]

    # the two chunks that were missing are the ones that the earlier tree made, and the others were
    # not made again
    assert {event.chunk for event in events[starts[1] :] if isinstance(event, ChunkEvent)} == set(
        plan.chunks[-2:]
    )
    store = ChunkStore(plan.config.store.url, plan.recipe)
    digests = {
        str(number): xxhash.xxh3_64_hexdigest(Path(store.url, store.key(number)).read_bytes())
        for number in plan.chunks
    }
    assert digests == expected["chunks"]

    # its store is labelled now, as of the time at which the run began
    (label,) = labels_of(store).labels
    assert (label.created, label.names["student"]) == (
        moment(events[0].time),
        plan.config.student.model,
    )

    # losses, gradients and scores
    assert curve(golden.run_dir) == pytest.approx(expected_curve(golden), **CLOSE)
    for event in (event for event in events if isinstance(event, EvalEvent)):
        scores = {
            name: value
            for name, value in expected["scores"][event.model].items()
            if value is not None
        }
        assert {name: getattr(event, name) for name in scores} == pytest.approx(scores, **CLOSE)


def test_a_new_student_reads_the_store_of_an_earlier_tree(
    golden: GoldenRun, tmp_path: Path
) -> None:
    config = golden.config()
    student = config.student.model_copy(
        update={"max_steps": 7, "zero_stage": 3, "learning_rate": 2e-2}
    )
    plan = pipeline.make_plan(
        config.model_copy(update={"student": student}),
        run_dir=tmp_path / "new",
        cache_dir=golden.folder / "cache",
    )
    pipeline.train(plan)
    assert curve(plan.run_dir) == pytest.approx(
        [value for step in NEW_STUDENT for value in step], **CLOSE
    )


def test_the_report_of_a_run_of_an_earlier_tree_has_its_figures(golden: GoldenRun) -> None:
    outcome = stillhouse("report", golden.run_dir)
    assert outcome.code == 0, outcome.err
    page = " ".join((golden.run_dir / "report.html").read_text().replace("&nbsp;", " ").split())
    assert [figure for figure in FIGURES if figure not in page] == []


def test_the_store_of_an_earlier_tree_is_listed_and_whole(golden: GoldenRun) -> None:
    outcome = stillhouse("store", "ls", golden.store)
    assert outcome.code == 0, outcome.err
    assert outcome.out.split()[-len(LISTED.split()) :] == LISTED.split()
    assert [
        finding for finding in verify_store(str(golden.store)) if finding.problem is not None
    ] == []
