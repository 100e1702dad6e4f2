"""The last words of a command that trained: the verdict, the scores, and where everything is."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stillhouse.evaluation.scores import ModelName
from stillhouse.losses.score import Scores
from stillhouse.pipeline import Plan
from stillhouse.pipeline.console import tell_of_wait
from stillhouse.pipeline.heldout import best_score
from stillhouse.redaction import scrub
from stillhouse.report.summary import summarise, verdict
from stillhouse.terminal import say
from stillhouse.tracking import EvalEvent, read_journal


def say_what_came_of_it(plan: Plan, scores: Mapping[ModelName, Scores]) -> None:
    """Print what a run that is done came to."""
    say(f"\n{verdict_of(plan.run_dir)}\n")
    print_scores(plan.run_dir, scores)
    places = _places(plan)
    width = max(map(len, places)) + 1
    lines = (f"{name + ':':{width}} {scrub(place)}" for name, place in places.items())
    say("\n" + "\n".join(lines))


def verdict_of(run_dir: Path) -> str:
    """The report's headline on a run that has begun."""
    summary = summarise(read_journal(run_dir / "journal.jsonl"))
    assert summary is not None
    return verdict(summary)


def print_scores(run_dir: Path, scores: Mapping[ModelName, Scores]) -> None:
    """Print a run's newest scores as a table, a line for each model, and the steps behind them."""
    num_tokens = max(score.num_tokens for score in scores.values())
    steps = _scored_steps(run_dir)
    trained = ", ".join(f"{name} after step {steps[name]:,}" for name in scores if name in steps)
    table = Table(
        box=None,
        header_style="bold",
        caption=f"means over {num_tokens:,} held-out tokens, both models dense; nats; {trained}",
    )
    table.add_column("model")
    for heading in ("cross-entropy", "KL from teacher", "agreement", "acceptance", "calibration"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, score in scores.items():
        compared = [
            f"{value:.4f}" if name != "teacher" and not math.isnan(value) else ""
            for value in (score.kl, score.agreement, score.acceptance)
        ]
        table.add_row(
            name, f"{score.cross_entropy:.4f}", *compared, f"{score.calibration_error:.4f}"
        )
    Console().print(table)


def _scored_steps(run_dir: Path) -> dict[str, int]:
    """The optimiser steps behind each student's newest evaluation."""
    events = read_journal(run_dir / "journal.jsonl")
    evaluated = [event for event in events if isinstance(event, EvalEvent)]
    return {event.model: event.step for event in evaluated if event.model != "teacher"}


def _places(plan: Plan) -> dict[str, str]:
    """Where the run left what, and the commands that use it."""
    run_dir, student = shlex.quote(str(plan.run_dir)), plan.jobs[0]
    places = {
        "The report": str(plan.run_dir / "report.html"),
        "The targets": plan.store.url,
        "The checkpoints": student.checkpoints_root,
        "The model": f"`stillhouse export {run_dir} OUT` writes it for Hugging Face",
    }
    best = best_score(plan.evaluation, student, tell=tell_of_wait)
    if best is not None and best[0] != _scored_steps(plan.run_dir).get("student"):
        places["The best"] = (
            f"`stillhouse export {run_dir} OUT --best` writes the student after step {best[0]:,}, "
            f"whose held-out KL was lower: {best[1]:.3f}"
        )
    offline = sorted((plan.run_dir / "wandb").glob("offline-run-*"))
    if offline:
        places["W&B"] = f"`wandb sync {shlex.quote(str(offline[-1]))}` sends this run"
    return places
