"""The whole line on real parts: Ray actors teach, Ray Train and DeepSpeed learn, the store is
between them, and nothing depends on luck."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import boto3
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.command import Outcome, stillhouse
from helpers.commands import CommandServer
from helpers.faults import FaultyS3, publications
from helpers.s3 import forbid_writing
from helpers.world import TinyWorld
from stillhouse import api, pipeline
from stillhouse.checkpoint import choice
from stillhouse.cli.closing import verdict_of
from stillhouse.errors import RecipeError, StoreError
from stillhouse.pipeline import Plan
from stillhouse.pipeline.run_dir import changes_that_matter, config_of
from stillhouse.redaction import secrets_of
from stillhouse.store import ChunkStore
from stillhouse.store.consumers import registered
from stillhouse.store.labels import labels_of
from stillhouse.tracking import (
    ChunkEvent,
    EndEvent,
    EvalEvent,
    Role,
    RunEvent,
    StartEvent,
    TeacherEvent,
    TrainEvent,
    latest_heldout_events,
    latest_train_events,
    read_journal,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")

TEACHERS = {"min_replicas": 2, "max_replicas": 2}
STUDENT = {"zero_stage": 2, "max_steps": 60}


def journal(plan: Plan) -> list[RunEvent]:
    return read_journal(plan.run_dir / "journal.jsonl")


def curve(plan: Plan, role: Role = "student") -> list[tuple[int, float, float]]:
    return [(row.step, row.loss, row.grad_norm) for row in latest_train_events(journal(plan), role)]


@pytest.fixture(scope="module")
def undisturbed(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A run of two teachers, a student and a control, from an empty store to the report."""
    folder = tmp_path_factory.mktemp("undisturbed")
    plan = tiny_world.plan(
        folder / "run",
        store={"url": str(folder / "store")},
        teacher=TEACHERS,
        student=STUDENT,
        evaluate={"control": True, "every_steps": 25, "tokens_while_learning": 64},
    )
    pipeline.run(plan)
    return plan


def test_a_run_ends_with_every_chunk_every_step_and_a_report(undisturbed: Plan) -> None:
    rows = journal(undisturbed)
    # a slow teacher's last chunk may be computed a second time, and is published once
    published = [row.chunk for row in rows if isinstance(row, ChunkEvent) and not row.duplicate]
    assert Counter(published) == Counter(undisturbed.chunks)
    assert ChunkStore(undisturbed.config.store.url, undisturbed.recipe).published() == set(
        undisturbed.chunks
    )
    assert {row.replica for row in rows if isinstance(row, TeacherEvent)} == {0, 1}
    for role in ("student", "control"):
        assert [step for step, *_ in curve(undisturbed, role)] == list(range(1, 61))
    assert isinstance(rows[-1], EndEvent)
    assert rows[-1].outcome == "done"
    assert (undisturbed.run_dir / "report.html").stat().st_size > 10_000


def test_every_process_of_a_run_leaves_its_log_beside_the_journal_and_no_secret_in_it(
    undisturbed: Plan,
) -> None:
    paths = [*(undisturbed.run_dir / "logs").iterdir()]
    roles = ("driver", "coordinator", "teacher-0", "teacher-1", "attempt-1-rank-0", "evaluation")
    assert Counter(
        path.name.partition(f"-{socket.gethostname()}-")[0] for path in paths
    ) == Counter((*roles, "heldout"))
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    # each event of the journal, too
    assert text.count(" INFO ") > len(undisturbed.chunks) + 2 * undisturbed.total_steps
    assert [
        value
        for value in secrets_of(os.environ, home=Path.home())
        if len(value) >= 8 and value in text
    ] == []


def test_the_student_is_nearer_to_its_teacher_than_the_control(undisturbed: Plan) -> None:
    scores = {row.model: row for row in journal(undisturbed) if isinstance(row, EvalEvent)}
    assert scores.keys() == {"teacher", "student", "control"}
    student, control = scores["student"], scores["control"]
    assert student.kl is not None
    assert control.kl is not None
    assert student.kl < control.kl
    assert student.num_tokens == control.num_tokens == undisturbed.sources.heldout.num_targets


