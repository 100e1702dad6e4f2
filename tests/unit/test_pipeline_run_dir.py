"""A run directory that is used again."""

import json
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from shutil import copytree
from time import monotonic
from typing import Any

import pytest
import yaml

from helpers.checkpoints import make
from helpers.damage import fill, leave_no_room, read_only, small_disk
from helpers.world import TinyWorld
from stillhouse.errors import (
    ConfigError,
    InterruptedRunError,
    ModelError,
    RecipeError,
    RunError,
    StoreError,
    StoreUnavailable,
)
from stillhouse.pipeline import Plan, make_plan, open_run, train
from stillhouse.pipeline.attempt import OpenStore, attempt, learning_attempt
from stillhouse.pipeline.export import card_data, model_card
from stillhouse.pipeline.ownership import Owner
from stillhouse.pipeline.run_dir import claim, keep_account
from stillhouse.pipeline.run_store import store_to_fill, store_to_read
from stillhouse.sequences.account import Account
from stillhouse.sequences.bad_rows import BadRow
from stillhouse.sequences.source import Part
from stillhouse.store import ChunkStore, StoreForbidden
from stillhouse.store.consumers import join, registered
from stillhouse.tracking import (
    EndEvent,
    Journal,
    Role,
    RunEvent,
    StartEvent,
    TrainEvent,
    read_journal,
)


def training(
    plan: Plan, command: str, open_store: OpenStore = store_to_fill
) -> AbstractContextManager[tuple[Journal, Owner]]:
    return learning_attempt(plan.request, command, jobs=plan.jobs, open_store=open_store)


