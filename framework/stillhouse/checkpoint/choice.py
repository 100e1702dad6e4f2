"""Which commit a training goes on from: the newest one without a problem. And which older ones are
deleted.

How the store is called is up to the caller (`Ask`): once, until it is available, or on rank 0 for
all ranks.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from stillhouse.checkpoint.integrity import fetch, local_folder, verify
from stillhouse.checkpoint.manifest import (
    UNREADABLE,
    Commit,
    commit_of,
    manifest_names,
    manifest_of,
    read_commit,
)
from stillhouse.checkpoint.scratch import scratch_folder
from stillhouse.errors import CheckpointError
from stillhouse.retry import DEFAULT_PATIENCE, Patience, Tell, insist
from stillhouse.store.object_store import Blobs

_Answer = TypeVar("_Answer")

_FOLDER = re.compile(r"(step-\d{8})\..+")


class Choice(NamedTuple):
    """The commit to go on from; None where nothing was ever committed."""

    commit: Commit | None
    passed_over: Mapping[str, str]  # newer manifests, newest first: name -> the problem with it


class Ask(Protocol):
    """Calls the store for `choose`. Answers are JSON values, since another rank may send them."""

    def __call__(self, call: Callable[[], _Answer], /) -> _Answer: ...


def directly(call: Callable[[], _Answer], /) -> _Answer:
    """The `Ask` that calls here, and once."""
    return call()


def choose(
    blobs: Blobs,
    problem_with: Callable[[Commit], str],
    *,
    step: int | None = None,
    ask: Ask = directly,
) -> Choice:
    """The newest commit with which there is no problem (''); with `step`, the commit of that step.

    Raises CheckpointError where there are such commits and each has a problem.
    """
    # newest first
    problems: dict[str, str] = {}
    names = ask(lambda: manifest_names(blobs))
    for name in reversed([name for name in names if step is None or name == manifest_of(step)]):
        found = ask(partial(_values_or_problem, blobs, name))
        if isinstance(found, str):
            problems[name] = found
            continue
        commit = commit_of(found)
        problem = problem_with(commit)
        if not problem:
            return Choice(commit, problems)
        problems[name] = problem
    # none is left
    if problems:
        raise CheckpointError(
            f"no checkpoint under {blobs.url} verifies:\n"
            + "\n".join(f"  - {name}: {problem}" for name, problem in problems.items())
            + f"\nRestore the files from a backup, or remove {blobs.url} to start the training "
            "again from step 0."
        )
    return Choice(None, {})


def _values_or_problem(blobs: Blobs, name: str) -> dict[str, Any] | str:
    """A commit as JSON values, or why its manifest cannot be read."""
    try:
        return asdict(read_commit(blobs, name))
    except UNREADABLE as error:
        return f"the manifest cannot be read ({error})"


def newest(url: str) -> Commit | None:
    """The newest commit whose every byte verifies. Reads all of its files."""
    blobs = Blobs(url)
    return choose(blobs, lambda commit: verify(blobs, commit, commit.files)).commit


def newest_manifest(url: str, *, ask: Ask = directly) -> Commit | None:
    """The newest commit whose manifest can be read. Cheap: its files are not looked at."""
    return choose(Blobs(url), lambda _: "", ask=ask).commit


def newest_step(url: str, *, ask: Ask = directly) -> int:
    """The step of `newest_manifest`, 0 where there is none."""
    found = newest_manifest(url, ask=ask)
    return found.step if found else 0


@contextmanager
def newest_copy(
    url: str,
    wanted: Callable[[Commit], Iterable[str]],
    *,
    step: int | None = None,
    tell: Tell,
    patience: Patience = DEFAULT_PATIENCE,
) -> Iterator[tuple[Commit, Path] | None]:
    """The newest commit whose `wanted` files verify, or with `step` the commit of that step, and a
    local folder with them: the commit's own in a directory, a temporary one for an object store.
    None where there is no commit.

    Waits while the store is unavailable, and reports that to `tell`. Raises StoreUnavailable at the
    end of the patience.
    """
    blobs = Blobs(url, patience_s=patience.request_s)
    ask = partial(insist, patience=patience, tell=tell)
    with scratch_folder() as scratch:

        def problem_with(commit: Commit) -> str:
            problems = (
                ask(partial(fetch, blobs, commit, [name], into=scratch)) for name in wanted(commit)
            )
            return next(filter(None, problems), "")

        found = choose(blobs, problem_with, step=step, ask=ask).commit
        yield None if found is None else (found, local_folder(blobs, found, scratch))


def set_aside(blobs: Blobs, passed_over: Iterable[str]) -> None:
    """Rename the manifests that a choice passed over: they are damaged, and a training that goes on
    from an older commit will need their names.

    A later manifest that is not among them stays: a group that was thought dead has committed it
    since.
    """
    for name in passed_over:
        with suppress(FileNotFoundError):  # another group was faster
            blobs.move(name, name.removesuffix(".json") + ".damaged")


def retain(blobs: Blobs, keep: int, *, best: int | None = None) -> None:
    """Delete all commits but the `keep` newest and that of step `best`, and the folders without a
    commit up to the newest.

    Manifests are deleted first, so that half a commit is never one. Later folders stay: ranks may
    be writing them. A folder stays, too, that a damaged manifest may name.
    """
    manifests = manifest_names(blobs)
    if not manifests:
        return
    stays = {*manifests[-keep:], *([] if best is None else [manifest_of(best)])} & {*manifests}
    blobs.delete(*(name for name in manifests if name not in stays))
    kept = {name.removesuffix(".json"): _folder_named_by(blobs, name) for name in stays}
    newest_tag = manifests[-1].removesuffix(".json")
    for folder in blobs.folders():
        match = _FOLDER.fullmatch(folder)
        if match and match[1] <= newest_tag and kept.get(match[1], "") not in (folder, None):
            blobs.delete_under(folder)


def _folder_named_by(blobs: Blobs, manifest: str) -> str | None:
    """None where the manifest cannot be read."""
    try:
        return read_commit(blobs, manifest).folder
    except UNREADABLE:
        return None