def test_both_students_are_scored_while_they_learn(undisturbed: Plan) -> None:
    """The student comes nearer to its teacher, the control to the text."""
    events = journal(undisturbed)
    student, control = (latest_heldout_events(events, role) for role in ("student", "control"))
    for scores in (student, control):
        assert [score.step for score in scores] == [0, 25, 50, 60]
        assert all(score.num_tokens >= 64 for score in scores)
    assert student[-1].kl < student[0].kl
    assert control[-1].cross_entropy < control[0].cross_entropy
    report = (undisturbed.run_dir / "report.html").read_text(encoding="utf-8")
    assert "Held-out KL(teacher ‖ model)" in report


def test_produce_then_train_through_s3_is_the_same_training_as_run(
    undisturbed: Plan,
    tiny_world: TinyWorld,
    s3_endpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Who trains may only read the bucket. Who is refused has left nothing in it. This training is
    not scored on the way, and `run`'s was."""
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="whisky")
    plan = tiny_world.plan(
        tmp_path / "run", store={"url": "s3://whisky/casks"}, teacher=TEACHERS, student=STUDENT
    )
    with pytest.raises(StoreError, match="stillhouse produce"):
        api.train(plan)
    assert "Contents" not in client.list_objects_v2(Bucket="whisky")
    api.produce(plan)
    store = ChunkStore("s3://whisky/casks", plan.recipe)
    assert store.published() == set(plan.chunks)
    assert [label.names["teacher"] for label in labels_of(store).labels] == [
        plan.config.teacher.model
    ]
    before = client.list_objects_v2(Bucket="whisky")["Contents"]
    forbid_writing(client, "whisky")
    scores = api.train(plan)
    assert curve(plan) == curve(undisturbed)
    assert scores.keys() == {"teacher", "student"}
    assert client.list_objects_v2(Bucket="whisky")["Contents"] == before
    assert (
        "s3://whisky/casks may only be read, so this training cannot be registered there"
        in capsys.readouterr().err
    )
    with pytest.raises(
        StoreError,
        match=f"cannot be written.*all {len(plan.chunks)} chunks that training reads are there",
    ):
        pipeline.produce(plan)


def run_until(
    plan: Plan,
    config: Path,
    stop: signal.Signals,
    *,
    reached: Callable[[list[RunEvent]], bool],
    commands: CommandServer,
    s3: FaultyS3,
    meanwhile: Callable[[int], None] = lambda _pid: None,
) -> int:
    """Start the command on its own cluster, send the signal once the journal says so and
    `meanwhile` is done; return the exit code."""
    command = commands.start(
        "run",
        config,
        "--run-dir",
        plan.run_dir,
        log=plan.run_dir.parent / f"{stop.name}.log",
        environment={"AWS_ENDPOINT_URL": s3.url},
    )
    path, deadline = plan.run_dir / "journal.jsonl", monotonic() + 240
    try:
        while not command.has_ended() and not reached(read_journal(path)):
            assert monotonic() < deadline, command.words()
            sleep(0.2)
        meanwhile(command.pid)
        os.kill(command.pid, stop)
        return command.wait(timeout_s=60)
    except BaseException:
        os.kill(command.pid, signal.SIGKILL)
        raise


def attempt_has_trained(number: int) -> Callable[[list[RunEvent]], bool]:
    """Whether the journal shows that the attempt is a few steps past a checkpoint."""

    def reached(rows: list[RunEvent]) -> bool:
        starts = [index for index, row in enumerate(rows) if isinstance(row, StartEvent)]
        return (
            len(starts) == number
            and sum(isinstance(row, TrainEvent) for row in rows[starts[-1] :]) >= 6
        )

    return reached


@dataclass
class Disturbed:
    """A run that was killed and then interrupted, and what other commands were told while it was at
    work."""

    plan: Plan
    pid: int = 0  # of the command that was killed
    in_its_directory: Outcome | None = None
    in_another: Outcome | None = None
    changed: list[str] = field(default_factory=list)  # of its files, by commands that were refused


