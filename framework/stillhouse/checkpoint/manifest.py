"""Checkpoints in two steps: every rank writes its files, then ONE create-only manifest makes them a
commit.

    <root>/step-00000120.k3f9a2c1/...                          what DeepSpeed writes, and nothing
    that could be run <root>/step-00000120.k3f9a2c1/part-00001-of-00002.json     {"part": a rank's
    files with size and xxh3, "xxh3": of that} <root>/step-00000120.json
    {"commit": all files, and what the checkpoint is of, "xxh3": of that}

The root is a directory or an object store. `k3f9a2c1` names an attempt, one life of one group of
ranks: whatever an earlier attempt left behind at the same step is in nobody's way, and is never
chosen. DeepSpeed loads flipped bits without a word; so nothing here trusts a folder that no
manifest names, or a manifest whose files do not hash to what it says.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import xxhash

from stillhouse.checkpoint.scratch import scratch_folder
from stillhouse.errors import CheckpointError, StoreError, StoreUnavailable
from stillhouse.retry import DEFAULT_PATIENCE, Patience, Tell, insist
from stillhouse.sealed import digest_of
from stillhouse.store.download import RANGE_BYTES
from stillhouse.store.object_store import Blobs

Files = Mapping[str, tuple[int, str]]  # name -> (bytes, xxh3)

_Answer = TypeVar("_Answer")

_MANIFEST = re.compile(r"step-\d{8}\.json")
_FOLDER = re.compile(r"(step-\d{8})\..+")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a checkpoint is of. A training goes on from it only where this is the same."""

    zero_stage: int
    fingerprint: str  # of the recipe that it learned from
    settings: Mapping[str, Any]  # of the student, as far as they decide its weights; JSON values


@dataclass(frozen=True, slots=True)
class Commit:
    """A checkpoint that every rank finished writing."""

    step: int  # optimiser steps done
    attempt: str
    world_size: int
    origin: Origin
    files: Files

    @property
    def folder(self) -> str:
        return folder_of(self.step, self.attempt)

    @property
    def manifest(self) -> str:
        return f"{tag_of(self.step)}.json"

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def tag_of(step: int) -> str:
    """What the names of a checkpoint after `step` optimiser steps begin with."""
    return f"step-{step:08d}"


def folder_of(step: int, attempt: str) -> str:
    """Where one attempt's files of a checkpoint lie."""
    return f"{tag_of(step)}.{attempt}"


def part_of(rank: int, world_size: int) -> str:
    """The name of what one rank says about its own files."""
    return f"part-{rank:05d}-of-{world_size:05d}.json"


def publish_part(blobs: Blobs, folder: str, *, rank: int, world_size: int, files: Files) -> None:
    """Say which files this rank has written; done again, it says so again."""
    blobs.replace(f"{folder}/{part_of(rank, world_size)}", _sealed("part", dict(files)))


def read_part(blobs: Blobs, folder: str, *, rank: int, world_size: int) -> Files:
    """The files that a rank has written, and the part itself.

    Raises FileNotFoundError before it is there, and CheckpointError where it is damaged.
    """
    name = part_of(rank, world_size)
    try:
        data, values = _read_sealed(blobs, f"{folder}/{name}", "part")
        files = _files(values)
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{blobs.url}/{folder}/{name}, which rank {rank} has written, cannot be read "
            f"({error}): its disk or memory is damaged. "
            "Start again: training goes on from the commit before."
        ) from None
    return {**files, name: (len(data), xxhash.xxh3_64_hexdigest(data))}


