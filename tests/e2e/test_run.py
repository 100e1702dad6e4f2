"""The whole line on real parts: Ray actors teach, Ray Train and DeepSpeed learn, the store is between them, and nothing depends on luck."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import boto3
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.faults import FaultyS3, publications
from helpers.world import TinyWorld
from stillhouse import pipeline
from stillhouse.errors import RecipeError, StoreError
from stillhouse.pipeline import Plan
from stillhouse.pipeline.directory import changes_that_matter, config_of
from stillhouse.store import ChunkStore
from stillhouse.store.readers import registered
from stillhouse.student import checkpoint
from stillhouse.tracking import ChunkRow, EndRow, EvalRow, Role, Row, StartRow, TeacherRow, TrainRow, latest_train_rows, read_journal

pytestmark = pytest.mark.usefixtures("ray_cluster")

TEACHERS = {"min_replicas": 2, "max_replicas": 2}
STUDENT = {"zero_stage": 2, "max_steps": 60}


def journal(made: Plan) -> list[Row]:
    return read_journal(made.run_dir / "journal.jsonl")


def curve(made: Plan, role: Role = "student") -> list[tuple[int, float, float]]:
    return [(row.step, row.loss, row.grad_norm) for row in latest_train_rows(journal(made), role)]


@pytest.fixture(scope="module")
def undisturbed(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A run of two teachers, a student and a control, from an empty store to the report."""
    folder = tmp_path_factory.mktemp("undisturbed")
    made = tiny_world.plan(
        folder / "run", store={"url": str(folder / "store")}, teacher=TEACHERS, student=STUDENT, evaluate={"control": True}
    )
    pipeline.run(made)
    return made


def test_a_run_ends_with_every_chunk_every_step_and_a_report(undisturbed: Plan) -> None:
    rows = journal(undisturbed)
    made_once = Counter(row.chunk for row in rows if isinstance(row, ChunkRow))
    assert made_once == Counter(undisturbed.chunks)
    assert ChunkStore(undisturbed.config.store.url, undisturbed.recipe).published() == set(undisturbed.chunks)
    assert {row.replica for row in rows if isinstance(row, TeacherRow)} == {0, 1}
    for role in ("student", "control"):
        assert [step for step, *_ in curve(undisturbed, role)] == list(range(1, 61))
    assert isinstance(rows[-1], EndRow)
    assert rows[-1].outcome == "done"
    assert (undisturbed.run_dir / "report.html").stat().st_size > 10_000


def test_the_student_is_nearer_to_its_teacher_than_the_control(undisturbed: Plan) -> None:
    scores = {row.model: row for row in journal(undisturbed) if isinstance(row, EvalRow)}
    assert scores.keys() == {"teacher", "student", "control"}
    student, control = scores["student"], scores["control"]
    assert student.kl is not None
    assert control.kl is not None
    assert student.kl < control.kl
    assert student.num_tokens == control.num_tokens == undisturbed.split.heldout.num_targets


def test_produce_then_train_through_s3_is_the_same_training_as_run(
    undisturbed: Plan, tiny_world: TinyWorld, s3_endpoint: str, tmp_path: Path
) -> None:
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="whisky")
    made = tiny_world.plan(tmp_path / "run", store={"url": "s3://whisky/casks"}, teacher=TEACHERS, student=STUDENT)
    with pytest.raises(StoreError, match="stillhouse produce"):
        pipeline.train(made)
    pipeline.produce(made)
    assert ChunkStore("s3://whisky/casks", made.recipe).published() == set(made.chunks)
    pipeline.train(made)
    assert curve(made) == curve(undisturbed)


@pytest.fixture
def faulty_s3(s3_endpoint: str) -> Iterator[FaultyS3]:
    with FaultyS3(s3_endpoint) as proxy:
        yield proxy


