"""A run labels the store that it fills: once, with what it was asked for, and without secrets. A
store that refuses the label does not stop the run."""

from dataclasses import replace
from pathlib import Path

import pytest

from helpers.world import TinyWorld
from stillhouse.pipeline import Plan
from stillhouse.pipeline.attempt import attempt
from stillhouse.pipeline.labels import label_of, leave_label
from stillhouse.redaction import know
from stillhouse.store.labels import labels_of, moment
from stillhouse.tracking import StartEvent, read_journal


@pytest.fixture
def plan(tiny_world: TinyWorld, tmp_path: Path) -> Plan:
    """A plan whose run directory has a journal."""
    plan = tiny_world.plan(tmp_path / ".my run", store={"url": str(tmp_path / "store")})
    with attempt(plan.request, "stillhouse produce"):
        pass
    return plan


def first_start(plan: Plan) -> StartEvent:
    event = read_journal(plan.run_dir / "journal.jsonl")[0]
    assert isinstance(event, StartEvent)
    return event


def test_a_run_has_one_label_which_a_resume_finds_there(plan: Plan, tiny_world: TinyWorld) -> None:
    leave_label(plan)
    (label,) = labels_of(plan.store).labels
    first = first_start(plan)
    assert label.run == f"my-run-{round(first.time * 1000):x}"
    assert label.created == moment(first.time)
    assert label.names == {
        "teacher": str(tiny_world.folder / "teacher"),
        "student": str(tiny_world.folder / "student"),
        "tokenizer": str(tiny_world.folder / "teacher"),
        "dataset": str(tiny_world.folder / "documents.jsonl"),
        "stillhouse": first.versions["stillhouse"],
    }
    with attempt(plan.request, "stillhouse produce"):
        leave_label(plan)
    assert labels_of(plan.store) == ([label], [], 0)


def test_a_label_has_no_secret_and_not_the_name_of_a_user(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    know(["a-known-secret"])
    config = plan.config
    told = label_of(
        replace(
            plan,
            config=config.model_copy(
                update={
                    "corpus": config.corpus.model_copy(
                        update={"dataset": "https://user:hunter2hunter2@host/a.parquet"}
                    ),
                    "teacher": config.teacher.model_copy(
                        update={"model": "/home/alice/models/a-known-secret"}
                    ),
                    "student": config.student.model_copy(update={"model": "/home/alices/small"}),
                }
            ),
        ),
        first_start(plan),
    )
    assert told.names["dataset"] == "https://(redacted)@host/a.parquet"
    assert told.names["teacher"] == told.names["tokenizer"] == "~/models/(redacted)"
    assert told.names["student"] == "/home/alices/small"


def test_a_store_that_refuses_a_label_does_not_stop_the_run(plan: Plan) -> None:
    (Path(plan.store.url) / plan.store.folder / "labels").write_text("in its place")
    leave_label(plan)
    assert labels_of(plan.store).labels == []
