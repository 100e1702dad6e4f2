"""Two ranks share a head and draw as one; and no process of an engine outlives its owner."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from helpers.vllmtoys import make_toy, packed_item, recipe_of, section_of, started

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]
OWNER = """
import sys
from pathlib import Path
import torch
from helpers.vllmtoys import packed_item, recipe_of, section_of
from stillhouse.engines.vllm import VllmEngine

if __name__ == "__main__":
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    engine = VllmEngine(section_of(folder, tensor_parallel=2), recipe_of(), device="cpu")
    [part] = engine.records(packed_item())
    probe = engine.probe()
    torch.save({"records": part.records_TB, "sample": part.sample.tensors,
                "probe": probe.answer.tensors}, out / "part")
    (out / "part").rename(out / "answers")
    sys.stdin.read()
"""


@contextmanager
def owner_of_two_ranks(folder: Path, out: Path) -> Iterator[psutil.Process]:
    """A process with an engine of two ranks; what it leaves behind is ended."""
    script = out / "owner.py"
    script.write_text(OWNER)
    command = [sys.executable, str(script), str(folder), str(out)]
    with (out / "log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
    family = [psutil.Process(process.pid)]
    try:
        yield family[0]
        family += family[0].children(recursive=True) if process.poll() is None else []
    finally:
        process.kill()
        process.wait()


def until(is_so: Callable[[], bool], *, within_s: float, log: Path) -> None:
    """Poll until something is so. Fails, with the log, where it is not so in time."""
    end = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)


def workers_of(owner: psutil.Process) -> list[psutil.Process]:
    """Its workers until they change their names, once they are loaded."""
    return [each for each in owner.children(recursive=True) if "spawn_main" in str(each.cmdline())]


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != "zombie" for each in processes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("llama"), "llama")


def test_two_ranks_answer_as_one_and_die_with_their_killed_owner(
    folder: Path, tmp_path: Path
) -> None:
    with owner_of_two_ranks(folder, tmp_path) as owner:
        answers = tmp_path / "answers"
        until(answers.exists, within_s=400, log=tmp_path / "log")
        family = owner.children(recursive=True)
        assert len(family) >= 2
        owner.kill()
        until(lambda: are_gone(family), within_s=20, log=tmp_path / "log")

    found = torch.load(answers)
    engine = started(section_of(folder), recipe_of())
    [wanted] = engine.records(packed_item())
    assert (found["records"] == wanted.records_TB).all(dim=1).float().mean() > 0.9
    assert torch.equal(found["sample"]["token_ids_TK"], wanted.sample.token_ids_TK)
    same_TN = found["sample"]["tail_ids_TN"] == wanted.sample.tail_ids_TN
    assert same_TN.float().mean() > 0.999  # borders are rounded
    for name, tensor in wanted.sample.tensors.items():
        if name != "tail_ids_TN":
            torch.testing.assert_close(found["sample"][name], tensor, atol=2e-4, rtol=1e-4)


def test_ranks_that_still_load_die_with_their_killed_owner(folder: Path, tmp_path: Path) -> None:
    with owner_of_two_ranks(folder, tmp_path) as owner:
        until(lambda: len(workers_of(owner)) >= 2, within_s=200, log=tmp_path / "log")
        family = owner.children(recursive=True)
        owner.kill()
        until(lambda: are_gone(family), within_s=200, log=tmp_path / "log")
    assert not (tmp_path / "answers").exists()
