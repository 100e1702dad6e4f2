"""A pool whose teachers run in vLLM's environment, started by a command that runs in the project's
own: `teacher.python`."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil
import pytest

from helpers.command import as_toml
from helpers.environments import ROOT
from helpers.models import make_model
from helpers.world import write_documents
from stillhouse.store import ChunkStore, list_recipes
from stillhouse.tracking import ChunkEvent, EndEvent, RunEvent, TeacherEvent, read_journal

ENGINE = "vllm"
PATIENCE_S = 200.0
LOOK_EVERY_S = 0.05


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_model(tmp_path / "teacher", vocab_size=300, hidden_size=128, weight_std=0.3, seed=1)
    make_model(tmp_path / "student", vocab_size=300, hidden_size=32, seed=2)
    write_documents(tmp_path / "documents.jsonl")
    values: dict[str, dict[str, Any]] = {
        "corpus": {"dataset": str(tmp_path / "documents.jsonl"), "sequence_length": 64},
        "teacher": {
            "model": str(tmp_path / "teacher"),
            "engine": ENGINE,
            "python": sys.executable,
            "dtype": "float32",
            "num_cpus": 0.5,
            "min_replicas": 2,
            "max_replicas": 2,
        },
        "student": {
            "model": str(tmp_path / "student"),
            "dtype": "float32",
            "global_batch_sequences": 8,
            "num_cpus": 0.5,
            "epochs": 1,
        },
        "target": {"k": 8, "tail_draws": 12},
        "store": {"url": str(tmp_path / "store"), "chunk_sequences": 2},
        "tracking": {"wandb": "off"},
        "cluster": {"num_cpus": 2, "notices": "off"},
    }
    path = tmp_path / "config.toml"
    path.write_text(as_toml(values))
    return path


def test_a_teacher_in_another_environment_is_killed_and_replaced_and_every_chunk_is_whole(
    config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    program = ROOT / ".venv" / "bin" / "python"
    command = [program, "-m", "stillhouse", "produce", config, "--run-dir", run_dir]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as producing:
        try:
            # both are of this environment
            wait_until(lambda: len(of_kind(TeacherEvent, run_dir)) == 2, producing)
            killed, survivor = teachers_of(producing)
            assert all(sys.prefix in libraries_of(each) for each in (killed, survivor))

            # the survivor stands still until the other is replaced, or it might do all the work
            survivor.suspend()
            killed.kill()
            wait_until(lambda: len(of_kind(TeacherEvent, run_dir)) == 3, producing)
            survivor.resume()
            _, errors = producing.communicate(timeout=PATIENCE_S)
        finally:
            producing.terminate()
    assert producing.returncode == 0, errors

    # what is there
    [end] = of_kind(EndEvent, run_dir)
    assert end.outcome == "done"
    [stored] = list_recipes(str(tmp_path / "store"))
    recipe = stored.recipe
    store = ChunkStore(str(tmp_path / "store"), recipe)
    published = store.published()
    assert published == {event.chunk for event in of_kind(ChunkEvent, run_dir)}
    assert len(published) == recipe.num_chunks
    for number in published:
        store.verify(number)


def of_kind(kind: type[Any], run_dir: Path) -> list[Any]:
    """The events of one kind in the run's journal so far."""
    path = run_dir / "journal.jsonl"
    events: list[RunEvent] = read_journal(path) if path.exists() else []
    return [event for event in events if isinstance(event, kind)]


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert monotonic() < deadline
        sleep(LOOK_EVERY_S)


def teachers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "".join(each.cmdline()[:1]).startswith("ray::_TeacherActor"):
                found.append(each)
    return found


def libraries_of(process: psutil.Process) -> str:
    """The paths of the files that a process has in its memory."""
    return "\n".join(each.path for each in process.memory_maps())
