"""A run directory that is used again."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import make
from helpers.damage import read_only
from helpers.world import TinyWorld
from stillhouse.errors import ConfigError, InterruptedRunError, RecipeError, StoreError
from stillhouse.pipeline import Plan, train
from stillhouse.pipeline.attempt import attempt, learning_attempt, store_to_read
from stillhouse.pipeline.card import model_card
from stillhouse.store import ChunkStore, StoreForbidden
from stillhouse.store.readers import join, registered
from stillhouse.tracking import EndRow, Row, StartRow, TrainRow, read_journal


def test_a_run_whose_checkpoints_go_elsewhere_is_one_reader_still(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """Another place of checkpoints gives another name; the store would keep every chunk for the one of before."""
    names = []
    for place in (None, tmp_path / "first", tmp_path / "second"):
        changes = {} if place is None else {"checkpoint_url": str(place)}
        made = tiny_world.plan(tmp_path / "run", store={"url": str(tmp_path / "store")}, student=changes)
        with learning_attempt(made, "stillhouse run"):
            store = ChunkStore(made.config.store.url, made.recipe)
            join(store, made.jobs()[0].reader(0))
        names.append([reader.name for reader in registered(store).readers])
    assert [len(each) for each in names] == [1, 1, 1]
    assert len({name for each in names for name in each}) == 3


def step(number: int, learning_rate: float, role: Any = "student") -> TrainRow:
    return TrainRow(role, number, 2.0, 1.5, None, 0.7, learning_rate, 200, 4.0, 1.0, 50.0)


def plan_of(world: TinyWorld, folder: Path, **student: object) -> Plan:
    return world.plan(folder / "run", store={"url": str(folder / "store")}, student={"max_steps": 10, **student})


def journal_of(made: Plan) -> list[Row]:
    return read_journal(made.run_dir / "journal.jsonl")


def trained(made: Plan, *steps: TrainRow) -> None:
    """What an attempt leaves that took these steps, and committed the last one."""
    with learning_attempt(made, "stillhouse run first.toml") as (journal, _):
        for row in steps:
            journal.record(row)
        make(made.jobs()[0].checkpoints, steps[-1].step)


def test_a_command_that_is_refused_leaves_the_run_directory_as_it_was(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """Whether another one is at work there, the checkpoints are another's, the recipe differs, chunks are missing, or there is no store."""
    made, other = plan_of(tiny_world, tmp_path), plan_of(tiny_world, tmp_path, learning_rate=1e-5)

    def contents() -> list[bytes]:
        return [(made.run_dir / name).read_bytes() for name in ("config.json", "recipe.json", "journal.jsonl")]

    with learning_attempt(made, "stillhouse run first.toml"):
        before = contents()
        for refused in (attempt(other, "stillhouse produce"), learning_attempt(other, "stillhouse run")):
            with pytest.raises(ConfigError, match="in use by"):
                refused.__enter__()
        assert contents() == before
    before = contents()
    with pytest.raises(RecipeError, match=r"student\.seed: 0 -> 7"):
        learning_attempt(plan_of(tiny_world, tmp_path, seed=7), "stillhouse run").__enter__()
    with pytest.raises(StoreError, match="chunks are not in"):
        train(other)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="something else is in its place"):
        attempt(tiny_world.plan(made.run_dir, store={"url": str(tmp_path / "file")}, student={"max_steps": 10}), "produce").__enter__()
    assert contents() == before
    assert registered(ChunkStore(other.config.store.url, other.recipe)).readers == []


