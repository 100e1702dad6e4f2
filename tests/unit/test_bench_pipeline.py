"""A pace is that of a steady stretch, whatever bursts and waits it is made of; what it is compared
with is the same training."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from helpers.models import make_model
from stillhouse.bench.figures import Spread, steady_pace
from stillhouse.bench.in_turn import Lesson, train_in_turn
from stillhouse.bench.pipeline import InTurn, Round, paces, ratios
from stillhouse.bench.provenance import Provenance
from stillhouse.config import StudentSection, TeacherSection
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.errors import RunError
from stillhouse.logits import concatenate
from stillhouse.models.batch import TokenBatch
from stillhouse.models.load import load_model
from stillhouse.sequence import Sequences, WorkItem
from stillhouse.store import Recipe
from stillhouse.student.engine import StudentEngine
from stillhouse.student.loader import MicroBatch
from stillhouse.tracking import CheckpointEvent, ChunkEvent, RunEvent, StartEvent, TrainEvent

TOKENS = 1000  # of a step

# Journals made by hand
# ------------------------------------------------------------------------------------------------


def start_row(time: float, *, attempt: int = 1) -> StartEvent:
    return StartEvent(
        attempt,
        "run",
        {},
        "t",
        "s",
        "f" * 64,
        8,
        64,
        32,
        2048,
        40,
        0,
        300,
        8,
        1,
        1,
        2,
        16,
        False,
        time=time,
    )


def train_row(step: int, time: float, *, wait: float = 0.0, tokens: int = TOKENS) -> TrainEvent:
    return TrainEvent("student", step, 1.0, 1.0, None, 1.0, 1e-3, tokens, 1.0, wait, 1.0, time=time)


def chunk_row(number: int, time: float) -> ChunkEvent:
    return ChunkEvent(number, 500, 100, 2.0, 0, 0.9, 1e-6, 1e-6, False, time=time)


def test_a_steady_run_has_the_pace_of_its_steps_and_its_start_up_is_told_apart() -> None:
    rows = [start_row(100.0), *(train_row(step + 1, 130.0 + 2.0 * step) for step in range(16))]
    pace = steady_pace(rows, window_steps=2, chunks_per_step=0.5)
    assert pace.tokens_per_s == pytest.approx(TOKENS / 2.0)
    assert (pace.first_step, pace.last_step) == (4, 16)
    assert pace.start_up_s == 30.0


def in_bursts(num_windows: int) -> list[RunEvent]:
    """A student that waits 6 s for each window's two chunks and then takes four steps of 1 s."""
    rows: list[RunEvent] = [start_row(0.0)]
    for window in range(num_windows):
        now = 50.0 + 10.0 * window
        rows += [chunk_row(2 * window, now + 3.0), chunk_row(2 * window + 1, now + 6.0)]
        rows += [
            train_row(4 * window + step, now + 6.0 + step, wait=6.0 if step == 1 else 0.0)
            for step in (1, 2, 3, 4)
        ]
    return rows


@pytest.mark.parametrize("num_windows", [4, 5, 6, 7, 9])
def test_bursts_and_waits_count_in_full_wherever_the_quarter_and_the_last_chunk_fall(
    num_windows: int,
) -> None:
    pace = steady_pace(in_bursts(num_windows), window_steps=4, chunks_per_step=0.5)
    assert pace.tokens_per_s == pytest.approx(4 * TOKENS / 10.0)
    assert pace.data_wait_s / pace.seconds == pytest.approx(0.6)
    assert pace.teacher_busy_s / pace.seconds == pytest.approx(0.4)


def test_steps_after_the_teachers_last_chunk_are_not_counted() -> None:
    bursts = in_bursts(6)
    fast_end = [train_row(25 + step, 110.5 + 0.01 * step) for step in range(40)]
    pace = steady_pace([*bursts, *fast_end], window_steps=4, chunks_per_step=0.5)
    assert pace.last_step == 20
    assert pace.tokens_per_s == pytest.approx(4 * TOKENS / 10.0)


def test_a_lead_that_teachers_built_up_before_the_stretch_is_told() -> None:
    early, late = (
        [chunk_row(number, 10.0) for number in range(8)],
        [chunk_row(8 + number, 30.0 + number) for number in range(4)],
    )
    steps = [train_row(step, 20.0 + step) for step in range(1, 17)]
    pace = steady_pace([start_row(0.0), *early, *late, *steps], window_steps=2, chunks_per_step=0.5)
    assert (pace.first_step, pace.last_step) == (4, 12)
    assert pace.chunks_ahead == (8 - 4 / 2, 11 - 12 / 2)


def test_checkpoints_within_the_stretch_are_counted() -> None:
    steps = [train_row(step, 20.0 + step) for step in range(1, 17)]
    checkpoints = [
        CheckpointEvent("student", step, 0.75, 1000, 0.25, time=20.5 + step)
        for step in (2, 8, 12, 16)
    ]
    assert (
        steady_pace(
            [start_row(0.0), *steps, *checkpoints], window_steps=2, chunks_per_step=0.5
        ).checkpoint_s
        == 0.5
    )