def run_until(made: Plan, config: Path, stop: signal.Signals, *, reached: Callable[[list[Row]], bool], s3: FaultyS3) -> int:
    """Start the command on its own cluster, send the signal once the journal says so, and return the exit code."""
    command = [str(Path(sys.executable).parent / "stillhouse"), "run", str(config), "--run-dir", str(made.run_dir)]
    environment = os.environ | {"XDG_CACHE_HOME": str(made.run_dir.parent / "cache"), "AWS_ENDPOINT_URL": s3.url}
    path = made.run_dir / "journal.jsonl"
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell has what it starts in the background ignore it, and that is inherited
    with (made.run_dir.parent / f"{stop.name}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            deadline = monotonic() + 240
            while process.poll() is None and not reached(read_journal(path)):
                assert monotonic() < deadline, Path(log.name).read_text()
                sleep(0.2)
            process.send_signal(stop)
            return process.wait(timeout=60)
        finally:
            process.kill()


def attempt_has_trained(number: int) -> Callable[[list[Row]], bool]:
    """Whether the journal shows that the attempt is a few steps past a checkpoint."""

    def reached(rows: list[Row]) -> bool:
        starts = [index for index, row in enumerate(rows) if isinstance(row, StartRow)]
        return len(starts) == number and sum(isinstance(row, TrainRow) for row in rows[starts[-1] :]) >= 6

    return reached


@pytest.mark.timeout(900)  # three starts of everything; seconds on a free machine, minutes on a busy one
def test_a_run_killed_and_then_interrupted_goes_on_bit_identically(
    undisturbed: Plan, tiny_world: TinyWorld, faulty_s3: FaultyS3, s3_endpoint: str, tmp_path: Path
) -> None:
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="grappa")
    settings = {"store": {"url": "s3://grappa/casks", "retain": "until-read"}, "cluster": {"num_cpus": 4}}
    made = tiny_world.plan(tmp_path / "run", **settings, student=STUDENT | {"checkpoint_every_steps": 4})
    config = tmp_path / "run.toml"
    config.write_text(as_toml(made))

    first = faulty_s3.hold(publications(but=made.chunks[:12]))  # a step reads one chunk: no attempt can be done before its signal comes
    assert run_until(made, config, signal.SIGKILL, reached=attempt_has_trained(1), s3=faulty_s3) == -signal.SIGKILL
    second = faulty_s3.hold(publications(but=made.chunks[:24]))
    faulty_s3.end(first)
    assert run_until(made, config, signal.SIGINT, reached=attempt_has_trained(2), s3=faulty_s3) == 130
    faulty_s3.end(second)
    pipeline.run(tiny_world.plan(made.run_dir, **settings, student=STUDENT | {"checkpoint_every_steps": 100, "prefetch_batches": 1}))
    rows = journal(made)
    assert [row.attempt for row in rows if isinstance(row, StartRow)] == [1, 2, 3]
    assert [row.outcome for row in rows if isinstance(row, EndRow)] == ["interrupted", "done"]
    assert curve(made) == curve(undisturbed)
    store = ChunkStore(made.config.store.url, made.recipe)
    assert [(reader.committed_step, reader.total_steps) for reader in registered(store).readers] == [(60, 60)]
    assert store.published() == set()  # every chunk was deleted once it was read, and none was needed again


def as_toml(made: Plan) -> str:
    """The config as TOML that the command reads: strings and numbers are written alike in JSON."""
    lines = []
    for name, section in made.config.model_dump(mode="json", exclude_none=True).items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {as_toml_value(value)}" for key, value in section.items()]
    return "\n".join(lines) + "\n"


def as_toml_value(value: object) -> str:
    return "{}" if value == {} else json.dumps(value)


def test_a_run_directory_is_refused_to_another_recipe_and_another_batch(undisturbed: Plan, tiny_world: TinyWorld) -> None:
    def again(**changes: dict[str, object]) -> Plan:
        store = {"url": undisturbed.config.store.url}
        return tiny_world.plan(undisturbed.run_dir, **{"store": store, "teacher": TEACHERS, "student": STUDENT, **changes})

    with pytest.raises(RecipeError, match=r"target\.k: 8 -> 9"):
        pipeline.run(again(target={"k": 9}))
    with pytest.raises(RecipeError, match=r"student\.global_batch_sequences: 8 -> 4"):
        pipeline.run(again(student=STUDENT | {"global_batch_sequences": 4}))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("student", "learning_rate", 1e-5),
        ("student", "max_steps", 99),
        ("student", "num_cpus", 2.0),
        ("student", "tail_as_bucket", True),
        ("teacher", "max_replicas", 9),
        ("store", "window_bytes", 1 << 20),
        ("store", "retain", "until-read"),
        ("evaluate", "control", False),
        ("tracking", "project", "another"),
        ("cluster", "threads", 2),
    ],
)
def test_a_resumed_run_may_change_pace_placement_and_logging(undisturbed: Plan, section: str, key: str, value: object) -> None:
    changed = getattr(undisturbed.config, section).model_copy(update={key: value})
    assert changes_that_matter(undisturbed.config, undisturbed.config.model_copy(update={section: changed})) == []


def test_an_export_opens_as_a_plain_model(undisturbed: Plan, tmp_path: Path) -> None:
    steps = pipeline.export_run(undisturbed, tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    ids = tokenizer("def merge(a, b):", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    newest = checkpoint.newest(str(undisturbed.run_dir / "checkpoints" / "student"))
    assert newest is not None
    assert steps == newest.step
    card = (tmp_path / "student" / "README.md").read_text()
    assert undisturbed.recipe.fingerprint in card
    assert undisturbed.config.teacher.model in card
    assert config_of(undisturbed.run_dir) == undisturbed.config
