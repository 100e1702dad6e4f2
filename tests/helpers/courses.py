"""Commands, ranks, teachers and readers on simulated time, over a simulated store or disk: one seed
is one course, with its faults.

Real are `RankWriter`, `checkpoint.publish`, `retain`, `choose` and `set_aside`, `ChunkStore`, the
registry of readers, `Retention`, the taking over, renewal and checking of ownership, and `Blobs`
and `atomic` below them. Simulated are the clock, the requests to an object store (`Bucket`), the
disk and its power cut (`powercut`), the training itself (a pause a step), the pool's dispatch of
work, and the watchdog (a command starts a new group when a rank is dead or shows no progress; ranks
of the old one may live on).

A request may be lost, be done with its answer lost, be done twice (as where obstore repeats one
whose answer was lost), or be done long after its client gave it up; a disk may be full. An actor
may stall for minutes, and be killed before any request. All that stops after a while, or with the
power cut, and then every run has to come to its end. What a store or a disk was told to keep does
not rot, and no answer is cut short without an error: other tests do that.
"""

import errno
import heapq
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, GenericError

from helpers.checkpoints import ORIGIN
from helpers.chunks import make_chunk, small_recipe
from helpers.powercut import After, Disk, Recorder, Unsynced
from stillhouse.atomic import Buffer, FileLayer
from stillhouse.checkpoint.choice import Choice, choose, set_aside
from stillhouse.checkpoint.fence import require_owner
from stillhouse.checkpoint.integrity import verify
from stillhouse.checkpoint.manifest import Commit, part_of, tag_of
from stillhouse.checkpoint.snapshot import Snapshot
from stillhouse.checkpoint.writer import RankWriter
from stillhouse.errors import CheckpointError, StillhouseError
from stillhouse.pipeline.holder import Holder
from stillhouse.pipeline.ownership import Lease, release, renew, take_over
from stillhouse.pool.retention import Retention
from stillhouse.retry import Patience, insist
from stillhouse.store import Chunk, ChunkStore, Consumer, StoreUnavailable
from stillhouse.store.consumers import commit, join, registered
from stillhouse.store.numbered import ChunkMissing
from stillhouse.store.object_layer import ObjectLayer
from stillhouse.store.object_store import Blobs

NUM_CHUNKS, STEPS_A_CHUNK, CHECKPOINT_EVERY = 3, 2, 2
TOTAL_STEPS = NUM_CHUNKS * STEPS_A_CHUNK
RECIPE = small_recipe(
    num_sequences=NUM_CHUNKS, chunk_sequences=1, sequence_length=3, vocab_size=50, k=2
)
# steps, after which nobody reads the chunk any more
DONE_AFTER = np.arange(1, NUM_CHUNKS + 1) * STEPS_A_CHUNK

LEASE = Lease(lease_s=30.0, renew_every_s=6.0, look_every_s=3.0)
PATIENCE = Patience(end_after_s=600.0)
SILENCE_S = 60.0  # of a group, before its command starts another
COURSE_S = 1500.0  # within which a course comes to its end
MOST_TURNS = 30_000

_Answer = TypeVar("_Answer")

_FAULTS = ("lost", "unanswered", "doubled", "late")
_CHUNK = re.compile(r".*/chunks/(\d{10})\.safetensors")
_MANIFEST = re.compile(r"step-(\d{8})\.json")
_OWNER = re.compile(r"owner-(\d{8})\.json")
_RANDOM_NAME = re.compile(r"probe-\w+")
_READER = re.compile(r".*/readers/(\w+)\.json")


class Broken(AssertionError):
    """A promise was broken."""


class Killed(BaseException):
    """What a killed actor's next request raises: nothing of it has an effect any more."""


@dataclass(eq=False)
class Actor:
    name: str
    call: Callable[[], None]
    gate: threading.Lock = field(default_factory=threading.Lock)
    killed: bool = False
    ended: bool = False
    error: BaseException | None = None
    look_began: float = 0.0  # of a pool: when it last began to read the registry of readers

    @property
    def alive(self) -> bool:
        return not (self.killed or self.ended)