def test_a_run_whose_teachers_were_done_too_early_is_refused() -> None:
    rows = [
        start_row(0.0),
        chunk_row(0, 21.5),
        *(train_row(step, 20.0 + step) for step in range(1, 17)),
    ]
    with pytest.raises(RunError, match=r"taken 1 of its 16 steps.*window_bytes"):
        steady_pace(rows, window_steps=1, chunks_per_step=0.5)


def test_a_spread_is_the_median_and_both_ends() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)


# What the pipeline is compared with
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    """Three steps of four sequences in micro-batches of two; every id is kept, so sparse and dense
    targets say the same."""
    folder, vocab_size = tmp_path_factory.mktemp("models"), 300
    make_model(folder / "teacher", vocab_size=vocab_size, weight_std=0.3, seed=1)
    make_model(folder / "student", vocab_size=vocab_size, hidden_size=16, seed=2)
    teacher = TeacherSection(model=str(folder / "teacher"), dtype="float32", batch_sequences=2)
    student = StudentSection(
        model=str(folder / "student"),
        dtype="float32",
        global_batch_sequences=4,
        micro_batch_sequences=2,
        learning_rate=1e-2,
        zero_stage=0,
    )
    recipe = Recipe(
        corpus_digest="c" * 64,
        num_sequences=12,
        sequence_length=16,
        packing="packed",
        chunk_sequences=4,
        tokenizer_digest="d" * 64,
        vocab_size=vocab_size,
        teacher_digest="e" * 64,
        teacher_dtype="float32",
        k=vocab_size,
        num_draws=0,
        temperature=1.0,
        value_bits=8,
    )
    random = np.random.default_rng(0)
    mask = (random.random((12, 16)) < 0.8).astype(np.uint8)
    mask[:, -1] = 0
    rows = Sequences(
        random.integers(0, vocab_size, (12, 16), dtype=np.int32),
        np.tile(np.arange(16, dtype=np.int32), (12, 1)),
        mask,
    )
    return Lesson("compressed", teacher, student, recipe, rows, threads=1)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process."""
    for name, value in {
        "LOCAL_RANK": "0",
        "DS_ACCELERATOR": "cpu",
    }.items():  # as Ray Train and `prepare_process` do
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_in_turn_takes_the_steps_that_the_engine_takes(lesson: Lesson) -> None:
    section, recipe = lesson.student, lesson.recipe
    teacher = TransformersEngine(lesson.teacher, recipe, device="cpu")
    engine = StudentEngine(
        load_model(section),
        section=section,
        vocab_size=recipe.vocab_size,
        num_micro_batches=2,
        device=torch.device("cpu"),
    )

    def micro_batch(rows: Sequences) -> MicroBatch:
        return MicroBatch(TokenBatch.of(rows), concatenate(teacher.targets(WorkItem(0, rows))))

    batches = [
        micro_batch(lesson.rows.select(slice(start, start + 2))) for start in range(0, 12, 2)
    ]
    expected = [
        engine.train_step(
            batches[2 * step : 2 * step + 2], step=step, learning_rate=section.learning_rate
        )
        for step in range(3)
    ]
    engine.close()

    taken = train_in_turn(lesson)
    assert [step.num_tokens for step in taken] == [step.num_tokens for step in expected]
    assert [step.loss for step in taken] == pytest.approx(
        [step.loss for step in expected], rel=1e-5
    )
    assert expected[2].loss < expected[0].loss


def test_dense_targets_teach_what_sparse_ones_do_where_every_entry_is_kept(lesson: Lesson) -> None:
    sparse, dense = train_in_turn(lesson), train_in_turn(replace(lesson, form="dense"))
    assert [step.loss for step in dense] == pytest.approx([step.loss for step in sparse], rel=1e-4)


# What is told
# ------------------------------------------------------------------------------------------------


def rounds() -> list[Round]:
    def one(factor: float) -> Round:
        rows = [start_row(0.0), *(train_row(step, 20.0 + step / factor) for step in range(1, 17))]
        pace = steady_pace(rows, window_steps=2, chunks_per_step=0.5)
        return Round(
            run=pace,
            in_turn=InTurn(1000, 2.0, 1.0),
            in_turn_dense=InTurn(1000, 4.0, 1.0),
            cached=pace,
        )

    return [one(0.5), one(1.0), one(2.0)]


def test_ratios_are_taken_within_a_round() -> None:
    assert ratios(rounds())["run / in_turn"] == Spread(2.0, 1.0, 4.0)
    assert paces(rounds())["run"] == Spread(1000.0, 500.0, 2000.0)


def test_the_record_is_plain_values_with_its_machine_commit_and_command() -> None:
    provenance = Provenance.of("stillhouse bench pipeline --rounds 3")
    values = json.loads(json.dumps(asdict(provenance)))
    assert values["command"] == "stillhouse bench pipeline --rounds 3"
    assert values["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert values["num_cores"] >= 1
