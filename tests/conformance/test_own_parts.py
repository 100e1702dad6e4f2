"""Parts of a user's own, from a package outside of Stillhouse, go through the real command: killed,
resumed and reported."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil
import pytest

from helpers.command import as_toml
from helpers.commands import Command, CommandServer
from helpers.models import make_model
from stillhouse.checkpoint.choice import newest_step
from stillhouse.store import list_recipes
from stillhouse.tracking import (
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    RunEvent,
    StartEvent,
    TeacherEvent,
    TrainEvent,
    latest_train_events,
    read_journal,
)

OUTSIDE = Path(__file__).parents[1] / "outside"
PATIENCE_S = 240.0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_model(tmp_path / "teacher", vocab_size=300, weight_std=0.3, seed=1)
    make_model(tmp_path / "student", vocab_size=300, hidden_size=16, seed=2)
    values: dict[str, dict[str, Any]] = {
        "corpus": {"source": "own_parts.source:sums", "dataset": "sums", "sequence_length": 24},
        "teacher": {
            "model": str(tmp_path / "teacher"),
            "engine": "own_parts.engine:PlainEngine",
            "dtype": "float32",
            "num_cpus": 0.5,
        },
        "student": {
            "model": str(tmp_path / "student"),
            "dtype": "float32",
            "num_cpus": 0.5,
            "divergence": "own_parts.divergence:squared_hellinger",
            "tail_as_bucket": True,
            "global_batch_sequences": 8,
            "max_steps": 60,
            "epochs": 10,
            "checkpoint_every_steps": 5,
        },
        "target": {"k": 8, "tail_draws": 12},
        "store": {"url": str(tmp_path / "store"), "chunk_sequences": 8},
        "tracking": {"wandb": "off"},
        "cluster": {"notices": "off"},
    }
    (tmp_path / "own.toml").write_text(as_toml(values))
    return tmp_path / "own.toml"


def start(config: Path, run_dir: Path, commands: CommandServer) -> Command:
    path = f"{config.parent / 'outside'}{os.pathsep}{os.environ['PYTHONPATH']}"
    return commands.start(
        "run",
        config,
        "--run-dir",
        run_dir,
        log=config.parent / "log",
        environment={"PYTHONPATH": path, "XDG_CACHE_HOME": str(config.parent / "cache")},
    )


def rows_of(run_dir: Path) -> list[RunEvent]:
    return read_journal(run_dir / "journal.jsonl")


@pytest.mark.timeout(600)
def test_own_parts_are_killed_resumed_reported_and_named(
    config: Path, commands: CommandServer, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(OUTSIDE, tmp_path / "outside")

    # killed, with its cluster, once some steps are committed
    command = start(config, run_dir, commands)
    deadline = monotonic() + PATIENCE_S
    while not any(isinstance(row, CheckpointEvent) for row in rows_of(run_dir)):
        assert not command.has_ended(), command.words()
        assert monotonic() < deadline, command.words()
        sleep(0.02)
    cluster = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    for each in cluster:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    committed = newest_step(str(run_dir / "checkpoints" / "student"))
    assert committed >= 5

    # the same command goes on from there
    again = start(config, run_dir, commands)
    assert again.wait(timeout_s=PATIENCE_S) == 0, again.words()
    rows = rows_of(run_dir)
    second = max(index for index, row in enumerate(rows) if isinstance(row, StartEvent))
    steps = [row.step for row in rows[second:] if isinstance(row, TrainEvent)]
    assert steps == list(range(committed + 1, 61))
    assert isinstance(rows[-1], EndEvent)
    assert rows[-1].outcome == "done"

    # the parts did their work
    assert {row.topk for row in rows if isinstance(row, TeacherEvent)} == {
        "plain: one document at a time"
    }
    (stored,) = list_recipes(str(tmp_path / "store"))
    assert (stored.recipe.source_kind, stored.recipe.corpus_digest) == ("sums", "0-96x24")
    losses = [row.loss for row in latest_train_events(rows, "student")]
    assert losses[-1] < losses[0] < 1.0  # a squared Hellinger distance is below 1
    assert {row.model for row in rows if isinstance(row, EvalEvent)} == {"teacher", "student"}
    assert "own_parts.divergence:squared_hellinger" in (run_dir / "report.html").read_text()

    # another text of the divergence does not go on with its checkpoints
    with (tmp_path / "outside" / "own_parts" / "divergence.py").open("a") as file:
        file.write("# another one\n")
    assert start(config, run_dir, commands).wait(timeout_s=PATIENCE_S) == 1
    refusal = (tmp_path / "log").read_text().rpartition("belongs to another training")[2]
    assert "divergence: found 'own_parts.divergence:squared_hellinger@" in refusal
