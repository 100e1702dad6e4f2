"""A pool whose teachers run in vLLM's environment, started by a command that runs in the project's
own: `teacher.python`."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from helpers.command import as_toml
from helpers.environments import ROOT
from helpers.models import make_model
from helpers.placereader import read_probe
from helpers.world import item_with_tokens, write_documents
from stillhouse.config import load_config
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.pipeline import Plan, make_plan
from stillhouse.store import Chunk, ChunkStore, list_recipes
from stillhouse.tracking import ChunkEvent, EndEvent, RunEvent, TeacherEvent, read_journal

PATIENCE_S = 200.0
LOOK_EVERY_S = 0.05


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_model(tmp_path / "teacher", vocab_size=300, hidden_size=128, weight_std=0.3, seed=1)
    make_model(tmp_path / "student", vocab_size=300, hidden_size=32, seed=2)
    write_documents(tmp_path / "documents.jsonl")
    return written_config(tmp_path, "vllm", num_replicas=2, python=sys.executable)


def written_config(folder: Path, engine: str, *, num_replicas: int, **teacher: str) -> Path:
    """The config of a run on the models, the documents and the store of a folder."""
    values: dict[str, dict[str, Any]] = {
        "corpus": {"dataset": str(folder / "documents.jsonl"), "sequence_length": 64},
        "teacher": {
            "model": str(folder / "teacher"),
            "engine": engine,
            "dtype": "float32",
            "num_cpus": 0.5,
            "min_replicas": num_replicas,
            "max_replicas": num_replicas,
        }
        | teacher,
        "student": {
            "model": str(folder / "student"),
            "dtype": "float32",
            "global_batch_sequences": 8,
            "num_cpus": 0.5,
            "epochs": 1,
        },
        "target": {"k": 8, "tail_draws": 12},
        "store": {"url": str(folder / "store"), "chunk_sequences": 2},
        "tracking": {"wandb": "off"},
        "cluster": {"num_cpus": 2, "notices": "off"},
    }
    path = folder / f"{engine}.toml"
    path.write_text(as_toml(values))
    return path


def test_a_teacher_in_another_environment_is_killed_and_replaced_and_every_chunk_is_whole(
    config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with begun(config, run_dir) as producing:
        # both are of this environment
        wait_until(lambda: len(of_kind(TeacherEvent, run_dir)) == 2, producing)
        killed, survivor = teachers_of(producing)
        assert all(sys.prefix in libraries_of(each) for each in (killed, survivor))

        # the survivor stands still until the other is replaced, or it might do all the work
        survivor.suspend()
        killed.kill()
        wait_until(lambda: len(of_kind(TeacherEvent, run_dir)) == 3, producing)
        survivor.resume()
        require_done(producing)

    # what is there
    [end] = of_kind(EndEvent, run_dir)
    assert end.outcome == "done"
    [stored] = list_recipes(str(tmp_path / "store"))
    recipe = stored.recipe
    store = ChunkStore(str(tmp_path / "store"), recipe)
    published = store.published()
    told = {event.chunk for event in of_kind(ChunkEvent, run_dir)}
    assert told <= published
    assert len(published - told) <= 1  # the killed one had no time to tell of its last
    assert len(published) == recipe.num_chunks
    for number in published:
        store.verify(number)


def test_commands_of_both_engines_fill_one_store_of_format_1_at_once(
    config: Path, tmp_path: Path
) -> None:
    # a chunk is there
    of_transformers = written_config(tmp_path, "transformers", num_replicas=1)
    run_dirs = tmp_path / "transformers", tmp_path / "vllm"
    plan = make_plan(load_config(of_transformers), run_dir=run_dirs[0], cache_dir=tmp_path)
    recipe, section = replace(plan.recipe, format=1), plan.config.teacher
    store = ChunkStore.create(str(tmp_path / "store"), recipe)
    engine, there = TransformersEngine(section, recipe, device="cpu"), int(plan.chunks[0])
    store.publish(chunk_of(engine, plan, there))
    before = store.blobs.read(store.key(there))

    # whoever is ready first stands still until the other has published, too
    with begun(of_transformers, run_dirs[0]) as first, begun(config, run_dirs[1]) as second:
        wait_until(lambda: of_kind(ChunkEvent, run_dirs[0]), first)
        [teacher] = teachers_of(first)
        teacher.suspend()
        wait_until(lambda: of_kind(ChunkEvent, run_dirs[1]), second)
        teacher.resume()
        for producing in (first, second):
            require_done(producing)

    # one recipe, each of whose chunks was published once
    assert [each.recipe for each in list_recipes(store.url)] == [recipe]
    by_transformers, by_vllm = (
        {event.chunk for event in of_kind(ChunkEvent, run_dir) if not event.duplicate}
        for run_dir in run_dirs
    )
    assert not by_transformers & by_vllm
    assert store.published() == {there} | by_transformers | by_vllm == {*range(recipe.num_chunks)}
    assert store.blobs.read(store.key(there)) == before

    # all were held to one answer of a probe
    probe = store.blobs.read(f"{store.folder}/probe.json")
    length = recipe.sequence_length
    read_probe(bytes(probe), vocab_size=recipe.vocab_size, sequence_length=length)

    # its targets are those of either engine
    for number in (min(by_transformers), min(by_vllm)):
        found, wanted = store.fetch(number), chunk_of(engine, plan, number)
        assert np.array_equal(found.sequences.token_ids_SL, wanted.sequences.token_ids_SL)
        assert (found.targets_NB == wanted.targets_NB).all(axis=1).mean() > 0.9


def chunk_of(engine: TransformersEngine, plan: Plan, number: int) -> Chunk:
    item = item_with_tokens(plan, number)
    parts = [part.records_TB for part in engine.records(item)]
    return Chunk(number, item.sequences, torch.cat(parts).numpy())


@contextmanager
def begun(config: Path, run_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    """`stillhouse produce` in the project's own environment, ended with the block."""
    program = ROOT / ".venv" / "bin" / "python"
    command = [program, "-m", "stillhouse", "produce", config, "--run-dir", run_dir]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as producing:
        try:
            yield producing
        finally:
            producing.terminate()


def of_kind(kind: type[Any], run_dir: Path) -> list[Any]:
    """The events of one kind in the run's journal so far."""
    path = run_dir / "journal.jsonl"
    events: list[RunEvent] = read_journal(path) if path.exists() else []
    return [event for event in events if isinstance(event, kind)]


def require_done(producing: "subprocess.Popen[str]") -> None:
    _, errors = producing.communicate(timeout=PATIENCE_S)
    assert producing.returncode == 0, errors


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