def test_chunks_that_may_only_be_read_can_be_trained_from_and_who_has_to_write_is_told_why_not(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    def planned(run: str, store: Path, **student: object) -> Plan:
        return tiny_world.plan(tmp_path / run, store={"url": str(store)}, student={"max_steps": 10, **student})

    filled = planned("run", tmp_path / "store")
    tiny_world.fill_store(filled)
    ChunkStore.create(str(tmp_path / "empty"), filled.recipe)
    with read_only(tmp_path / "store", at=tmp_path / "seen") as seen, read_only(tmp_path / "empty", at=tmp_path / "nothing") as nothing:
        made = planned("run", seen)
        with learning_attempt(made, "stillhouse train", open_store=store_to_read):
            pass
        elsewhere = planned("run", seen, checkpoint_url=str(tmp_path / "commits"))
        with learning_attempt(elsewhere, "stillhouse train", open_store=store_to_read):  # which takes back what the first was known by
            pass
        with pytest.raises(StoreForbidden, match="permission denied"):
            join(ChunkStore(str(seen), made.recipe), made.jobs()[0].reader(0))
        with pytest.raises(
            StoreError, match=rf"{seen} cannot be written, .*: all {len(made.chunks)} chunks .*: `stillhouse train` reads them"
        ):
            attempt(made, "stillhouse produce").__enter__()
        made = planned("other run", nothing)
        missing = rf"{len(made.chunks)} of {len(made.chunks)} chunks"
        with pytest.raises(
            StoreError, match=rf"{nothing} cannot be written, which this command has to do: {missing} are missing there; give write"
        ):
            learning_attempt(made, "stillhouse run").__enter__()
        with pytest.raises(StoreError, match=f"{missing} are not in {nothing}; `stillhouse produce` makes them"):
            learning_attempt(made, "stillhouse train", open_store=store_to_read).__enter__()


def test_two_run_directories_cannot_train_into_one_place(tiny_world: TinyWorld, tmp_path: Path) -> None:
    first, second = (plan_of(tiny_world, tmp_path / name, checkpoint_url=str(tmp_path / "commits")) for name in ("first", "second"))
    with learning_attempt(first, "stillhouse run first.toml") as (_, owner):
        with pytest.raises(ConfigError, match=rf"under {tmp_path}/commits are in use by .*stillhouse run first\.toml.* {first.run_dir}\."):
            learning_attempt(second, "stillhouse run second.toml").__enter__()
        with attempt(second, "stillhouse produce"):  # makes chunks, and no checkpoint
            pass
        assert not owner.is_lost()
    with learning_attempt(second, "stillhouse run second.toml"):
        pass


def test_the_end_row_counts_the_steps_of_its_attempt_and_of_all(tiny_world: TinyWorld, tmp_path: Path) -> None:
    made = plan_of(tiny_world, tmp_path)
    with suppress(InterruptedRunError), learning_attempt(made, "stillhouse run") as (journal, _):
        for number in (1, 2, 3, 2, 3, 4):  # a rank was lost
            journal.record(step(number, 3e-3))
        make(made.jobs()[0].checkpoints, 4)
        raise InterruptedRunError("SIGTERM")
    with learning_attempt(made, "stillhouse run") as (journal, _):
        for number in range(5, 11):
            journal.record(step(number, 3e-3))
    with attempt(made, "stillhouse produce"):
        pass
    ends = [(row.outcome, row.steps_taken, row.steps_done) for row in journal_of(made) if isinstance(row, EndRow)]
    assert ends == [("interrupted", {"student": 6}, {"student": 4}), ("done", {"student": 6}, {"student": 10}), ("done", {}, {})]
    starts = [row for row in journal_of(made) if isinstance(row, StartRow)]
    assert [row.committed_steps for row in starts] == [{"student": 0}, {"student": 4}, {}]


def test_an_attempt_with_nothing_left_to_train_names_the_settings_that_had_no_effect(
    tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(plan_of(tiny_world, tmp_path), *(step(number, 3e-3) for number in range(1, 11)))
    assert capsys.readouterr().err == ""
    with learning_attempt(plan_of(tiny_world, tmp_path, learning_rate=3e-5, warmup_steps=7), "stillhouse run second.toml"):
        pass
    words = (
        "nothing left to train: all 10 steps are committed; these settings differ from those it was trained with and had no effect: "
        "student.learning_rate = 3e-05 (trained with 0.003), student.warmup_steps = 7 (trained with 5)"
    )
    (*_, end) = journal_of(plan_of(tiny_world, tmp_path))
    assert isinstance(end, EndRow)
    assert (end.outcome, end.message, end.steps_taken, end.steps_done) == ("done", words, {}, {"student": 10})
    assert capsys.readouterr().err == words + "\n"


def test_steps_that_were_taken_after_all_are_not_called_nothing(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """The last commit had a flipped bit, which the ranks alone find out."""
    made = plan_of(tiny_world, tmp_path)
    trained(made, *(step(number, 3e-3) for number in range(1, 11)))
    with learning_attempt(made, "stillhouse run") as (journal, _):
        journal.record(step(10, 3e-3))
    (*_, end) = journal_of(made)
    assert isinstance(end, EndRow)
    assert (end.message, end.steps_taken) == ("", {"student": 1})


def test_the_model_card_tells_what_was_trained_and_not_what_was_asked_for_last(tiny_world: TinyWorld, tmp_path: Path) -> None:
    trained(plan_of(tiny_world, tmp_path), *(step(number, 3e-3) for number in range(1, 7)))
    trained(plan_of(tiny_world, tmp_path, learning_rate=1e-3), *(step(number, 1e-3) for number in range(7, 11)))
    last = plan_of(tiny_world, tmp_path, learning_rate=3e-5)
    with learning_attempt(last, "stillhouse run"):
        pass
    schedule = "learning rate {}, warm-up steps 5, then a cosine to 0 at step 10"
    both = f"steps 1 to 6: {schedule.format('0.003')}; steps 7 to 10: {schedule.format('0.001')}"
    assert f"| AdamW | {both} |" in model_card(last, "student", 10)
    halfway = model_card(last, "student", 6)
    assert f"| AdamW | {schedule.format('0.003')} |" in halfway
    assert "| optimiser steps | 6 of 8 sequences |" in halfway
    assert "| AdamW | not in the run's journal |" in model_card(last, "control", 10)