class Schedule:
    """Actors in threads of which one alone runs at any moment: the one whose simulated time has
    come. No clock decides anything."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_turns = 0
        self.actors: list[Actor] = []
        self.failure: BaseException | None = None
        self._agenda: list[tuple[float, int, Actor | Callable[[], object]]] = []
        self._number = itertools.count()
        self._main = threading.Lock()
        self._main.acquire()
        self.running: Actor | None = None

    def clock(self) -> float:
        return self.now

    def start(self, name: str, call: Callable[[], None]) -> Actor:
        actor = Actor(name, call)
        actor.gate.acquire()
        self.actors.append(actor)
        threading.Thread(target=self._live, args=(actor,), daemon=True).start()
        self._push(self.now, actor)
        return actor

    def at(self, time: float, action: Callable[[], object]) -> None:
        """Do something that does not pause, at that time."""
        self._push(time, action)

    def pause(self, seconds: float) -> None:
        """Let the others go on for so long. Raises Killed in a killed actor."""
        me = self.running
        assert me is not None
        if not me.killed:
            self.num_turns += 1
            self._push(self.now + seconds, me)
            self._hand_over(me)
        if me.killed:
            raise Killed

    def kill(self, actor: Actor) -> None:
        actor.killed = True

    def kill_all(self) -> None:
        for actor in self.actors:
            actor.killed = True

    def fail(self, error: BaseException) -> None:
        """The course ends here."""
        self.failure = self.failure or error
        self.kill_all()

    def run(self) -> None:
        """Return when nobody has anything left to do. Raises the first failure."""
        self._hand_over(None)
        self._main.acquire()
        if self.failure is not None:
            raise self.failure

    def _push(self, time: float, what: Actor | Callable[[], object]) -> None:
        heapq.heappush(self._agenda, (time, next(self._number), what))

    def _live(self, actor: Actor) -> None:
        actor.gate.acquire()
        try:
            if not actor.killed:
                actor.call()
        except Killed:
            pass
        except (Broken, Exception) as error:
            actor.error = error
            if not actor.killed and not isinstance(error, StillhouseError):
                self.fail(error)
        actor.ended = True
        self._hand_over(None)

    def _hand_over(self, me: Actor | None) -> None:
        following = self._following()
        if following is me and me is not None:
            return
        (self._main if following is None else following.gate).release()
        if me is not None:
            me.gate.acquire()

    def _following(self) -> Actor | None:
        while self._agenda:
            time, _, what = heapq.heappop(self._agenda)
            if self.failure is None:
                self.now = max(self.now, time)
                if self.now > COURSE_S or self.num_turns > MOST_TURNS:
                    self.fail(Broken(f"no end after {self.now:.0f} s and {self.num_turns} turns"))
            self.running = what if isinstance(what, Actor) else None
            if isinstance(what, Actor):
                return what
            if self.failure is None:
                try:
                    what()
                except Broken as error:
                    self.fail(error)
        return None


@dataclass
class Run:
    """One run's place of checkpoints, and what is known to be true of it, whatever was answered to
    whom."""

    name: str
    world_size: int
    keep: int
    told: int = 0  # the newest step of which anybody was told that it is committed
    joined_at: float | None = None
    knows_it_joined: bool = False
    newest_owner: int = 0
    manifests: dict[int, str] = field(default_factory=dict)  # step -> attempt
    # (step, attempt) -> the newest owner as it became a commit
    owner_at: dict[tuple[int, str], int] = field(default_factory=dict)
    is_done: bool = False

    @property
    def newest_step(self) -> int:
        return max(self.manifests, default=0)

    def reader(self, step: int) -> Consumer:
        return Consumer(
            name=self.name,
            global_batch_sequences=1,
            seed=0,
            window_chunks=1,
            total_steps=TOTAL_STEPS,
            committed_step=step,
        )


@dataclass
class Group:
    """One attempt of a run's ranks."""

    attempt: str
    owner: int
    begins: int | None = None
    heard: float = 0.0
    ranks: list[Actor] = field(default_factory=list)