@pytest.fixture(scope="module")
def disturbed(
    tiny_world: TinyWorld,
    commands: CommandServer,
    s3_endpoint: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Disturbed]:
    """With its checkpoints in a bucket, too, so that another run directory can name them."""
    folder = tmp_path_factory.mktemp("disturbed")
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="grappa")
    settings: dict[str, dict[str, Any]] = {
        "store": {"url": "s3://grappa/casks", "retain": "until-read"},
        "cluster": {"num_cpus": 4},
    }
    student = STUDENT | {"checkpoint_url": "s3://grappa/commits"}
    plan = tiny_world.plan(
        folder / "run", **settings, student=student | {"checkpoint_every_steps": 4}
    )
    config = folder / "run.toml"
    config.write_text(as_toml(plan))
    run = Disturbed(plan)

    def try_others(pid: int) -> None:
        before = (plan.run_dir / "config.json").read_bytes()
        change = ("--set", "student.learning_rate = 3e-5")
        run.pid = pid
        run.in_its_directory = stillhouse(
            "run", config, *change, "--run-dir", plan.run_dir, cache=folder / "cache"
        )
        run.in_another = stillhouse(
            "run", config, *change, "--run-dir", folder / "another", cache=folder / "cache"
        )
        run.changed += (
            ["config.json"] if (plan.run_dir / "config.json").read_bytes() != before else []
        )
        run.changed += [path.name for path in (folder / "another").iterdir() if path.name != "lock"]

    with FaultyS3(s3_endpoint) as faulty_s3:
        # a step reads one chunk: no attempt is done before its signal comes
        first = faulty_s3.hold(publications(but=plan.chunks[:12]))
        stopped = partial(run_until, plan, config, commands=commands, s3=faulty_s3)
        code = stopped(signal.SIGKILL, reached=attempt_has_trained(1), meanwhile=try_others)
        assert code == -signal.SIGKILL
        second = faulty_s3.hold(publications(but=plan.chunks[:24]))
        faulty_s3.end(first)
        assert stopped(signal.SIGINT, reached=attempt_has_trained(2)) == 130
        faulty_s3.end(second)
        pipeline.run(
            tiny_world.plan(
                plan.run_dir,
                **settings,
                student=student | {"checkpoint_every_steps": 100, "prefetch_batches": 1},
            )
        )
        yield run


@pytest.mark.timeout(
    900
)  # three starts of everything; seconds on a free machine, minutes on a busy one
def test_a_run_killed_and_then_interrupted_goes_on_bit_identically(
    undisturbed: Plan, disturbed: Disturbed
) -> None:
    plan = disturbed.plan
    rows = journal(plan)
    assert [row.attempt for row in rows if isinstance(row, StartEvent)] == [1, 2, 3]
    assert [row.outcome for row in rows if isinstance(row, EndEvent)] == ["interrupted", "done"]
    assert curve(plan) == curve(undisturbed)
    store = ChunkStore(plan.config.store.url, plan.recipe)
    assert [
        (reader.committed_step, reader.total_steps) for reader in registered(store).consumers
    ] == [(60, 60)]
    # every chunk was deleted once it was read, and none was needed again
    assert store.published() == set()


@pytest.mark.timeout(900)
def test_a_second_command_is_refused_while_the_first_runs_and_changes_nothing(
    disturbed: Disturbed,
) -> None:
    """In its run directory, and in another that names the same checkpoints; after the kill the same
    command went on."""
    for refused in (disturbed.in_its_directory, disturbed.in_another):
        assert refused is not None
        assert refused.code == 2, refused
        assert (
            f"in use by process {disturbed.pid} on {socket.gethostname()} (`stillhouse run "
            in refused.err
        )
        assert "Traceback" not in refused.err
    assert disturbed.changed == []


def as_toml(plan: Plan) -> str:
    """The config as TOML that the command reads: strings and numbers are written alike in JSON."""
    lines = []
    for name, section in plan.config.model_dump(mode="json", exclude_none=True).items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {as_toml_value(value)}" for key, value in section.items()]
    return "\n".join(lines) + "\n"


def as_toml_value(value: object) -> str:
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{key} = {as_toml_value(each)}" for key, each in value.items()) + "}"
        )
    return json.dumps(value)