def test_a_run_whose_checkpoints_go_elsewhere_is_one_reader_still(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """Another place of checkpoints gives another name; the store would keep every chunk for the one
    of before."""
    names = []
    for place in (None, tmp_path / "first", tmp_path / "second"):
        changes = {} if place is None else {"checkpoint_url": str(place)}
        plan = tiny_world.plan(
            tmp_path / "run", store={"url": str(tmp_path / "store")}, student=changes
        )
        with training(plan, "stillhouse run"):
            store = ChunkStore(plan.config.store.url, plan.recipe)
            join(store, plan.jobs[0].consumer(0))
        names.append([consumer.name for consumer in registered(store).consumers])
    assert [len(each) for each in names] == [1, 1, 1]
    assert len({name for each in names for name in each}) == 3


def test_a_finished_run_opens_without_the_weights_that_its_student_began_with(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    copytree(tiny_world.folder / "student", tmp_path / "student")
    plan = plan_of(tiny_world, tmp_path, model=str(tmp_path / "student"))
    with training(plan, "stillhouse run"):
        pass
    (tmp_path / "student" / "model.safetensors").unlink()
    assert open_run(plan.run_dir, cache_dir=tmp_path / "cache").recipe == plan.recipe
    with pytest.raises(ModelError, match="no weights"):
        make_plan(plan.config, run_dir=plan.run_dir, cache_dir=tmp_path / "cache")


def test_a_batch_larger_than_the_corpus_is_refused_before_anything_is_written(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    plan = plan_of(tiny_world, tmp_path, global_batch_sequences=1_000_000)
    with (
        pytest.raises(
            ConfigError, match=r"global_batch_sequences is 1,000,000, but the corpus has"
        ),
        training(plan, "stillhouse run"),
    ):
        pass
    assert not plan.run_dir.exists()


def step(number: int, learning_rate: float, role: Any = "student") -> TrainEvent:
    return TrainEvent(role, number, 2.0, 1.5, None, 0.7, learning_rate, 200, 4.0, 1.0, 50.0)


def plan_of(world: TinyWorld, folder: Path, **student: Any) -> Plan:
    return world.plan(
        folder / "run", store={"url": str(folder / "store")}, student={"max_steps": 10, **student}
    )


def journal_of(plan: Plan) -> list[RunEvent]:
    return read_journal(plan.run_dir / "journal.jsonl")


def trained(plan: Plan, *steps: TrainEvent) -> None:
    """What an attempt leaves that took these steps, and committed the last one."""
    with training(plan, "stillhouse run first.toml") as (journal, _):
        for row in steps:
            journal.record(row)
        job = plan.jobs[0]
        make(job.checkpoints, steps[-1].step, origin=job.origin)


def test_a_command_that_is_refused_leaves_the_run_directory_as_it_was(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """Whether another one is at work there, the checkpoints are another's, the recipe differs,
    chunks are missing, or there is no store."""
    plan, other = plan_of(tiny_world, tmp_path), plan_of(tiny_world, tmp_path, learning_rate=1e-5)

    def contents() -> list[bytes]:
        return [
            (plan.run_dir / name).read_bytes()
            for name in ("config.json", "recipe.json", "journal.jsonl")
        ]

    with training(plan, "stillhouse run first.toml"):
        before = contents()
        for refused in (
            attempt(other.request, "stillhouse produce"),
            training(other, "stillhouse run"),
        ):
            with pytest.raises(ConfigError, match="in use by"):
                refused.__enter__()
        assert contents() == before
    before = contents()
    with pytest.raises(RecipeError, match=r"student\.seed: 0 -> 7"):
        training(plan_of(tiny_world, tmp_path, seed=7), "stillhouse run").__enter__()
    with pytest.raises(StoreError, match="chunks are not in"):
        train(other)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="something else is in its place"):
        attempt(
            tiny_world.plan(
                plan.run_dir, store={"url": str(tmp_path / "file")}, student={"max_steps": 10}
            ).request,
            "produce",
        ).__enter__()
    assert contents() == before
    assert registered(ChunkStore(other.config.store.url, other.recipe)).consumers == []


def test_chunks_that_may_only_be_read_can_be_trained_from_and_who_has_to_write_is_told_why_not(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    def planned(run: str, store: Path, **student: Any) -> Plan:
        return tiny_world.plan(
            tmp_path / run, store={"url": str(store)}, student={"max_steps": 10, **student}
        )

    filled = planned("run", tmp_path / "store")
    tiny_world.fill_store(filled)
    ChunkStore.create(str(tmp_path / "empty"), filled.recipe)
    with (
        read_only(tmp_path / "store", at=tmp_path / "seen") as seen,
        read_only(tmp_path / "empty", at=tmp_path / "nothing") as nothing,
    ):
        plan = planned("run", seen)
        with training(plan, "stillhouse train", open_store=store_to_read):
            pass
        elsewhere = planned("run", seen, checkpoint_url=str(tmp_path / "commits"))
        with training(
            elsewhere, "stillhouse train", open_store=store_to_read
        ):  # which takes back what the first was known by
            pass
        with pytest.raises(StoreForbidden, match="permission denied"):
            join(ChunkStore(str(seen), plan.recipe), plan.jobs[0].consumer(0))
        with pytest.raises(
            StoreError,
            match=rf"{seen} cannot be written, .*: all {len(plan.chunks)} chunks .*: `stillhouse "
            r"train` reads them",
        ):
            attempt(plan.request, "stillhouse produce").__enter__()
        plan = planned("other run", nothing)
        missing = rf"{len(plan.chunks)} of {len(plan.chunks)} chunks"
        with pytest.raises(
            StoreError,
            match=rf"{nothing} cannot be written, which this command has to do: {missing} are "
            r"missing there; give write",
        ):
            training(plan, "stillhouse run").__enter__()
        with pytest.raises(
            StoreError, match=f"{missing} are not in {nothing}; `stillhouse produce` makes them"
        ):
            training(plan, "stillhouse train", open_store=store_to_read).__enter__()


def test_two_run_directories_cannot_train_into_one_place(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    first, second = (
        plan_of(tiny_world, tmp_path / name, checkpoint_url=str(tmp_path / "commits"))
        for name in ("first", "second")
    )
    with training(first, "stillhouse run first.toml") as (_, owner):
        with pytest.raises(
            ConfigError,
            match=rf"under {tmp_path}/commits are in use by .*stillhouse run first\.toml.* "
            rf"{first.run_dir}\.",
        ):
            training(second, "stillhouse run second.toml").__enter__()
        with attempt(second.request, "stillhouse produce"):  # makes chunks, and no checkpoint
            pass
        assert not owner.is_lost()
    with training(second, "stillhouse run second.toml"):
        pass


def test_the_end_row_counts_the_steps_of_its_attempt_and_of_all(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    plan = plan_of(tiny_world, tmp_path)
    with suppress(InterruptedRunError), training(plan, "stillhouse run") as (journal, _):
        for number in (1, 2, 3, 2, 3, 4):  # a rank was lost
            journal.record(step(number, 3e-3))
        job = plan.jobs[0]
        make(job.checkpoints, 4, origin=job.origin)
        raise InterruptedRunError("SIGTERM")
    with training(plan, "stillhouse run") as (journal, _):
        for number in range(5, 11):
            journal.record(step(number, 3e-3))
    with attempt(plan.request, "stillhouse produce"):
        pass
    ends = [
        (row.outcome, row.steps_taken, row.steps_done)
        for row in journal_of(plan)
        if isinstance(row, EndEvent)
    ]
    assert ends == [
        ("interrupted", {"student": 6}, {"student": 4}),
        ("done", {"student": 6}, {"student": 10}),
        ("done", {}, {}),
    ]
    starts = [row for row in journal_of(plan) if isinstance(row, StartEvent)]
    assert [row.committed_steps for row in starts] == [{"student": 0}, {"student": 4}, {}]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", num_bytes=256 << 10) as disk:
        yield disk


@contextmanager
def attempt_on_a_full_disk(plan: Plan, disk: Path) -> Iterator[None]:
    """One whose journal finds no room any more once it has begun."""
    with attempt(plan.request, "stillhouse run") as journal:
        leave_no_room(disk / "ballast", journal.path)
        yield


def test_a_full_disk_neither_hides_nor_delays_the_end_of_a_command_that_is_stopped(
    tiny_world: TinyWorld, disk: Path
) -> None:
    plan = plan_of(tiny_world, disk)
    for why in (KeyboardInterrupt("it"), InterruptedRunError("it"), RunError("it")):
        began = monotonic()
        with pytest.raises(type(why), match="it"), attempt_on_a_full_disk(plan, disk):
            raise why
        assert monotonic() - began < 60.0  # and not half an hour
        (disk / "ballast").unlink()
    assert not any(isinstance(row, EndEvent) for row in journal_of(plan))


def test_the_end_row_of_a_run_that_is_done_waits_for_room(
    tiny_world: TinyWorld, disk: Path
) -> None:
    plan = plan_of(tiny_world, disk)
    with attempt_on_a_full_disk(plan, disk):
        room = threading.Timer(1.0, (disk / "ballast").unlink)
        room.start()
    room.join()
    assert [row.outcome for row in journal_of(plan) if isinstance(row, EndEvent)] == ["done"]


def test_a_run_that_cannot_write_down_what_is_asked_says_what_is_in_its_way(
    tiny_world: TinyWorld, disk: Path
) -> None:
    plan = plan_of(tiny_world, disk)
    plan.run_dir.mkdir()
    fill(disk / "ballast")
    with pytest.raises(
        StoreUnavailable,
        match=r"cannot write config\.json and recipe\.json in .*run: .*free some space",
    ):
        claim(plan.run_dir, config=plan.config, recipe=plan.recipe)


def test_an_attempt_with_nothing_left_to_train_names_the_settings_that_had_no_effect(
    tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(plan_of(tiny_world, tmp_path), *(step(number, 3e-3) for number in range(1, 11)))
    assert capsys.readouterr().err == ""
    with training(
        plan_of(tiny_world, tmp_path, learning_rate=3e-5, warmup_steps=7),
        "stillhouse run second.toml",
    ):
        pass
    words = (
        "nothing left to train: all 10 steps are committed; these settings differ from those it "
        "was trained with and had no effect: "
        "student.learning_rate = 3e-05 (trained with 0.003), student.warmup_steps = 7 (trained "
        "with 5)"
    )
    (*_, end) = journal_of(plan_of(tiny_world, tmp_path))
    assert isinstance(end, EndEvent)
    assert (end.outcome, end.message, end.steps_taken, end.steps_done) == (
        "done",
        words,
        {},
        {"student": 10},
    )
    assert capsys.readouterr().err == words + "\n"


def test_steps_that_were_taken_after_all_are_not_called_nothing(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """The last commit had a flipped bit, which the ranks alone find out."""
    plan = plan_of(tiny_world, tmp_path)
    trained(plan, *(step(number, 3e-3) for number in range(1, 11)))
    with training(plan, "stillhouse run") as (journal, _):
        journal.record(step(10, 3e-3))
    (*_, end) = journal_of(plan)
    assert isinstance(end, EndEvent)
    assert (end.message, end.steps_taken) == ("", {"student": 1})


def test_the_model_card_tells_what_was_trained_and_not_what_was_asked_for_last(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    trained(plan_of(tiny_world, tmp_path), *(step(number, 3e-3) for number in range(1, 7)))
    trained(
        plan_of(tiny_world, tmp_path, learning_rate=1e-3),
        *(step(number, 1e-3) for number in range(7, 11)),
    )
    last = plan_of(tiny_world, tmp_path, learning_rate=3e-5)
    with training(last, "stillhouse run"):
        pass
    schedule = "learning rate {}, warm-up steps 5, then a cosine to 0 at step 10"
    both = f"steps 1 to 6: {schedule.format('0.003')}; steps 7 to 10: {schedule.format('0.001')}"

    def card_of(role: Role, steps: int) -> str:
        return model_card(last.config, last.recipe, journal_of(last), role=role, steps=steps)

    assert f"| AdamW | {both} |" in card_of("student", 10)
    # whose machine it was is nobody's business
    assert str(tiny_world.folder.parent) not in card_of("student", 10)
    halfway = card_of("student", 6)
    assert f"| AdamW | {schedule.format('0.003')} |" in halfway
    assert "| optimiser steps | 6 of 8 sequences |" in halfway
    assert "| AdamW | not in the run's journal |" in card_of("control", 10)


def test_the_model_cards_metadata_names_what_the_hub_has_and_no_path_of_this_machine(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    config = plan_of(tiny_world, tmp_path).config
    local = yaml.safe_load(card_data(config).to_yaml())
    assert {"base_model", "teacher", "datasets", "license"}.isdisjoint(local)
    assert str(tiny_world.folder.parent) not in str(local)

    # on the hub, where this process reads no card
    on_hub = config.model_copy(
        update={
            "student": config.student.model_copy(update={"model": "acme/student"}),
            "teacher": config.teacher.model_copy(update={"model": "acme/teacher"}),
            "corpus": config.corpus.model_copy(update={"dataset": "acme/texts"}),
        }
    )
    found = yaml.safe_load(card_data(on_hub).to_yaml())
    assert (found["base_model"], found["base_model_relation"]) == ("acme/student", "finetune")
    assert (found["teacher"], found["datasets"]) == ("acme/teacher", ["acme/texts"])
    adapter = yaml.safe_load(card_data(on_hub, adapter=True).to_yaml())
    assert (adapter["library_name"], found["library_name"]) == ("peft", "transformers")
    assert (adapter["base_model"], adapter["base_model_relation"]) == ("acme/student", "adapter")
    from_config = on_hub.student.model_copy(update={"init": "config"})
    fresh = card_data(on_hub.model_copy(update={"student": from_config}))
    assert "base_model" not in yaml.safe_load(fresh.to_yaml())


def test_rows_that_were_skipped_are_listed_in_the_run_directory_as_long_as_there_are_any(
    tmp_path: Path,
) -> None:
    account = Account(bad_rows=[BadRow("a.jsonl", 7, "it has int"), BadRow("b.jsonl", 0, "—")])
    keep_account(tmp_path, [Part("a", account, 1, 1)])
    listed = (tmp_path / "bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in listed] == [
        {"file": "a.jsonl", "row": 7, "reason": "it has int"},
        {"file": "b.jsonl", "row": 0, "reason": "—"},
    ]
    keep_account(tmp_path, [Part("a", Account(), 1, 1)])
    assert list(tmp_path.iterdir()) == []
