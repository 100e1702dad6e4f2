"""Restoring: the ranks agree on a commit to go on from, and each gets the files that it will load,
every byte verified.

A checkpoint of another number of ranks is converted by the first rank of each machine, into a
temporary folder that the machine's other ranks load from, too.
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

from stillhouse.checkpoint.choice import Choice, choose, set_aside
from stillhouse.checkpoint.integrity import fetch, local_folder
from stillhouse.checkpoint.manifest import Commit, Origin, require_same_training
from stillhouse.checkpoint.scratch import scratch_folder
from stillhouse.checkpoint.unpickling import opened
from stillhouse.cluster.collectives import gathered, outcomes
from stillhouse.errors import CheckpointError, StillhouseError
from stillhouse.retry import DEFAULT_PATIENCE, Patience, Tell, insist
from stillhouse.store.object_store import Blobs

Convert = Callable[[Path, Path], None]  # (a checkpoint's folder, the folder to make)

_Value = TypeVar("_Value")

_MEET_EVERY_S = 1.0  # while one rank works and others wait for it
# in the name of a file that one rank alone loads
_OF_RANK = re.compile(r"(?:pp_rank_|^part-)0*(\d+)")


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint that this rank can load, while `restore` lasts."""

    step: int  # optimiser steps done
    folder: Path
    universal: bool  # whether it was converted, because another number of ranks wrote it
    passed_over: Sequence[str]  # newer manifests that do not verify: "name: the problem with it"


@contextmanager
def restore(
    url: str, *, origin: Origin, convert: Convert, tell: Tell, patience: Patience = DEFAULT_PATIENCE
) -> Iterator[Restored | None]:
    """The newest checkpoint under `url` whose every byte verifies; None where there is none. A
    collective: every rank of the process group calls it.

    Waits while the store is unavailable, and reports that to `tell`. Raises on every rank:
    CheckpointError where no commit verifies, or the newest is of another training or holds more
    than tensors; StoreUnavailable at the end of the patience.
    """
    blobs = Blobs(url, patience_s=patience.request_s)
    with scratch_folder() as scratch:
        # agree on a commit
        group = _Group.gathered(patience, tell)
        found, passed_over = group.choose(blobs, scratch)
        if found is None:
            yield None
            return
        require_same_training(url, found, origin)
        # make it loadable by this number of ranks
        folder = local_folder(blobs, found, scratch)
        universal = group.must_convert(found)
        if universal:
            folder = group.converted(folder, scratch / "universal", convert)
        problems = [f"{name}: {problem}" for name, problem in passed_over.items()]
        yield Restored(found.step, folder, universal, problems)
        dist.barrier()  # another rank may still load what this one deletes now


@dataclass(frozen=True, slots=True)
class _Group:
    """This rank among the others. All methods but `must_convert` are collectives."""

    rank: int
    world_size: int
    first: int  # the first rank on this rank's machine
    patience: Patience
    tell: Tell

    @classmethod
    def gathered(cls, patience: Patience, tell: Tell) -> "_Group":
        name = socket.gethostname()
        first = gathered(name).index(name)
        return cls(dist.get_rank(), dist.get_world_size(), first, patience, tell)

    def must_convert(self, commit: Commit) -> bool:
        """Stage 0 has the same state on every rank, so any number of them can load it."""
        return commit.world_size != self.world_size and commit.origin.zero_stage > 0

    def choose(self, blobs: Blobs, scratch: Path) -> Choice:
        """All ranks try what rank 0 finds, newest first, until a commit is whole on every rank."""

        def problem_here(commit: Commit) -> str:
            for name in self._loads(commit):
                if problem := self._insist(partial(fetch, blobs, commit, [name], into=scratch)):
                    return problem
                # a file that one rank refuses is refused by all, and now: ranks wait for one
                # another while DeepSpeed loads
                if name.endswith(".pt"):
                    opened(local_folder(blobs, commit, scratch) / name, map_location="meta")
            return ""

        def problem_anywhere(commit: Commit) -> str:
            return next(filter(None, _together(partial(problem_here, commit))), "")

        chosen = choose(blobs, problem_anywhere, ask=self._ask_rank_0)
        self._ask_rank_0(lambda: set_aside(blobs, chosen.passed_over))
        return chosen

    def converted(self, folder: Path, out: Path, convert: Convert) -> Path:
        """The folder of this machine's universal checkpoint."""

        def convert_once() -> str:
            if self.rank == self.first:
                convert(folder, out)
            return str(out)

        here = Path(_together(convert_once)[self.first])
        if not here.is_dir():
            raise CheckpointError(
                f"rank {self.first} converted the checkpoint into {here}, which rank {self.rank} "
                "of the same host name does not see; give each machine a host name of its own, or "
                "set TMPDIR to a directory that they share"
            )
        return here

    def _loads(self, commit: Commit) -> Iterable[str]:
        """The files of a commit that this rank loads or converts."""
        if self.must_convert(commit):
            return commit.files if self.rank == self.first else ()
        matches = {name: _OF_RANK.search(name) for name in commit.files}
        return [
            name
            for name, match in matches.items()
            if match is None or int(match[1]) % self.world_size == self.rank
        ]

    def _ask_rank_0(self, call: Callable[[], _Value], /) -> _Value:
        """Rank 0's answer, on every rank."""
        answers: list[_Value] = _together(lambda: self._insist(call) if self.rank == 0 else None)
        return answers[0]

    def _insist(self, call: Callable[[], _Value]) -> _Value:
        return insist(call, patience=self.patience, tell=self.tell)


def _together(call: Callable[[], Any]) -> list[Any]:
    """Every rank's answer, a JSON value, by rank. Raises on every rank what one rank raised.

    Each rank works in a thread, and meets the others every second until all are done: one
    collective that took as long as the work would reach the process group's time-out.
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