@pytest.fixture(scope="module")
def asked_again(
    undisturbed: Plan, tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Outcome]:
    """The finished run, in a copy of its directory, once more with another learning rate and
    without its control."""
    folder = tmp_path_factory.mktemp("again")
    run_dir = folder / "run, again"
    shutil.copytree(undisturbed.run_dir, run_dir)
    plan = tiny_world.plan(
        run_dir,
        store={"url": undisturbed.config.store.url},
        student=STUDENT | {"learning_rate": 3e-5},
    )
    (folder / "run.toml").write_text(as_toml(plan))
    return plan, stillhouse(
        "train", folder / "run.toml", "--run-dir", plan.run_dir, cache=folder / "cache"
    )


def test_a_run_with_nothing_left_to_train_says_so_and_which_settings_had_no_effect(
    asked_again: tuple[Plan, Outcome],
) -> None:
    plan, outcome = asked_again
    words = (
        "nothing left to train: all 60 steps are committed; these settings differ from those it "
        "was trained with and had no effect: "
        "student.learning_rate = 3e-05 (trained with 0.003)"
    )
    assert outcome.code == 0, outcome
    assert words in outcome.err
    end = journal(plan)[-1]
    assert isinstance(end, EndEvent)
    assert (end.outcome, end.message, end.steps_taken, end.steps_done) == (
        "done",
        words,
        {},
        {"student": 60},
    )
    assert config_of(plan.run_dir).student.learning_rate == 3e-5  # what was asked for last


def test_the_command_that_exports_the_student_can_be_typed_as_it_is_shown(
    asked_again: tuple[Plan, Outcome],
) -> None:
    plan, outcome = asked_again
    (shown,) = re.findall(r"`(stillhouse export .*) OUT`", outcome.out)
    assert shlex.split(shown) == ["stillhouse", "export", str(plan.run_dir)]


def test_a_command_that_trains_ends_with_the_verdict_the_scores_and_where_everything_is(
    asked_again: tuple[Plan, Outcome],
) -> None:
    plan, outcome = asked_again
    out = outcome.out
    verdict = out.index(verdict_of(plan.run_dir))
    scores = out.index("KL from teacher")
    assert verdict < scores < out.index(f"The report:      {plan.run_dir / 'report.html'}")
    assert f"The targets:     {plan.store.url}\n" in out
    assert f"The checkpoints: {plan.jobs[0].checkpoints_root}\n" in out


def test_report_and_model_card_say_what_was_trained(
    asked_again: tuple[Plan, Outcome], tmp_path: Path
) -> None:
    plan, _ = asked_again
    trained = "learning rate 0.003, warm-up steps 5, then a cosine to 0 at step 60"
    report = (plan.run_dir / "report.html").read_text(encoding="utf-8")
    assert trained in report
    assert "learning rate 3e-05" not in report
    pipeline.export_run(plan, tmp_path / "student")
    assert f"| AdamW | {trained} |" in (tmp_path / "student" / "README.md").read_text()


def test_a_run_directory_is_refused_to_another_recipe_and_another_batch(
    undisturbed: Plan, tiny_world: TinyWorld
) -> None:
    def again(**changes: dict[str, Any]) -> Plan:
        settings: dict[str, dict[str, Any]] = {
            "store": {"url": undisturbed.config.store.url},
            "teacher": TEACHERS,
            "student": STUDENT,
        }
        return tiny_world.plan(undisturbed.run_dir, **(settings | changes))

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
def test_a_resumed_run_may_change_pace_placement_and_logging(
    undisturbed: Plan, section: str, key: str, value: object
) -> None:
    changed = getattr(undisturbed.config, section).model_copy(update={key: value})
    assert (
        changes_that_matter(
            undisturbed.config, undisturbed.config.model_copy(update={section: changed})
        )
        == []
    )


def test_an_export_opens_as_a_plain_model(undisturbed: Plan, tmp_path: Path) -> None:
    steps = pipeline.export_run(undisturbed, tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    ids = tokenizer("def merge(a, b):", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    newest = choice.newest(str(undisturbed.run_dir / "checkpoints" / "student"))
    assert newest is not None
    assert steps == newest.step
    card = (tmp_path / "student" / "README.md").read_text()
    assert undisturbed.recipe.fingerprint in card
    assert "/".join(Path(undisturbed.config.teacher.model).parts[-2:]) in card
    assert config_of(undisturbed.run_dir) == undisturbed.config
