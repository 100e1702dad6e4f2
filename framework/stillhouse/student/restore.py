"""The group of ranks agrees on a checkpoint to go on from, and each rank gets the files that it will read, every byte verified.

A checkpoint of another number of ranks is converted by the first rank of each machine, into a temporary folder that the machine's
other ranks read as well.
"""

import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from stillhouse.errors import CheckpointError, StillhouseError
from stillhouse.store.blobs import Blobs
from stillhouse.student.checkpoint import Choice, Commit, Origin, choose, commit_of, fetch, local_folder, set_aside_after, unlike
from stillhouse.student.collectives import gathered, outcomes, packed_error, told, unpacked_error
from stillhouse.student.scratch import scratch_folder
from stillhouse.student.unpickling import opened

Convert = Callable[[Path, Path], None]  # (a checkpoint's folder, the folder to make)

_PICKLED = ".pt"
_OF_RANK = re.compile(r"(?:pp_rank_|^part-)0*(\d+)")  # in the name of a file that one rank alone reads


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint that this rank can load, while `restore` lasts."""

    step: int  # optimiser steps done
    folder: Path
    universal: bool  # whether it was converted, because another number of ranks wrote it
    passed_over: Sequence[str]  # newer ones that do not verify, each as its manifest's name and the problem with it


@contextmanager
def restore(url: str, *, origin: Origin, convert: Convert) -> Iterator[Restored | None]:
    """The newest checkpoint under `url` whose every byte verifies; None where there is none. Every rank of the process group calls this.

    Raises CheckpointError on every rank where no commit verifies, or where the newest is of another training or holds more than tensors.
    """
    blobs = Blobs(url)
    with scratch_folder() as scratch:
        group = _Group.gathered()
        found, passed_over = group.choose(blobs, scratch)
        if found is None:
            yield None
            return
        differences = unlike(found.origin, origin)
        if differences:
            raise CheckpointError(
                f"{url} belongs to another training:\n"
                + "\n".join(f"  - {line}" for line in differences)
                + "\nSet them back to go on with it, or use a new run directory and, where one is set, a new student.checkpoint_url."
            )
        folder = local_folder(blobs, found, scratch)
        universal = group.must_convert(found)
        if universal:
            folder = group.converted(folder, scratch / "universal", convert)
        yield Restored(found.step, folder, universal, passed_over)
        dist.barrier()  # another rank may still read what this one deletes now


@dataclass(frozen=True, slots=True)
class _Group:
    """This rank among the others. Its methods are collectives, except where they only ask."""

    rank: int
    world_size: int
    first: int  # the first rank on this rank's machine

    @classmethod
    def gathered(cls) -> "_Group":
        name = socket.gethostname()
        return cls(dist.get_rank(), dist.get_world_size(), gathered(name).index(name))

    def must_convert(self, commit: Commit) -> bool:
        """Stage 0 has the same state on every rank, so any number of them can load it."""
        return commit.world_size != self.world_size and commit.origin.zero_stage > 0

    def choose(self, blobs: Blobs, scratch: Path) -> Choice:
        """All ranks try what rank 0 proposes, newest first, until a commit is whole on every rank."""

        def problem_with(commit: Commit) -> str:
            names = [*self._reads(commit)]
            problem = fetch(blobs, commit, names, into=scratch)
            if problem:
                return problem
            for name in names:
                if name.endswith(_PICKLED):  # what one rank would refuse, all refuse now: as DeepSpeed loads, ranks wait for one another
                    opened(local_folder(blobs, commit, scratch) / name, map_location="meta")
            return ""

        def problems_with(commit: Commit) -> "list[str | StillhouseError]":
            return outcomes(lambda: problem_with(commit))

        return _lead(blobs, problems_with) if self.rank == 0 else _follow(problems_with)

    def converted(self, folder: Path, out: Path, convert: Convert) -> Path:
        """Where this machine's universal checkpoint is."""

        def made() -> str:
            if self.rank == self.first:
                convert(folder, out)
            return str(out)

        answers = outcomes(made)
        for answer in answers:
            if isinstance(answer, StillhouseError):
                raise answer
        here = Path(answers[self.first])
        if not here.is_dir():
            raise CheckpointError(
                f"rank {self.first} converted the checkpoint into {here}, which rank {self.rank} of the same host name does not see; "
                "give each machine a host name of its own, or set TMPDIR to a directory that they share"
            )
        return here

    def _reads(self, commit: Commit) -> Iterable[str]:
        if self.must_convert(commit):
            return commit.files if self.rank == self.first else ()
        matches = {name: _OF_RANK.search(name) for name in commit.files}
        return [name for name, match in matches.items() if match is None or int(match[1]) % self.world_size == self.rank]


def _lead(blobs: Blobs, problems_with: "Callable[[Commit], list[str | StillhouseError]]") -> Choice:
    def problem_with(commit: Commit) -> str:
        told({"try": asdict(commit)})
        found = [problem for problem in problems_with(commit) if problem]
        for problem in found:
            if isinstance(problem, StillhouseError):
                raise problem
        return str(found[0]) if found else ""

    try:
        chosen = choose(blobs, problem_with)
        set_aside_after(blobs, chosen.commit.step if chosen.commit else 0)
    except StillhouseError as error:
        told({"fail": packed_error(error)})
        raise
    told({"take": None if chosen.commit is None else asdict(chosen.commit), "passed_over": chosen.passed_over})
    return chosen


def _follow(problems_with: Callable[[Commit], object]) -> Choice:
    while True:
        message = told(None)
        if "fail" in message:
            raise unpacked_error(message["fail"])
        if "take" in message:
            return Choice(None if message["take"] is None else commit_of(message["take"]), message["passed_over"])
        problems_with(commit_of(message["try"]))
