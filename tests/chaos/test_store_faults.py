"""What disks and object stores do to a run: bits flip, a disk fills, a server refuses. Nothing
damaged is trained on, and nothing is lost.

Checkpoints have tests of their own.
"""

import io
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import boto3
import numpy as np
import psutil
import pytest

from helpers.batches import next_batch
from helpers.calls import must_not_be_called
from helpers.chunks import make_chunk, small_recipe
from helpers.command import as_toml, stillhouse
from helpers.damage import flip_bit, leave_no_room, places, small_disk, with_flipped_bit
from helpers.faults import FaultyS3, everything, publications
from helpers.history import require_kept
from helpers.ranks import RankGroup
from helpers.training import ListTracker, refuse_outage, train_and_tell, train_through
from helpers.world import TinyWorld
from stillhouse import pipeline
from stillhouse.cluster.coordinator import Coordinator
from stillhouse.cluster.placement import placement
from stillhouse.cluster.processes import Secrets
from stillhouse.errors import ChunkError, RecipeError, StillhouseError
from stillhouse.pipeline import Plan
from stillhouse.pipeline.run_dir import changes_since, config_of
from stillhouse.pool.actor_backend import ActorBackend
from stillhouse.pool.dispatcher import Dispatcher
from stillhouse.retry import Patience
from stillhouse.sequences.corpus import Corpus
from stillhouse.sequences.packing import prepare_corpus
from stillhouse.sequences.stored import Work
from stillhouse.store import Chunk, ChunkStore, Consumer, consumers, verify_store
from stillhouse.student.loader import BatchReader
from stillhouse.teacher.actor import Ready, TeacherJob, publish_when_possible, spawn
from stillhouse.teacher.pool import comparison, limits_of
from stillhouse.tracking import (
    ChunkEvent,
    EndEvent,
    PoolEvent,
    RecoveryEvent,
    RepairEvent,
    StallEvent,
    TrainEvent,
    read_journal,
)

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(900)]

PATIENCE_S = 240.0
NUM_STEPS = 10
LOOKS = 6  # at a full disk
ONE_TEACHER = {"min_replicas": 1, "max_replicas": 1}
WINDOW_BYTES = 40_000  # a few chunks: teachers stay near their student
SHORT_STUDENT = {"max_steps": 30, "checkpoint_every_steps": 4}


def wait_until(
    condition: Callable[[], object], *, unless: Callable[[], bool] = lambda: False
) -> None:
    deadline = monotonic() + PATIENCE_S
    while not condition():
        assert monotonic() < deadline
        assert not unless()
        sleep(0.05)


def refusal(look: Callable[[], object]) -> str | None:
    """What Stillhouse says against it; None where it has nothing to say."""
    try:
        look()
    except StillhouseError as error:
        return str(error)
    return None


def same_rows(chunk: Chunk, other: Chunk) -> bool:
    pairs: Iterator[tuple[Any, Any]] = zip(
        (*chunk.sequences.arrays, chunk.targets_NB),
        (*other.sequences.arrays, other.targets_NB),
        strict=True,
    )
    return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


# ---- bits flip


def test_a_bit_flipped_anywhere_in_a_chunk_is_found_named_and_never_read(tmp_path: Path) -> None:
    recipe = small_recipe()
    store = ChunkStore.create(str(tmp_path), recipe)
    whole = make_chunk(recipe, 1)
    for number in (0, 1, 2):
        store.publish(make_chunk(recipe, number))
    path = tmp_path / store.key(1)
    data = path.read_bytes()
    rows = range(len(recipe.chunk_rows(1)))
    for place in places(len(data), how_many=150):
        path.write_bytes(with_flipped_bit(data, place))
        assert [
            finding.key for finding in verify_store(str(tmp_path)) if finding.problem is not None
        ] == [store.key(1)]
        with pytest.raises(ChunkError):
            store.fetch(1)
        for row in rows:  # a reader that wants one row may be lucky: then it reads what was written
            with suppress(ChunkError):
                assert same_rows(ChunkStore(store.url, recipe).fetch_rows(1, [row]), whole.row(row))