def publish(blobs: Blobs, commit: Commit) -> Commit:
    """Make the files a commit, and return the one that stands: a group that was thought dead may
    have been faster at the same step.

    Once this has returned the commit outlasts a power cut: only then may anything older be deleted,
    or anybody be told. Raises CheckpointError where the step was committed by a training of
    something else.
    """
    if not commit.files:
        raise CheckpointError(
            f"no rank wrote a file for step {commit.step}: there is nothing to commit"
        )
    blobs.sync(commit.folder)  # other ranks' files too: the commit must not outlast what it names
    if blobs.create(commit.manifest, _sealed("commit", asdict(commit))):
        return commit
    try:
        standing = _parsed(blobs, commit.manifest)
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{blobs.url}/{commit.manifest} exists already, and cannot be read ({error}); remove it"
        ) from None
    if standing.origin != commit.origin:
        raise CheckpointError(
            f"{blobs.url}/{commit.manifest} exists already, and is of another training:\n"
            + "\n".join(f"  - {line}" for line in unlike(standing.origin, commit.origin))
            + "\nGive each run a --run-dir and a student.checkpoint_url of its own"
        )
    return standing


def unlike(found: Origin, wanted: Origin) -> list[str]:
    """What differs between two origins, each as 'name: found ..., wanted ...'."""
    before, after = (
        {"zero_stage": o.zero_stage, "recipe": o.fingerprint[:16], **o.settings}
        for o in (found, wanted)
    )
    return [
        f"{name}: found {before.get(name)!r}, wanted {after.get(name)!r}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]


def require_same_training(url: str, commit: Commit, origin: Origin) -> None:
    """Raise CheckpointError where a commit cannot be gone on with."""
    differences = unlike(commit.origin, origin)
    if differences:
        raise CheckpointError(
            f"{url} belongs to another training:\n"
            + "\n".join(f"  - {line}" for line in differences)
            + "\nSet them back to go on with it, or use a new run directory and, where one is "
            "set, a new student.checkpoint_url."
        )


class Choice(NamedTuple):
    commit: Commit | None  # None where nothing was ever committed
    # newer ones, newest first: the manifest's name, and the problem with it
    passed_over: Mapping[str, str]


class Ask(Protocol):
    """How the store is asked: by whom, and how often. Answers are JSON values: they may come from
    another rank."""

    def __call__(self, call: Callable[[], _Answer], /) -> _Answer: ...


def directly(call: Callable[[], _Answer], /) -> _Answer:
    """Here, and once."""
    return call()


def choose(blobs: Blobs, problem_with: Callable[[Commit], str], *, ask: Ask = directly) -> Choice:
    """The newest commit with which there is no problem, else the one before, and so on.

    Raises CheckpointError when there are commits and each has a problem.
    """
    problems: dict[str, str] = {}
    for name in reversed(ask(lambda: _manifests(blobs))):
        found = ask(partial(_values_or_problem, blobs, name))
        if isinstance(found, str):
            problem = found
        else:
            commit = commit_of(found)
            problem = problem_with(commit)
            if not problem:
                return Choice(commit, problems)
        problems[name] = problem
    if problems:
        raise CheckpointError(
            f"no checkpoint under {blobs.url} verifies:\n"
            + "\n".join(f"  - {name}: {problem}" for name, problem in problems.items())
            + f"\nRestore the files from a backup, or remove {blobs.url} to start the training "
            "again from step 0."
        )
    return Choice(None, {})


def newest(url: str) -> Commit | None:
    """The newest commit whose every byte verifies, as `choose` finds it. Reads all of its files."""
    blobs = Blobs(url)
    return choose(blobs, lambda commit: verify(blobs, commit, commit.files)).commit


def newest_manifest(url: str, *, ask: Ask = directly) -> Commit | None:
    """The newest manifest that can be read. Cheap: its files are not looked at."""
    return choose(Blobs(url), lambda _: "", ask=ask).commit


def newest_step(url: str, *, ask: Ask = directly) -> int:
    """The step of that manifest, 0 where there is none."""
    found = newest_manifest(url, ask=ask)
    return found.step if found else 0


@contextmanager
def newest_copy(
    url: str,
    wanted: Callable[[Commit], Iterable[str]],
    *,
    tell: Tell,
    patience: Patience = DEFAULT_PATIENCE,
) -> Iterator[tuple[Commit, Path] | None]:
    """The newest commit whose `wanted` files verify, and a local folder with them: its own in a
    directory, a temporary one for a store.

    A store that is unavailable is waited for, which `tell` hears of. Raises StoreUnavailable at the
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

        found = choose(blobs, problem_with, ask=ask).commit
        yield None if found is None else (found, local_folder(blobs, found, scratch))


def local_folder(blobs: Blobs, commit: Commit, scratch: Path) -> Path:
    """Where `fetch` leaves the files of a commit."""
    return (blobs.directory or scratch) / commit.folder


def fetch(blobs: Blobs, commit: Commit, names: Iterable[str], *, into: Path) -> str:
    """Verify these files of a commit, in place in a directory, else as they are downloaded. The
    problem with one of them, or ''."""
    if blobs.directory is not None:
        return verify(blobs, commit, names)
    folder = local_folder(blobs, commit, into)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_room(folder, error) from None

    def download(name: str, range_bytes: int) -> tuple[int, str]:
        digest = Digest()
        with (folder / name).open("wb") as file:
            for piece in blobs.pieces(f"{commit.folder}/{name}", range_bytes=range_bytes):
                digest.add(piece)
                try:
                    file.write(piece)
                except OSError as error:
                    raise _no_room(folder, error) from None
        return digest.value

    return _problem_with(blobs, commit, names, download)


def verify(blobs: Blobs, commit: Commit, names: Iterable[str]) -> str:
    """The problem with one of these files of a commit, or ''."""

    def read(name: str, range_bytes: int) -> tuple[int, str]:
        digest = Digest()
        for piece in blobs.pieces(f"{commit.folder}/{name}", range_bytes=range_bytes):
            digest.add(piece)
        return digest.value

    return _problem_with(blobs, commit, names, read)


def set_aside(blobs: Blobs, passed_over: Iterable[str]) -> None:
    """Rename the manifests that were passed over in a choice: they are damaged, and their names are
    needed again.

    A later one that is not among them was committed since by a group that was thought dead, and
    stays.
    """
    for name in passed_over:
        with suppress(FileNotFoundError):  # another group was faster
            blobs.move(name, name.removesuffix(".json") + ".damaged")


def retain(blobs: Blobs, keep: int) -> None:
    """Delete all but the `keep` newest commits, and the folders up to the newest that no commit
    names.

    Manifests go first, and for good: never half a commit. Later folders stay: ranks may be writing
    them.
    """
    manifests = _manifests(blobs)
    if not manifests:
        return
    blobs.delete(*manifests[:-keep])
    kept = {name.removesuffix(".json"): _folder_named_by(blobs, name) for name in manifests[-keep:]}
    newest_tag = manifests[-1].removesuffix(".json")
    for folder in blobs.folders():
        match = _FOLDER.fullmatch(folder)
        if match and match[1] <= newest_tag and kept.get(match[1], "") not in (folder, None):
            blobs.delete_under(folder)


class Digest:
    """Size and xxh3 of bytes that come in pieces."""

    def __init__(self) -> None:
        self._hasher, self._size = xxhash.xxh3_64(), 0

    def add(self, data: bytes | memoryview) -> None:
        self._hasher.update(data)
        self._size += len(data)

    @property
    def value(self) -> tuple[int, str]:
        return self._size, self._hasher.hexdigest()


# range_bytes of each: the second read sends different requests
_TWO_READS = (
    RANGE_BYTES,
    RANGE_BYTES - (1 << 20),
)
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, FileNotFoundError)


def _manifests(blobs: Blobs) -> list[str]:
    return [name for name in blobs.names() if _MANIFEST.fullmatch(name)]


def _values_or_problem(blobs: Blobs, name: str) -> dict[str, Any] | str:
    """A commit as JSON values, or why it cannot be read."""
    try:
        return asdict(_parsed(blobs, name))
    except _UNREADABLE as error:
        return f"the manifest cannot be read ({error})"


def commit_of(values: Mapping[str, Any]) -> Commit:
    """The commit whose fields these JSON values are. Raises one of _UNREADABLE where they are of
    none."""
    origin = values["origin"]
    found = Commit(
        _of(int, values["step"]),
        _of(str, values["attempt"]),
        _of(int, values["world_size"]),
        Origin(
            _of(int, origin["zero_stage"]),
            _of(str, origin["fingerprint"]),
            dict(_of(dict, origin["settings"])),
        ),
        _files(values["files"]),
    )
    if not found.files:
        raise ValueError("it names no file")
    if not _is_plain(found.attempt):
        raise ValueError(f"it names the attempt {found.attempt}, which is outside of its root")
    return found


def _parsed(blobs: Blobs, name: str) -> Commit:
    _, values = _read_sealed(blobs, name, "commit")
    found = commit_of(values)
    if found.manifest != name:
        raise ValueError(f"it is of step {found.step}")
    return found


def _folder_named_by(blobs: Blobs, manifest: str) -> str | None:
    try:
        return _parsed(blobs, manifest).folder
    except _UNREADABLE:
        return None


def _of(kind: type[_Answer], value: Any) -> _Answer:
    """The value, which has to be of this type: nothing is read as what it only resembles."""
    if type(value) is not kind:
        raise TypeError(f"it has {value!r:.100}, wanted a value of type {kind.__name__}")
    return value


def _files(values: dict[str, Any]) -> Files:
    files = {
        _of(str, name): (_of(int, size), _of(str, digest))
        for name, (size, digest) in values.items()
    }
    for name in files:
        if not _is_plain(name):
            raise ValueError(f"it names {name}, which is outside of the checkpoint")
    return files


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[\w.=-]+", name) is not None and name not in (".", "..")


def _problem_with(
    blobs: Blobs,
    commit: Commit,
    names: Iterable[str],
    digest_of: Callable[[str, int], tuple[int, str]],
) -> str:
    """The first file's problem on which two reads, by ranges of two lengths, agree, or ''.
    `digest_of` reads (name, range_bytes)."""
    for name in names:
        first, second = (partial(digest_of, name, range_bytes) for range_bytes in _TWO_READS)
        problem = _problem_of_one_read(blobs, commit, name, first) and _problem_of_one_read(
            blobs, commit, name, second
        )
        if problem:
            return problem
    return ""


def _problem_of_one_read(
    blobs: Blobs, commit: Commit, name: str, digest: Callable[[], tuple[int, str]]
) -> str:
    try:
        is_as_committed = digest() == commit.files[name]
    except FileNotFoundError:
        return f"{name} is missing"
    except StoreError as error:
        if blobs.directory is None or isinstance(error, StoreUnavailable):
            # a bucket that refuses to be read says nothing of the file; a disk that cannot read it
            # does
            raise
        return f"{name} cannot be read ({error})"
    return "" if is_as_committed else f"{name} is not what was committed (size or checksum differs)"


def _no_room(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write to {folder}: {error.strerror}; make room for the checkpoint there, or set "
        "TMPDIR to a larger disk"
    )


def _sealed(kind: str, values: Any) -> bytes:
    return json.dumps({kind: values, "xxh3": digest_of(values, compact=True)}, indent=1).encode()


def _read_sealed(blobs: Blobs, key: str, kind: str) -> tuple[bytes, Any]:
    """The bytes of a part or a manifest, and what they say. Raises one of _UNREADABLE where neither
    of two reads is whole."""
    data = bytes(blobs.read(key))
    try:
        return data, _opened(kind, data)
    except _UNREADABLE:  # perhaps on the way alone
        data = b"".join(blobs.pieces(key))
        return data, _opened(kind, data)


def _opened(kind: str, data: bytes) -> Any:
    whole = json.loads(data)
    if whole["xxh3"] != digest_of(whole[kind], compact=True):
        raise ValueError("its checksum differs")
    return whole[kind]
