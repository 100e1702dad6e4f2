"""The last words of a command that trained."""

from dataclasses import replace
from pathlib import Path

import pytest

from helpers.training import refuse_outage
from helpers.world import TinyWorld
from stillhouse.cli.closing import say_what_came_of_it
from stillhouse.losses.score import Scores
from stillhouse.pipeline.heldout import history_key
from stillhouse.store.object_store import Blobs
from stillhouse.student.best import History, write_history
from stillhouse.tracking import EvalEvent, Journal

SCORES = Scores(1000, 3.5, 0.4, 0.7, 0.02, 0.8)


@pytest.mark.parametrize(
    ("kls", "keep_best", "is_told"),
    [
        (((3, 0.5), (6, 0.3), (9, 0.4)), True, True),
        (((3, 0.5), (6, 0.3), (9, 0.4)), False, False),
        (((3, 0.5), (6, 0.4), (9, 0.3)), True, False),
    ],
    ids=["an earlier one was better", "it was not kept", "the last one is the best"],
)
def test_which_step_was_scored_is_told_and_a_better_one_that_was_kept(
    tiny_world: TinyWorld,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kls: tuple[tuple[int, float], ...],
    keep_best: bool,
    is_told: bool,
) -> None:
    plan = tiny_world.plan(
        tmp_path / "run", evaluate={"every_steps": 3, "patience": 9, "keep_best": keep_best}
    )
    plan.run_dir.mkdir()
    journal = Journal(plan.run_dir / "journal.jsonl")
    journal.record(plan.request.start)
    journal.record(EvalEvent("teacher", 0, 1000, 3.1, None, None, 0.01, None))
    journal.record(EvalEvent("student", 9, 1000, 3.5, 0.4, 0.7, 0.02, 0.8))
    job = plan.jobs[0]
    write_history(
        Blobs(job.checkpoints_root),
        history_key(plan.evaluation, job),
        History(kls),
        tell=refuse_outage,
    )
    say_what_came_of_it(plan, {"teacher": replace(SCORES, kl=0.0), "student": SCORES})
    told = " ".join(capsys.readouterr().out.split())
    assert "held-out tokens, both models dense; nats; student after step 9" in told
    words = f"`stillhouse export {plan.run_dir} OUT --best` writes the student after step 6, whose"
    assert (words in told) == is_told
    assert ("--best" in told) == is_told
