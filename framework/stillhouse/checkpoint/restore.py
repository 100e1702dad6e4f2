"""The group of ranks agrees on a checkpoint to go on from, and each rank gets the files that it
will read, every byte verified.

A checkpoint of another number of ranks is converted by the first rank of each machine, into a
temporary folder that the machine's other ranks read as well.
"""

import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from stillhouse.checkpoint.manifest import (
    Choice,
    Commit,
    Origin,
    choose,
    fetch,
    local_folder,
    require_same_training,
    set_aside,
)
from stillhouse.checkpoint.scratch import scratch_folder
from stillhouse.checkpoint.unpickling import opened
from stillhouse.cluster.collectives import gathered, outcomes
from stillhouse.errors import CheckpointError, StillhouseError
from stillhouse.retry import DEFAULT_PATIENCE, Patience, Tell, insist
from stillhouse.store.object_store import Blobs

Convert = Callable[[Path, Path], None]  # (a checkpoint's folder, the folder to make)

_Value = TypeVar("_Value")

_PICKLED = ".pt"
_MEET_EVERY_S = 1.0  # while one rank works and others wait for it
# in the name of a file that one rank alone reads
_OF_RANK = re.compile(r"(?:pp_rank_|^part-)0*(\d+)")


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint that this rank can load, while `restore` lasts."""

    step: int  # optimiser steps done
    folder: Path
    universal: bool  # whether it was converted, because another number of ranks wrote it
    # newer ones that do not verify, each as its manifest's name and the problem with it
    passed_over: Sequence[str]


@contextmanager
def restore(
    url: str, *, origin: Origin, convert: Convert, tell: Tell, patience: Patience = DEFAULT_PATIENCE
) -> Iterator[Restored | None]:
    """The newest checkpoint under `url` whose every byte verifies; None where there is none. Every
    rank of the process group calls this.

    A store that is unavailable is waited for, which `tell` hears of. Raises on every rank
    CheckpointError where no commit verifies or the newest is of another training or holds more than
    tensors, and StoreUnavailable at the end of the patience.
    """
    blobs = Blobs(url, patience_s=patience.request_s)
    with scratch_folder() as scratch:
        group = _Group.gathered(patience, tell)
        found, passed_over = group.choose(blobs, scratch)
        if found is None:
            yield None
            return
        require_same_training(url, found, origin)
        folder = local_folder(blobs, found, scratch)
        universal = group.must_convert(found)
        if universal:
            folder = group.converted(folder, scratch / "universal", convert)
        yield Restored(
            found.step,
            folder,
            universal,
            [f"{name}: {problem}" for name, problem in passed_over.items()],
        )
        dist.barrier()  # another rank may still read what this one deletes now


@dataclass(frozen=True, slots=True)
class _Group:
    """This rank among the others. Its methods are collectives, except where they only ask."""

    rank: int
    world_size: int
    first: int  # the first rank on this rank's machine
    patience: Patience
    tell: Tell

    @classmethod
    def gathered(cls, patience: Patience, tell: Tell) -> "_Group":
        name = socket.gethostname()
        return cls(
            dist.get_rank(), dist.get_world_size(), gathered(name).index(name), patience, tell
        )

    def must_convert(self, commit: Commit) -> bool:
        """Stage 0 has the same state on every rank, so any number of them can load it."""
        return commit.world_size != self.world_size and commit.origin.zero_stage > 0

    def choose(self, blobs: Blobs, scratch: Path) -> Choice:
        """All ranks try what rank 0 finds, newest first, until a commit is whole on every rank."""

        def problem_here(commit: Commit) -> str:
            for name in self._reads(commit):
                if problem := self._insist(partial(fetch, blobs, commit, [name], into=scratch)):
                    return problem
                if name.endswith(
                    _PICKLED
                    # what one rank refuses, all refuse now: as DeepSpeed loads, ranks wait for one
                    # another
                ):
                    opened(local_folder(blobs, commit, scratch) / name, map_location="meta")
            return ""

        chosen = choose(
            blobs,
            lambda commit: _first_problem(_together(partial(problem_here, commit))),
            ask=self._ask_first,
        )
        self._ask_first(lambda: set_aside(blobs, chosen.passed_over))
        return chosen

    def _ask_first(self, call: Callable[[], _Value], /) -> _Value:
        """What rank 0 is answered, on every rank."""
        work = (lambda: self._insist(call)) if self.rank == 0 else _nothing
        answers: list[_Value] = _together(work)
        return answers[0]

    def _insist(self, call: Callable[[], _Value]) -> _Value:
        return insist(call, patience=self.patience, tell=self.tell)

    def converted(self, folder: Path, out: Path, convert: Convert) -> Path:
        """Where this machine's universal checkpoint is."""

        def made() -> str:
            if self.rank == self.first:
                convert(folder, out)
            return str(out)

        here = Path(_together(made)[self.first])
        if not here.is_dir():
            raise CheckpointError(
                f"rank {self.first} converted the checkpoint into {here}, which rank {self.rank} "
                "of the same host name does not see; "
                "give each machine a host name of its own, or set TMPDIR to a directory that they "
                "share"
            )
        return here

    def _reads(self, commit: Commit) -> Iterable[str]:
        if self.must_convert(commit):
            return commit.files if self.rank == self.first else ()
        matches = {name: _OF_RANK.search(name) for name in commit.files}
        return [
            name
            for name, match in matches.items()
            if match is None or int(match[1]) % self.world_size == self.rank
        ]


def _first_problem(problems: Sequence[str]) -> str:
    return next((problem for problem in problems if problem), "")


def _nothing() -> Any:
    """What a rank does that waits for another's answer."""


def _together(call: Callable[[], _Value]) -> list[_Value]:
    """Every rank's answer, a JSON value, by rank. Raises on every rank what a rank raised.

    Each works in a thread and meets the others every second until all are done: a collective that
    lasted for as long as the work would reach the process group's time-out.
    """
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    def answer() -> Any:
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    # work, and meet
    thread = threading.Thread(target=work, name="restore", daemon=True)
    thread.start()
    everyone_is_done = False
    while not everyone_is_done:
        thread.join(_MEET_EVERY_S)
        everyone_is_done = all(gathered(not thread.is_alive()))

    # compare
    answers = outcomes(answer)
    for each in answers:
        if isinstance(each, StillhouseError):
            raise each
    return answers