class World:
    """One course. Its parts can be replaced in a subclass, which is how a fault is planted."""

    def __init__(self, seed: int, *, folder: Path | None = None) -> None:
        """`folder`: where the stores lie in directories, of which the power is cut once; None for
        object stores."""
        self.random = Random(seed)
        self.schedule = Schedule()
        self.fault_rate = self.random.choice([0.0, 0.02, 0.1])
        self.stall_rate = self.random.choice([0.0, 0.01, 0.03])
        # no fault begins, and nobody is killed, from then on
        self.quiet_at = self.random.uniform(10.0, 120.0)
        self.runs = {
            name: Run(name, size, self.random.choice([1, 2])) for name, size in (("x", 2), ("y", 1))
        }
        self.published: dict[int, bytes] = {}
        # that were published, as somebody was told, and that nobody deletes
        self.told_chunks: set[int] = set()
        self.missed: set[int] = set()
        self.names = itertools.count(1)
        self.history: list[str] = []
        self.folder = folder
        self.recorder = None if folder is None else self.make_recorder(folder)
        self.buckets: dict[str, ObjectLayer] = {}
        self.after_the_cut = False

    # What a plant replaces.

    def make_bucket(self, place: str) -> "Bucket":
        return Bucket(self, place)

    def make_recorder(self, folder: Path) -> Recorder:
        return Recorder(folder)

    def make_writer(self, blobs: Blobs, **values: Any) -> RankWriter:
        return RankWriter(blobs, **values)

    def write(self, writer: RankWriter, snapshot: Snapshot, _run: Run) -> None:
        writer.write(snapshot, blocking_s=0.0)

    def set_aside(self, blobs: Blobs, chosen: Choice) -> None:
        set_aside(blobs, chosen.passed_over)

    # The course.

    def run(self) -> None:
        """Raises Broken, or what else no part should raise."""
        for run, begins_at in zip(
            self.runs.values(), (0.0, self.random.uniform(0.0, 30.0)), strict=True
        ):
            self.schedule.start(f"user of {run.name}", partial(self._user, run, begins_at))
        for _ in range(self.random.choice([0, 1, 2, 4])):
            self.schedule.at(self.random.uniform(0.0, self.quiet_at), self._strike)
        if self.random.random() < 0.5:  # the same command is given once more, elsewhere
            run = self.random.choice([*self.runs.values()])
            self.schedule.at(
                self.random.uniform(0.0, self.quiet_at), lambda: self._start_command(run)
            )
        if self.recorder is not None:
            self.schedule.at(self.random.uniform(1.0, 40.0), self._cut_power)
        self.schedule.run()
        self._check_end()

    def blobs(self, place: str) -> Blobs:
        if self.folder is None:
            if place not in self.buckets:
                self.buckets[place] = self.make_bucket(place)
            return Blobs(
                f"memory://{place}", objects=self.buckets[place], pause=self.schedule.pause
            )
        return Blobs(
            str(self.folder / place),
            files=Drive(self),
            objects=Reads(self),
            pause=self.schedule.pause,
        )

    def turn(self) -> None:
        """A request is on its way."""
        stalls = self.is_rough() and self.random.random() < self.stall_rate
        self.schedule.pause(
            self.random.uniform(10.0, 200.0) if stalls else self.random.expovariate(20.0)
        )

    def is_rough(self) -> bool:
        return self.schedule.now < self.quiet_at

    def draw_fault(self) -> str:
        return (
            self.random.choice(_FAULTS)
            if self.is_rough() and self.random.random() < self.fault_rate
            else ""
        )

    def _strike(self) -> None:
        """Somebody dies. With a command its ranks and teachers die, or outlive it."""
        alive = [
            actor
            for actor in self.schedule.actors
            if actor.alive and not actor.name.startswith("user")
        ]
        if alive:
            self.schedule.kill(self.random.choice(alive))

    def _cut_power(self) -> None:
        """Everybody is gone, and of the disk what was safe; the users give their commands again."""
        assert self.recorder is not None
        assert self.folder is not None
        self.schedule.kill_all()
        self.after_the_cut = True
        disk = Disk()
        for call in self.recorder.record:
            call(disk)
        after = After(self.folder.with_name(f"{self.folder.name}-after"))
        after.becomes(self.random.choice(sorted(disk.remains(), key=repr)))
        self.folder, self.recorder, self.quiet_at = after.root, None, self.schedule.now
        chunks = {
            int(path.stem): path.read_bytes()
            for path in after.root.glob("store/*/chunks/*.safetensors")
        }
        for number in self.told_chunks:
            if chunks.get(number) != self.published[number]:
                raise Broken(f"chunk {number} was published, and is gone")
        self.published = {
            number: data for number, data in self.published.items() if chunks.get(number) == data
        }
        joined = {
            reader.name
            for reader in registered(ChunkStore(str(after.root / "store"), RECIPE)).consumers
        }
        for run in self.runs.values():
            if run.name not in joined:
                if run.knows_it_joined:
                    raise Broken(f"{run.name} had joined the readers, and is none")
                run.joined_at = None
            run.manifests = {
                step: name
                for step, name in run.manifests.items()
                if (after.root / run.name / f"{tag_of(step)}.json").exists()
            }
            self.schedule.start(f"user of {run.name}", partial(self._user, run, 0.0))

    def _user(self, run: Run, begins_at: float) -> None:
        self.schedule.pause(begins_at)
        while not run.is_done:
            command = self._start_command(run)
            while command.alive and not run.is_done:
                self.schedule.pause(5.0)
            self.schedule.pause(self.random.uniform(0.0, 20.0))
        if all(each.is_done for each in self.runs.values()):
            # whoever was thought dead may still do harm until then
            self.schedule.at(self.schedule.now + 60.0, self.schedule.kill_all)

    def _start_command(self, run: Run) -> Actor:
        return self.schedule.start(f"command of {run.name}", partial(self._command, run))

    def _command(self, run: Run) -> None:
        """Own the checkpoints, join the readers, start teachers, and groups of ranks until one is
        done."""
        token = str(next(self.names))
        place, holder = (
            self.blobs(run.name),
            Holder("host", 1, "stillhouse run", 0.0, "/run", f"not here {token}", "", token),
        )
        pause, clock = self.schedule.pause, self.schedule.clock
        owner = take_over(place, holder, say=lambda _: None, lease=LEASE, clock=clock, pause=pause)
        self.note(f"{run.name}: owner {owner}")
        helpers = [
            self.schedule.start(f"renewal of {run.name}", partial(self._renew, run, owner, holder))
        ]
        group: Group | None = None
        try:
            store = ChunkStore.create(self.blobs("store"), RECIPE)
            join(store, run.reader(0))
            run.knows_it_joined = True
            helpers.append(self.schedule.start(f"pool of {run.name}", partial(self._pool, run)))
            while not run.is_done and all(helper.alive for helper in helpers):
                if group is None or self._is_lost(group):
                    self._leave(group)
                    group = self._start_group(run, owner)
                pause(2.0)
        finally:
            for helper in helpers:
                self.schedule.kill(helper)
            if not self.is_rough() or self.random.random() < 0.5:
                self._leave(group)
        release(place, owner, holder)

    def _renew(self, run: Run, owner: int, holder: Holder) -> None:
        place = self.blobs(run.name)
        for renewal in itertools.count(1):
            self.schedule.pause(LEASE.renew_every_s)
            try:
                renew(place, owner, holder, renewal=renewal)
            except StoreUnavailable:
                continue

    def _pool(self, run: Run) -> None:
        """Publish what is needed, look at the readers, delete, and publish anew what a reader
        misses."""
        me, store, seed = (
            self.schedule.running,
            ChunkStore(self.blobs("store"), RECIPE),
            next(self.names) % 3,
        )
        assert me is not None
        retention = Retention(
            store,
            own=[run.name],
            deletes=True,
            least_ahead=1,
            done_after=lambda _: DONE_AFTER,
            position=lambda _: None,
        )
        there = self.insist(store.published)
        me.look_began = self.schedule.now
        needed = self.insist(lambda: retention.begin(np.array(sorted(there), dtype=np.int64)))
        wanted = [int(number) for number in np.flatnonzero(needed) if number not in there]
        while True:
            for number in wanted:
                self.insist(partial(store.publish, chunk_of(number, seed)))
                retention.published(number)
                self.told_chunks |= {number} & self.published.keys()
            self.schedule.pause(3.0)
            me.look_began = self.schedule.now
            wanted = retention.look()
            wanted += [
                number
                for number in sorted(self.missed)
                if not self.insist(partial(store.is_whole, number))
            ]
            self.missed.clear()

    def _start_group(self, run: Run, owner: int) -> Group:
        group = Group(f"a{next(self.names)}", owner, heard=self.schedule.now)
        for rank in range(run.world_size):
            group.ranks.append(
                self.schedule.start(
                    f"rank {rank} of {run.name}", partial(self._rank, run, group, rank)
                )
            )
        return group

    def _is_lost(self, group: Group) -> bool:
        failed = [rank for rank in group.ranks if rank.killed or rank.error is not None]
        return bool(failed) or self.schedule.now - group.heard > SILENCE_S

    def _leave(self, group: Group | None) -> None:
        """Kill a group's ranks; one that cannot be reached lives on for a while."""
        for rank in group.ranks if group is not None else ():
            reached = not self.is_rough() or self.random.random() < 0.6
            self.schedule.at(
                self.schedule.now + (0.0 if reached else self.random.uniform(1.0, 300.0)),
                partial(self.schedule.kill, rank),
            )

    def _rank(self, run: Run, group: Group, rank: int) -> None:
        """Restore, then step, read and commit to the end."""
        blobs = self.blobs(run.name)
        if rank == 0:
            group.begins = self._restored(run, blobs)
            self._tell_place(run, group.begins)
        while group.begins is None:
            self.schedule.pause(1.0)
        store = ChunkStore(self.blobs("store"), RECIPE)
        writer = self.make_writer(
            blobs,
            template=Commit(0, group.attempt, run.world_size, ORIGIN, {}),
            rank=rank,
            keep=run.keep,
            on_commit=lambda made, _seconds, _blocking_s: self._on_commit(run, group, made),
            on_delay=lambda _step, _why: None,
            require_owner=lambda: require_owner(blobs, group.owner),
            clock=self.schedule.clock,
            pause=self.schedule.pause,
        )
        for step in range(group.begins, TOTAL_STEPS):
            if rank == 0:
                self._read(store, step // STEPS_A_CHUNK)
            self.schedule.pause(self.random.uniform(0.5, 2.0))
            group.heard = self.schedule.now
            if (step + 1) % CHECKPOINT_EVERY == 0:
                files = {f"pp_rank_{rank}_optim.pt": {"step": step + 1, "rank": rank}}
                self.write(
                    writer, Snapshot(step + 1, files, self.schedule.now, 0.0, lambda: None), run
                )
                group.heard = self.schedule.now
        if rank == 0:
            run.is_done = True

    def _restored(self, run: Run, blobs: Blobs) -> int:
        """The step that a group goes on from; checks the choice."""
        told = run.told
        try:
            chosen = choose(blobs, lambda made: verify(blobs, made, made.files), ask=self.insist)
        except CheckpointError as error:
            if self.after_the_cut:
                raise Broken(f"{run.name} cannot go on: {error}") from None
            # whoever was thought dead has deleted what was looked at: the next group finds
            # something newer
            raise
        self.insist(lambda: self.set_aside(blobs, chosen))
        step = chosen.commit.step if chosen.commit is not None else 0
        self.note(f"{run.name}: restored {step}")
        self._require_whole(run, chosen.commit)
        if step < told:
            raise Broken(
                f"{run.name} goes on from step {step}, and was told that {told} is committed"
            )
        return step

    def _read(self, store: ChunkStore, number: int) -> None:
        while True:
            try:
                return self._require_chunk(number, self.insist(lambda: store.fetch(number)))
            except ChunkMissing:
                self.missed.add(number)
                self.schedule.pause(2.0)

    def _on_commit(self, run: Run, group: Group, made: Commit) -> None:
        self.note(f"{run.name}: {group.attempt} is told that {made.step} is committed")
        newest = run.owner_at.get((made.step, made.attempt), 0)
        if newest > group.owner:
            raise Broken(
                f"owner {group.owner} of {run.name} is told of step {made.step}, which was "
                f"committed under owner {newest}"
            )
        run.told = max(run.told, made.step)
        self._tell_place(run, made.step)

    def _tell_place(self, run: Run, step: int) -> None:
        with suppress(StoreUnavailable):
            commit(ChunkStore(self.blobs("store"), RECIPE), run.reader(step))

    def insist(self, call: Callable[[], _Answer], /) -> _Answer:
        schedule = self.schedule
        return insist(
            call,
            patience=PATIENCE,
            tell=lambda *_: None,
            pause=schedule.pause,
            clock=schedule.clock,
        )

    # What is true, and what is promised of it.

    def note(self, what: str) -> None:
        self.history.append(f"{self.schedule.now:.6f} {_RANDOM_NAME.sub('probe', what)}")

    def put(self, place: str, key: str, data: bytes) -> None:
        """An object was created or replaced."""
        self.note(f"put {place}/{key}")
        run = self.runs.get(place)
        if match := _CHUNK.fullmatch(key):
            number = int(match[1])
            if self.published.get(number, data) != data:
                raise Broken(f"chunk {number} was changed")
            self.published[number] = data
        elif match := _READER.fullmatch(key):
            reader = self.runs[match[1]]
            reader.joined_at = self.schedule.now if reader.joined_at is None else reader.joined_at
        elif run is not None and (match := _OWNER.fullmatch(key)):
            run.newest_owner = max(run.newest_owner, int(match[1]))
        elif run is not None and (match := _MANIFEST.fullmatch(key)):
            step, attempt = int(match[1]), str(json.loads(data)["commit"]["attempt"])
            if run.manifests.get(step, attempt) != attempt:
                raise Broken(f"the commit of step {step} of {place} was replaced")
            run.manifests[step] = attempt
            run.owner_at[step, attempt] = run.newest_owner

    def asked_to_remove(self, key: str) -> None:
        """Somebody sends the request to delete an object."""
        if not (match := _CHUNK.fullmatch(key)):
            return
        self.told_chunks.discard(int(match[1]))
        began = self.schedule.running.look_began if self.schedule.running is not None else 0.0
        for run in self.runs.values():
            needs_it = run.newest_step < DONE_AFTER[int(match[1])]
            if needs_it and run.joined_at is not None and run.joined_at < began:
                raise Broken(
                    f"chunk {int(match[1])} is deleted, and {run.name} would go on from step "
                    f"{run.newest_step}"
                )

    def removed(self, place: str, key: str) -> None:
        """An object is not there any more."""
        self.note(f"removed {place}/{key}")
        if match := _CHUNK.fullmatch(key):
            self.published.pop(int(match[1]), None)
        elif match := _MANIFEST.fullmatch(key):
            self.runs[place].manifests.pop(int(match[1]), None)

    def _require_whole(self, run: Run, made: Commit | None) -> None:
        if made is not None:
            wanted = {
                name
                for rank in range(run.world_size)
                for name in (f"pp_rank_{rank}_optim.pt", part_of(rank, run.world_size))
            }
            if made.files.keys() != wanted:
                raise Broken(f"half of a commit was chosen: {sorted(made.files)}")

    def _require_chunk(self, number: int, found: Chunk) -> None:
        if not any(
            np.array_equal(found.targets_NB, chunk_of(number, seed).targets_NB) for seed in range(3)
        ):
            raise Broken(f"chunk {number} is not what anybody published")

    def _check_end(self) -> None:
        for run in self.runs.values():
            if run.newest_step != TOTAL_STEPS:
                raise Broken(f"{run.name} ended with step {run.newest_step} as its newest commit")


@cache
def chunk_of(number: int, seed: int) -> Chunk:
    """Publishers differ, so that a chunk that is replaced by another's can be seen."""
    return make_chunk(RECIPE, number, seed=seed)


class Bucket:
    """The requests to one object store, as `ObjectLayer` has them. Each arrives after a while,
    unless a fault strikes it."""

    def __init__(self, world: World, place: str) -> None:
        self._world, self._place = world, place
        self._objects: dict[str, tuple[bytes, datetime]] = {}

    def put(
        self,
        _store: Any,
        path: str,
        file: bytes,
        *,
        mode: str = "overwrite",
        use_multipart: bool | None = None,
    ) -> None:
        del use_multipart
        self._change(partial(self._put, path, bytes(file), mode))

    def open_writer(self, store: Any, path: str, **_options: int) -> "_Upload":  # noqa: ARG002
        self._ask()
        return _Upload(lambda data: self._change(partial(self._put, path, data, "overwrite")))

    def head(self, _store: Any, path: str) -> dict[str, Any]:
        self._ask()
        return self._meta(path)

    def get(self, _store: Any, path: str, *, options: Any = None) -> "_Found":
        self._ask()
        meta = self._meta(path)
        start, end = (options or {}).get("range", (0, meta["size"]))
        return _Found(meta, self._objects[path][0][start:end])

    def get_ranges(
        self, _store: Any, path: str, *, starts: list[int], ends: list[int], coalesce: int = 0
    ) -> list[bytes]:
        del coalesce
        self._ask()
        self._meta(path)
        return [self._objects[path][0][start:end] for start, end in zip(starts, ends, strict=True)]

    def list(
        self, _store: Any, prefix: str | None = None, *, chunk_size: int = 50
    ) -> list[list[dict[str, Any]]]:
        del chunk_size
        self._ask()
        return [[self._meta(path) for path in self._objects if path.startswith(f"{prefix}/")]]

    def list_with_delimiter(self, _store: Any, prefix: str | None = None) -> dict[str, Any]:
        assert prefix is None
        self._ask()
        folders = {path.split("/")[0]: None for path in self._objects if "/" in path}
        return {
            "objects": [self._meta(path) for path in self._objects if "/" not in path],
            "common_prefixes": [*folders],
        }

    def delete(self, _store: Any, paths: Any) -> None:
        for path in [paths] if isinstance(paths, str) else paths:
            self._world.asked_to_remove(path)
            self._change(partial(self._remove, path))

    def rename(self, _store: Any, from_: str, to: str) -> None:
        """A copy, and a deletion: an object store has no other way."""
        self._ask()
        self._meta(from_)
        data = self._objects[from_][0]
        self._change(partial(self._put, to, data, "overwrite"))
        self._change(partial(self._remove, from_))

    def _ask(self) -> None:
        self._world.turn()
        if self._world.draw_fault():
            raise GenericError("HTTP error: simulated")

    def _change(self, effect: Callable[[], None]) -> None:
        self._world.turn()
        fault = self._world.draw_fault()
        if not fault:
            return effect()
        if fault == "doubled":
            _unheard(effect)
            self._world.turn()
            return effect()
        if fault == "unanswered":
            _unheard(effect)
        if fault == "late":
            delay_s = self._world.random.uniform(1.0, 60.0)
            self._world.schedule.at(self._world.schedule.now + delay_s, partial(_unheard, effect))
        raise GenericError("HTTP error: simulated")

    def _put(self, path: str, data: bytes, mode: str) -> None:
        if mode == "create" and path in self._objects:
            raise AlreadyExistsError(path)
        self._objects[path] = data, datetime.fromtimestamp(self._world.schedule.now, tz=UTC)
        self._world.put(self._place, path, data)

    def _remove(self, path: str) -> None:
        if self._objects.pop(path, None) is not None:
            self._world.removed(self._place, path)

    def _meta(self, path: str) -> dict[str, Any]:
        if path not in self._objects:
            raise FileNotFoundError(path)
        data, modified = self._objects[path]
        return {"path": path, "size": len(data), "last_modified": modified}


@dataclass
class _Found:
    meta: dict[str, Any]
    data: bytes

    def bytes(self) -> bytes:
        return self.data

    def stream(self, *, min_chunk_size: int) -> Iterable[Buffer]:
        del min_chunk_size
        return (self.data,)


class _Upload:
    def __init__(self, finish: Callable[[bytes], None]) -> None:
        self._finish, self._data = finish, bytearray()

    def write(self, data: bytes) -> None:
        self._data += data

    def close(self) -> None:
        self._finish(bytes(self._data))

    def __exit__(self, *_: object) -> None:
        """It is given up: nothing of it is there."""


def _unheard(effect: Callable[[], None]) -> None:
    with suppress(AlreadyExistsError, FileNotFoundError):
        effect()


class Drive:
    """A disk's calls, each after a while; some are refused for want of room. Every file that is
    there is told to the world."""

    def __init__(self, world: World) -> None:
        self._world, self._root = world, world.folder
        self._files: FileLayer = world.recorder or Unsynced()

    def open(self, path: Path, flags: int, mode: int) -> int:
        self._turn(may_be_full=True)
        return self._files.open(path, flags, mode)

    def write(self, descriptor: int, data: Buffer) -> None:
        # nothing can be seen of it before the file has its name
        self._files.write(descriptor, data)

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        self._files.truncate(descriptor, num_bytes)

    def sync(self, descriptor: int) -> None:
        self._turn(may_be_full=True)
        self._files.sync(descriptor)

    def sync_directory(self, path: Path) -> None:
        self._turn()
        self._files.sync_directory(path)

    def link(self, source: Path, destination: Path) -> None:
        self._turn()
        self._files.link(source, destination)
        self._put(destination)

    def rename(self, source: Path, destination: Path) -> None:
        self._turn()
        self._files.rename(source, destination)
        if "#" not in source.name:
            self._world.removed(*self._key(source))
        self._put(destination)

    def unlink(self, path: Path) -> None:
        self._world.asked_to_remove(self._key(path)[1])
        self._turn()
        self._files.unlink(path)
        self._world.removed(*self._key(path))

    def mkdir(self, path: Path, mode: int) -> None:
        self._turn()
        self._files.mkdir(path, mode)

    def rmdir(self, path: Path) -> None:
        self._turn()
        self._files.rmdir(path)

    def _turn(self, *, may_be_full: bool = False) -> None:
        self._world.turn()
        if may_be_full and self._world.draw_fault():
            raise OSError(errno.ENOSPC, "simulated")

    def _put(self, path: Path) -> None:
        self._world.put(*self._key(path), path.read_bytes())

    def _key(self, path: Path) -> tuple[str, str]:
        assert self._root is not None
        place, _, key = path.relative_to(self._root).as_posix().partition("/")
        return place, key


class Reads:
    """What a directory is asked by way of obstore, each after a while."""

    def __init__(self, world: World) -> None:
        self._turn = world.turn

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._turn()
            return getattr(obstore, name)(*arguments, **options)

        return call
