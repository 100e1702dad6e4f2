"""Whether everybody who was told of a commit or a chunk was told the truth: a checker of histories.

A history is what was told, in order, and what is there at its end. It holds two promises: whoever
was told that a step is committed reads that commit back, or a later one; and a chunk is published
once, after which its bytes never change.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import xxhash

from stillhouse.checkpoint.choice import choose
from stillhouse.checkpoint.integrity import verify
from stillhouse.checkpoint.manifest import Commit, tag_of
from stillhouse.errors import CheckpointError
from stillhouse.store import ChunkStore
from stillhouse.store.object_store import Blobs
from stillhouse.tracking import (
    CheckpointEvent,
    ChunkEvent,
    DamagedEvent,
    RepairEvent,
    RunEvent,
    StartEvent,
    TrainEvent,
)


@dataclass(frozen=True, slots=True)
class Told:
    """Somebody said that a step is committed."""

    role: str
    step: int
    by: str = "a command"
    content: str = ""  # what identifies its files; empty where that is not known


@dataclass(frozen=True, slots=True)
class Resumed:
    """A group of ranks read the newest commit, or a command looked for it: 0 where it found
    none."""

    role: str
    step: int


@dataclass(frozen=True, slots=True)
class Damaged:
    """A commit was found not to verify, and was passed over with words: for that one nobody
    promised more."""

    role: str
    step: int


@dataclass(frozen=True, slots=True)
class Published:
    """Somebody said that a chunk is published, and that no other publisher was there first."""

    chunk: int
    by: str = "a teacher"
    content: str = ""  # what identifies its bytes; empty where that is not known


@dataclass(frozen=True, slots=True)
class Repaired:
    """A damaged chunk was taken out of the store, to be published anew."""

    chunk: int


Event = Told | Resumed | Damaged | Published | Repaired


@dataclass(frozen=True, slots=True)
class Left:
    """What can be read at the end. A role or store of which nothing is known is left out."""

    # role -> step -> content, of all that verify
    commits: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    chunks: Mapping[int, str] | None = None  # number -> content


def violations(events: Iterable[Event], left: Left) -> list[str]:
    """Every broken promise, in words; none where all were kept."""
    broken: list[str] = []
    told: dict[str, dict[int, Told]] = {}
    published: dict[int, Published] = {}
    for event in events:
        match event:
            case Told():
                broken += _contradicted(event, told.setdefault(event.role, {}))
                told[event.role][event.step] = event
            case Resumed(role, step):
                newest = max(told.get(role, {}), default=0)
                if step < newest:
                    broken.append(
                        f"{role}: step {newest} was told committed, and the commit of step {step} "
                        "was read after that"
                    )
            case Damaged(role, step):
                told.get(role, {}).pop(step, None)
            case Published():
                broken += _republished(event, published.get(event.chunk))
                published[event.chunk] = event
            case Repaired(chunk):
                published.pop(chunk, None)
    return [*broken, *_lost(told, left), *_changed(published, left)]


def _contradicted(event: Told, before: Mapping[int, Told]) -> Iterator[str]:
    first = before.get(event.step)
    if first is not None:
        yield (
            f"{event.role}: step {event.step} was told committed twice, by {first.by} and by "
            f"{event.by}"
        )
        if first.content and event.content and first.content != event.content:
            yield (
                f"{event.role}: step {event.step} was told committed as {first.content} and as "
                f"{event.content}"
            )
    if event.step < max(before, default=0):
        yield f"{event.role}: step {event.step} was told committed after step {max(before)}"


def _republished(event: Published, first: Published | None) -> Iterator[str]:
    if first is not None:
        yield f"chunk {event.chunk} was published twice, by {first.by} and by {event.by}"
        if first.content and event.content and first.content != event.content:
            yield f"chunk {event.chunk} was published as {first.content} and as {event.content}"


def _lost(told: Mapping[str, Mapping[int, Told]], left: Left) -> Iterator[str]:
    for role, there in left.commits.items():
        newest = max(told.get(role, {}), default=0)
        if newest > max(there, default=0):
            yield (
                f"{role}: step {newest} was told committed, and the newest commit at the end is "
                f"of step {max(there, default=0)}"
            )
        for step in sorted(there.keys() & told.get(role, {}).keys()):
            content = told[role][step].content
            if content and content != there[step]:
                yield (
                    f"{role}: step {step} was told committed as {content}, and is {there[step]} "
                    "at the end"
                )


def _changed(published: Mapping[int, Published], left: Left) -> Iterator[str]:
    if left.chunks is None:
        return
    for chunk, event in published.items():
        found = left.chunks.get(chunk)
        if found is None:
            yield f"chunk {chunk} was published by {event.by}, and is gone at the end"
        elif event.content and event.content != found:
            yield f"chunk {chunk} was published as {event.content}, and is {found} at the end"


# What journals, places of checkpoints and stores say
# ------------------------------------------------------------------------------------


def told_in(*journals: Sequence[RunEvent]) -> Iterator[Event]:
    """The events of journals, each of which was over when the next was begun."""
    for number, rows in enumerate(journals, 1):
        by, last_steps = f"journal {number}", dict[str, int]()
        for row in rows:
            match row:
                case StartEvent():
                    by = f"journal {number}, attempt {row.attempt}"
                    yield from (Resumed(role, step) for role, step in row.committed_steps.items())
                case TrainEvent():
                    if (
                        row.step != last_steps.get(row.role, -1) + 1
                    ):  # its group has just begun, from a commit
                        yield Resumed(row.role, row.step - 1)
                    last_steps[row.role] = row.step
                case CheckpointEvent():
                    yield Told(row.role, row.step, by)
                case DamagedEvent():
                    yield Damaged(
                        row.role,
                        int(row.problem.removeprefix("step-")[: len(tag_of(0)) - len("step-")]),
                    )
                case ChunkEvent() if not row.duplicate:
                    yield Published(row.chunk, f"{by}, replica {row.replica}")
                case RepairEvent():
                    yield Repaired(row.chunk)


def commits_in(url: str) -> dict[int, str]:
    """Step -> attempt of every commit in a place whose every byte verifies."""
    blobs, found = Blobs(url), dict[int, str]()

    def look(commit: Commit) -> str:
        if not verify(blobs, commit, commit.files):
            found[commit.step] = commit.attempt
        return "looked at"  # so that the one before is, too

    with suppress(CheckpointError):  # what it says where it has chosen none
        choose(blobs, look)
    return found


def chunks_in(store: ChunkStore) -> dict[int, str]:
    """Number -> hash of every chunk in a store."""
    return {
        number: xxhash.xxh3_64_hexdigest(store.blobs.read(store.key(number)))
        for number in store.published()
    }


def require_kept(
    *journals: Sequence[RunEvent],
    checkpoints: Mapping[str, str] | None = None,
    store: ChunkStore | None = None,
) -> None:
    """Raise AssertionError unless all that the journals told is true of the checkpoints (role ->
    URL) and the store at the end."""
    left = Left(
        {role: commits_in(url) for role, url in (checkpoints or {}).items()},
        None if store is None else chunks_in(store),
    )
    broken = violations(told_in(*journals), left)
    assert not broken, "\n".join(broken)