def test_a_bit_flipped_in_a_recipe_or_a_readers_place_is_found_and_named(tmp_path: Path) -> None:
    store = ChunkStore.create(str(tmp_path), small_recipe())
    reader = Consumer(
        name="a",
        global_batch_sequences=8,
        seed=0,
        window_chunks=2,
        total_steps=60,
        committed_step=12,
    )
    consumers.join(store, reader)
    recipe_path, reader_path = (
        tmp_path / store.folder / "recipe.json",
        tmp_path / store.folder / "readers" / "a.json",
    )
    recipe_data, reader_data = recipe_path.read_bytes(), reader_path.read_bytes()
    for place in range(len(recipe_data)):
        recipe_path.write_bytes(with_flipped_bit(recipe_data, place))
        assert [finding.key for finding in verify_store(store.url) if finding.problem] == [
            f"{store.folder}/recipe.json"
        ]
        with pytest.raises(RecipeError, match=r"recipe\.json"):
            ChunkStore.create(store.url, store.recipe)
    for place in range(len(reader_data)):
        reader_path.write_bytes(with_flipped_bit(reader_data, place))
        # while one is not understood, nothing is deleted
        assert consumers.registered(store) == (
            [],
            [f"{store.folder}/readers/a.json"],
        )


def test_a_bit_flipped_anywhere_in_a_corpus_is_refused_by_name_or_mended(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    plan = tiny_world.plan(tmp_path / "run")
    section = plan.config.corpus.model_copy(update={"max_documents": 12})

    def prepared() -> Corpus:
        return prepare_corpus(
            section, plan.tokenizer, tokenizer_digest="sha256:it", cache_dir=tmp_path / "cache"
        ).train

    corpus = prepared()
    wanted = corpus.rows(0, corpus.num_sequences)
    as_written = [
        array.copy() for array in (wanted.token_ids_SL, wanted.positions_SL, wanted.loss_mask_SL)
    ]
    sequences = Path(corpus.path)
    assert {path.name for path in sequences.parent.iterdir()} >= {
        "corpus.json",
        "train.arrow",
        "train.order.npy",
        "train.xxh3.npy",
    }

    def read() -> None:
        found = prepared()
        rows = found.rows(0, found.num_sequences)
        assert found == corpus
        for array, written in zip(
            (rows.token_ids_SL, rows.positions_SL, rows.loss_mask_SL), as_written, strict=True
        ):
            np.testing.assert_array_equal(array, written)

    refused = []
    for path in sorted(sequences.parent.iterdir()):
        for place in places(path.stat().st_size, how_many=100 if path == sequences else 5):
            flip_bit(path, place)
            words = refusal(read)
            if words is not None:
                assert str(path) in words
                assert f"remove {path.parent}" in words
                refused.append(path)
                flip_bit(path, place)
    assert set(refused) == {sequences}  # all else was made again
    assert len(refused) > 80


# ---- a disk is full


@dataclass(frozen=True)
class FullDisk:
    """A run whose store, journal and checkpoints were on one disk, which was full for a while in
    the middle of it."""

    plan: Plan  # its store and its run directory have moved to an ordinary disk since
    published_when_full: list[int]  # chunks, each time that somebody looked
    teacher_bytes: list[int]  # of memory that is the teacher's own, at the same moments
    leftovers: list[str]
    said: str  # on the terminal before there was room again


@pytest.fixture(scope="module")
def full_disk(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> FullDisk:
    folder, said, over = tmp_path_factory.mktemp("full"), io.StringIO(), threading.Event()
    with small_disk(folder / "disk", num_bytes=64 << 20) as disk:
        everything_on_it: dict[str, Any] = {
            "store": {"url": str(disk / "store"), "window_bytes": WINDOW_BYTES},
            "student": SHORT_STUDENT,
        }
        plan = tiny_world.plan(disk / "run", teacher=ONE_TEACHER, **everything_on_it)
        with ThreadPoolExecutor(1) as threads, redirect_stderr(said):
            watching = threads.submit(fill_and_watch, plan, disk / "ballast", said, over)
            try:
                pipeline.run(plan)
            finally:
                over.set()
            counts, memory, leftovers, words = watching.result(timeout=PATIENCE_S)
        for name in ("store", "run"):
            shutil.copytree(disk / name, folder / name)
    section = plan.config.store.model_copy(update={"url": str(folder / "store")})
    moved = replace(
        plan, config=plan.config.model_copy(update={"store": section}), run_dir=folder / "run"
    )
    checkpoints = {"student": moved.jobs[0].checkpoints}
    require_kept(
        read_journal(moved.run_dir / "journal.jsonl"),
        store=ChunkStore(section.url, plan.recipe),
        checkpoints=checkpoints,
    )
    return FullDisk(moved, counts[-LOOKS:], memory[-LOOKS:], leftovers, words)


def fill_and_watch(
    plan: Plan, ballast: Path, said: io.StringIO, over: threading.Event
) -> tuple[list[int], list[int], list[str], str]:
    """Once a step is trained, fill the disk; look until nothing comes any more and the terminal
    says why, then make room."""
    store, journal = ChunkStore(plan.config.store.url, plan.recipe), plan.run_dir / "journal.jsonl"
    counts: list[int] = []
    memory: list[int] = []
    wait_until(
        lambda: any(isinstance(row, TrainEvent) for row in read_journal(journal)),
        unless=over.is_set,
    )
    deadline = monotonic() + PATIENCE_S
    try:
        leave_no_room(ballast, journal)
        while (
            len(set(counts[-LOOKS:])) > 1
            or len(counts) < LOOKS
            or "No space left" not in said.getvalue()
        ):
            assert monotonic() < deadline
            assert not over.is_set()
            counts.append(len(store.published()))
            memory.append(memory_of_teachers())
            sleep(0.5)
        return counts, memory, [path.name for path in ballast.parent.rglob("*#*")], said.getvalue()
    finally:
        ballast.unlink()


def memory_of_teachers() -> int:
    """Bytes that are theirs alone, of all teachers that this session started."""
    num_bytes = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "".join(child.cmdline()[:1]).startswith("ray::_TeacherActor"):
                num_bytes += child.memory_full_info().uss
    return num_bytes


def test_teachers_wait_while_the_disk_is_full_and_their_memory_does_not_grow(
    full_disk: FullDisk,
) -> None:
    assert len(set(full_disk.published_when_full)) == 1
    assert 0 < full_disk.published_when_full[0] < len(full_disk.plan.chunks)
    assert min(full_disk.teacher_bytes) > 0
    assert max(full_disk.teacher_bytes) - min(full_disk.teacher_bytes) < 16 << 20
    assert full_disk.leftovers == []  # or every try would take away some of the room that is made


def test_once_there_is_room_every_chunk_comes_once_and_none_was_given_up(
    full_disk: FullDisk,
) -> None:
    plan = full_disk.plan
    rows = read_journal(plan.run_dir / "journal.jsonl")
    assert sorted(row.chunk for row in rows if isinstance(row, ChunkEvent)) == sorted(plan.chunks)
    assert not any(row.duplicate for row in rows if isinstance(row, ChunkEvent))
    assert {row.failures for row in rows if isinstance(row, PoolEvent)} == {0}
    assert ChunkStore(plan.config.store.url, plan.recipe).published() == set(plan.chunks)


def test_a_run_with_everything_on_a_full_disk_waits_says_so_and_ends_with_the_undisturbed_losses(
    full_disk: FullDisk, rank_groups: dict[int, RankGroup], tmp_path: Path
) -> None:
    plan = full_disk.plan
    rows = read_journal(plan.run_dir / "journal.jsonl")
    assert "journal.jsonl" in full_disk.said
    assert [row.outcome for row in rows if isinstance(row, EndEvent)] == ["done"]
    assert not any(isinstance(row, RecoveryEvent | StallEvent) for row in rows)
    assert (plan.run_dir / "report.html").is_file()
    undisturbed = rank_groups[1].call(
        train_and_tell, replace(plan.jobs[0], run_dir=tmp_path / "undisturbed")
    )[0]
    steps = [(row.step, row.loss, row.grad_norm) for row in rows if isinstance(row, TrainEvent)]
    assert steps == [(row.step, row.loss, row.grad_norm) for row in undisturbed]


# ---- a run directory and its store, damaged and repaired


def test_a_bit_flipped_anywhere_in_a_run_directory_is_refused_by_name(
    full_disk: FullDisk, tmp_path: Path
) -> None:
    plan = replace(full_disk.plan, run_dir=tmp_path / "run")
    shutil.copytree(full_disk.plan.run_dir, plan.run_dir)
    changes = partial(changes_since, plan.run_dir, config=plan.config, recipe=plan.recipe)
    assert changes() == []
    whole = config_of(plan.run_dir)
    journal = plan.run_dir / "journal.jsonl"
    rows = read_journal(journal)

    def num_refused(name: str, look: Callable[[], bool]) -> int:
        """Of 100 flips all over the file: each look at it raises with the file's name, or finds all
        that there was."""
        path = plan.run_dir / name
        data = path.read_bytes()
        looks: list[bool] = []
        for place in places(len(data) - 1, how_many=100):
            path.write_bytes(with_flipped_bit(data, place))
            words = refusal(lambda: looks.append(look()))
            assert words is None or name in words
        path.write_bytes(data)
        assert all(looks)
        return 100 - len(looks)

    # the others hit the space between its values
    assert num_refused("config.json", lambda: config_of(plan.run_dir) == whole) > 50
    assert num_refused("journal.jsonl", lambda: read_journal(journal) == rows) > 99
    # the others are named as differences
    assert num_refused("recipe.json", lambda: changes() != []) > 0


def test_repair_makes_exactly_the_damaged_chunks_again_to_the_same_bytes(
    full_disk: FullDisk, tmp_path: Path
) -> None:
    plan, url = full_disk.plan, str(tmp_path / "store")
    shutil.copytree(plan.config.store.url, url)
    store = ChunkStore(url, plan.recipe)
    paths = {number: Path(url) / store.key(number) for number in plan.chunks}
    before = {number: path.read_bytes() for number, path in paths.items()}
    first, second, absent, *_ = plan.chunks
    flip_bit(paths[first], 9)
    flip_bit(paths[second], -9)
    paths[absent].unlink()  # never produced: not for repair to make
    flip_bit(Path(url) / store.folder / "recipe.json", 30)

    named = stillhouse("store", "verify", url)
    assert named.code == 1
    assert f"{store.folder}/recipe.json: " in named.out
    outcome = stillhouse("store", "verify", url, "--repair", plan.run_dir, cache=tmp_path / "cache")
    assert outcome.code == 0, outcome
    for number in (first, second):
        assert f"{number:010d}.safetensors" in outcome.out
        assert f"chunk {number} made again" in outcome.out
    assert store.published() == set(plan.chunks) - {absent}
    assert all(paths[number].read_bytes() == before[number] for number in store.published())
    assert len(list(Path(url).rglob("quarantine/*"))) == 3
    assert stillhouse("store", "verify", url).code == 0
    again = stillhouse("store", "verify", url, "--repair", plan.run_dir, cache=tmp_path / "cache")
    assert again.code == 0
    assert "0 chunks were repaired" in again.out


def test_repair_refuses_another_recipe_and_names_the_difference(
    full_disk: FullDisk, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    config = tmp_path / "other.toml"
    config.write_text(as_toml(tiny_world.values | {"target": {"k": 9, "tail_draws": 12}}))
    url = full_disk.plan.config.store.url
    outcome = stillhouse("store", "verify", url, "--repair", config, cache=tiny_world.folder)
    assert outcome.code == 2
    assert "k (" in outcome.err
    assert "9 against 8" in outcome.err
    nothing = stillhouse(
        "store", "verify", str(tmp_path / "absent"), "--repair", config, cache=tiny_world.folder
    )
    assert nothing.code == 2
    assert "there is no recipe in" in nothing.err


# ---- readers meet a damaged chunk


def test_two_readers_that_report_the_same_chunk_both_get_the_repaired_one_and_go_on(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    plan = tiny_world.plan(
        tmp_path / "run",
        store={"url": str(tmp_path / "store")},
        teacher=ONE_TEACHER,
        student={"max_steps": NUM_STEPS},
    )
    tiny_world.fill_store(plan)
    store = ChunkStore(plan.config.store.url, plan.recipe)
    expected = batches_of(plan, on_bad_chunk=must_not_be_called)
    damaged = plan.chunks[3]
    path = Path(store.url) / store.key(damaged)
    whole = path.read_bytes()
    flip_bit(path, 20)  # in what every reader of the chunk reads

    coordinator, journal, done = Coordinator.create(), ListTracker(), threading.Event()
    reports: list[int] = []

    def report(number: int) -> None:
        reports.append(number)
        coordinator.report_bad_chunk(number)

    with ThreadPoolExecutor(3) as threads:
        teaching = threads.submit(
            pool_of(plan, coordinator, journal).run,
            readers=[],
            coordinator=coordinator,
            finished=done.is_set,
        )
        try:
            reading = [threads.submit(batches_of, plan, on_bad_chunk=report) for _ in range(2)]
            found = [each.result(timeout=PATIENCE_S) for each in reading]
        finally:
            done.set()
        teaching.result(timeout=PATIENCE_S)
    assert found == [expected, expected]
    assert reports == [damaged, damaged]
    assert [row.chunk for row in journal.rows if isinstance(row, ChunkEvent)] == [damaged]
    assert [row.chunk for row in journal.rows if isinstance(row, RepairEvent)] == [damaged]
    assert len(list(Path(store.url).rglob("quarantine/*"))) == 1
    assert path.read_bytes() == whole
    require_kept(journal.rows, store=store)


def pool_of(plan: Plan, coordinator: Coordinator, journal: ListTracker) -> Dispatcher[Work, Ready]:
    section = plan.config.teacher
    store = ChunkStore(plan.config.store.url, plan.recipe)
    job = TeacherJob(section, plan.recipe, store.url, threads=1, notices="off")
    crew: ActorBackend[Work, Ready] = ActorBackend(
        partial(
            spawn,
            job,
            where=placement(section, {"CPU": 4.0}),
            secrets=Secrets(None),
            coordinator=coordinator,
        )
    )
    return Dispatcher(
        crew,
        limits_of(section),
        compare=comparison(plan.recipe),
        store=store,
        order=plan.chunks,
        item_of=plan.item,
        window_chunks=100,
        journal=journal,
    )


def batches_of(
    plan: Plan, *, on_bad_chunk: Callable[[int], object]
) -> list[tuple[tuple[int, ...], list[list[int]]]]:
    """What a student of one rank is given: the sequences of each step, and the ids of their tokens
    and targets."""
    store = ChunkStore(plan.config.store.url, plan.recipe)
    whole: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "micro_batch": 8,
        "start": 0,
        "stop": NUM_STEPS,
        "prefetch": 2,
    }
    report: dict[str, Any] = {
        "on_bad_chunk": lambda number: on_bad_chunk(number) and None,
        "on_outage": refuse_outage,
    }
    with BatchReader(store, plan.order, **whole, **report) as reader:
        batches = [next_batch(reader) for _ in range(NUM_STEPS)]
    return [
        (
            batch.sequences,
            [
                part.tokens.token_ids_BL.flatten().tolist()
                + part.target.token_ids_TK.flatten().tolist()
                for part in batch.micro_batches
            ],
        )
        for batch in batches
    ]


# ---- an object store answers with errors, slowly, or not at all


def test_a_run_through_a_server_that_fails_and_is_slow_has_the_undisturbed_loss_curve(
    tiny_world: TinyWorld,
    rank_groups: dict[int, RankGroup],
    s3_endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = tiny_world.plan(
        tmp_path / "run", store={"url": str(tmp_path / "store")}, student={"max_steps": NUM_STEPS}
    )
    tiny_world.fill_store(plan)
    steady = plan.jobs[0]
    undisturbed = rank_groups[1].call(
        train_and_tell, replace(steady, run_dir=tmp_path / "undisturbed")
    )[0]

    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="storm")
    with FaultyS3(s3_endpoint) as s3, ThreadPoolExecutor(2) as threads:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
        s3.slow(everything, seconds=0.05)
        s3.refuse(
            lambda request: request.method == "GET" and request.chunk in plan.chunks[4:6],
            status=500,
            times=4,
        )
        s3.refuse(publications(), status=503, times=4)
        outage = s3.refuse(everything, status=503)
        job = replace(steady, store_url="s3://storm/casks", run_dir=tmp_path / "disturbed")
        teaching = threads.submit(publish_all, plan, job.store_url)
        learning = threads.submit(rank_groups[1].call, train_through, job, s3.url)
        wait_until(lambda: len(s3.refused) >= 6, unless=learning.done)
        s3.end(outage)
        disturbed = learning.result(timeout=PATIENCE_S)[0]
        teaching.result(timeout=PATIENCE_S)
        assert {status for status, _ in s3.refused} == {500, 503}
        assert len(s3.refused) >= 6 + 8
    assert [(row.step, row.loss, row.grad_norm) for row in disturbed] == [
        (row.step, row.loss, row.grad_norm) for row in undisturbed
    ]


def publish_all(plan: Plan, url: str) -> None:
    """Bring every chunk of the plan's store to another, as a teacher would."""
    source, target = (
        ChunkStore(plan.config.store.url, plan.recipe),
        ChunkStore.create(url, plan.recipe),
    )
    for number in plan.chunks:
        publish_when_possible(
            target,
            source.fetch(number),
            patience=Patience(end_after_s=PATIENCE_S),
            tell=refuse_outage,
        )
