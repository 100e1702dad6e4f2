"""The background half of a checkpoint: training goes on, errors come back, and ranks need no
collective to commit."""

import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch

from helpers.calls import must_not_be_called
from helpers.checkpoints import ORIGIN, snapshot_of, write_files
from helpers.rangeserver import RangeServer, Refusal
from helpers.s3 import s3_environment
from stillhouse.checkpoint.choice import newest
from stillhouse.checkpoint.manifest import Commit, Origin, folder_of, part_of
from stillhouse.checkpoint.snapshot import HostMemory, OnDisk, Snapshot
from stillhouse.checkpoint.writer import CheckpointWriter
from stillhouse.errors import CheckpointError, StoreError
from stillhouse.retry import Patience
from stillhouse.store import StoreUnavailable

CPU = torch.device("cpu")


def writer(
    root: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    attempt: str = "a",
    keep: int = 2,
    origin: Origin = ORIGIN,
    on_commit: Callable[[Commit, float, float], None] = lambda *_: None,
) -> CheckpointWriter:
    return CheckpointWriter(
        str(root),
        origin=origin,
        attempt=attempt,
        rank=rank,
        world_size=world_size,
        keep=keep,
        on_commit=on_commit,
        on_delay=must_not_be_called,
    )


def until(condition: Callable[[], bool], *, within_s: float = 30.0) -> None:
    deadline = monotonic() + within_s
    while not condition():
        assert monotonic() < deadline, "not within its time"
        sleep(0.005)


def test_a_snapshot_becomes_a_commit_that_torch_can_load(tmp_path: Path) -> None:
    told = []
    with writer(tmp_path, on_commit=lambda *values: told.append(values)) as own:
        own.submit(snapshot_of(7, num_floats=100_000))
        assert own.wait()
    ((made, seconds, blocking_s),) = told
    assert newest(str(tmp_path)) == made
    assert seconds > 0
    assert blocking_s == pytest.approx(0.25, abs=0.1)
    loaded = torch.load(tmp_path / made.folder / "pp_rank_0_optim.pt", weights_only=True)
    assert loaded["step"] == 7
    assert torch.equal(loaded["weights"], torch.full((100_000,), 7.0))


def test_rank_0_commits_when_every_part_is_there_and_not_before(tmp_path: Path) -> None:
    ranks = [writer(tmp_path, rank=rank, world_size=3) for rank in range(3)]
    for own in (ranks[0], ranks[2]):
        own.submit(snapshot_of(5, rank=ranks.index(own)))
    assert ranks[2].wait()
    assert not ranks[0].wait(0.3)
    assert ranks[0].busy
    assert newest(str(tmp_path)) is None
    ranks[1].submit(snapshot_of(5, rank=1))
    assert all(own.wait() for own in ranks)
    found = newest(str(tmp_path))
    assert found is not None
    assert {f"pp_rank_{rank}_optim.pt" for rank in range(3)} | {
        part_of(rank, 3) for rank in range(3)
    } == found.files.keys()


def test_an_abandoned_checkpoint_is_torn_and_the_next_attempt_commits_the_same_step(
    tmp_path: Path,
) -> None:
    first = writer(tmp_path, world_size=2, attempt="first")
    first.submit(snapshot_of(5))
    until(lambda: (tmp_path / folder_of(5, "first") / part_of(0, 2)).exists())
    first.close()
    assert first.wait()
    assert newest(str(tmp_path)) is None
    with writer(tmp_path, attempt="second") as second:
        second.submit(snapshot_of(5))
        second.wait()
    found = newest(str(tmp_path))
    assert found is not None
    assert found.attempt == "second"
    assert not (tmp_path / folder_of(5, "first")).exists()


def test_old_commits_go_after_the_callback_and_a_training_in_progress_is_left_alone(
    tmp_path: Path,
) -> None:
    seen = []

    def look(made: Commit, _seconds: float, _blocking_s: float) -> None:
        seen.append((made.step, sorted(path.name for path in tmp_path.glob("*.json"))))

    # another rank of ours is a checkpoint ahead
    ahead = write_files(str(tmp_path), 99, attempt="a")
    with writer(tmp_path, keep=1, on_commit=look) as own:
        for step in (1, 2):
            own.submit(snapshot_of(step))
        own.wait()
    assert seen == [(1, ["step-00000001.json"]), (2, ["step-00000001.json", "step-00000002.json"])]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002.a",
        "step-00000002.json",
        ahead,
    ]


def test_an_error_comes_back_in_the_training_thread_once(tmp_path: Path) -> None:
    with writer(tmp_path, attempt="mine") as own:
        own.submit(snapshot_of(3))
        own.wait()
    with writer(tmp_path, attempt="theirs", origin=Origin(3, "cd" * 32, {})) as other:
        other.submit(snapshot_of(3))
        with pytest.raises(CheckpointError, match="of another training"):
            other.submit(snapshot_of(4))
        other.submit(snapshot_of(4))
        assert other.wait()
        assert not other.busy


def test_who_waits_for_a_store_that_stays_away_gets_its_words_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training alone would go on, and the checkpoint be tried again, for as long as it takes."""
    with RangeServer(refusal=Refusal(503, "SlowDown")).running() as server:
        for name, value in s3_environment(server.endpoint).items():
            monkeypatch.setenv(name, value)
        delays: list[tuple[int, str]] = []
        only: dict[str, Any] = {
            "origin": ORIGIN,
            "attempt": "a",
            "rank": 0,
            "world_size": 1,
            "keep": 1,
            "on_commit": must_not_be_called,
        }
        patience = Patience(request_s=0.05, end_after_s=0.5)
        with CheckpointWriter(
            "s3://bucket/root",
            **only,
            on_delay=lambda *delay: delays.append(delay),
            patience=patience,
        ) as own:
            own.submit(snapshot_of(3))
            until(lambda: len(delays) == 1)
            assert not own.wait(0.1)
            with pytest.raises(
                StoreUnavailable, match=r"too busy.*after 0 s of waiting it is given up"
            ):
                own.wait()
    assert delays[0][0] == 3


def test_an_error_is_told_to_who_only_asks(tmp_path: Path) -> None:
    """A rank with an error would otherwise look idle to itself and late to rank 0, for ever."""
    (tmp_path / "file").write_bytes(b"")
    with writer(tmp_path / "file") as own:
        own.submit(snapshot_of(3))
        with pytest.raises(StoreError, match="file"):
            until(lambda: not own.busy)


def test_nobody_is_told_of_a_commit_that_was_made_after_another_command_took_over(
    tmp_path: Path,
) -> None:
    """The owner is looked for before a commit and after it: in between a rank may have stood still
    for minutes."""

    def require_owner() -> None:
        if (tmp_path / "step-00000003.json").exists():
            raise CheckpointError("they belong to another command now")

    only: dict[str, Any] = {"origin": ORIGIN, "attempt": "a", "rank": 0, "world_size": 1, "keep": 1}
    with CheckpointWriter(
        str(tmp_path),
        **only,
        on_commit=must_not_be_called,
        on_delay=must_not_be_called,
        require_owner=require_owner,
    ) as own:
        own.submit(snapshot_of(3))
        with pytest.raises(CheckpointError, match="another command"):
            own.wait()


def test_an_error_of_the_callback_comes_back_too(tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the journal is full")

    with writer(tmp_path, on_commit=refuse) as own:
        own.submit(snapshot_of(3))
        with pytest.raises(OSError, match="the journal is full"):
            own.wait()
    assert newest(str(tmp_path)) is not None


def test_a_second_snapshot_waits_for_the_first_and_says_how_long(tmp_path: Path) -> None:
    gate, told = threading.Event(), []

    def hold(made: Commit, _seconds: float, blocking_s: float) -> None:
        told.append((made.step, blocking_s))
        gate.wait(30)

    with writer(tmp_path, on_commit=hold) as own:
        own.submit(snapshot_of(1))
        until(lambda: len(told) == 1)
        threading.Timer(0.5, gate.set).start()
        own.submit(snapshot_of(2))
        own.wait()
    assert told[1][0] == 2
    assert told[1][1] >= 0.25 + 0.4


def test_a_copy_shares_nothing_with_what_it_is_of_and_everything_within() -> None:
    weight, counts = torch.arange(6.0).reshape(2, 3), [1, 2]
    state = {
        "a": weight,
        "tied": weight,
        "slice": weight[1],
        "nested": [(weight.t(), {"n": counts})],
        "bf16": weight.bfloat16(),
    }
    copied, _ = HostMemory(CPU).snapshot_of("f", state)
    expected = weight.clone()
    weight.zero_()
    counts.append(3)
    assert torch.equal(copied["a"], expected)
    assert copied["tied"] is copied["a"]
    assert torch.equal(copied["slice"], expected[1])
    assert torch.equal(copied["nested"][0][0], expected.t())
    assert copied["nested"][0][1] == {"n": [1, 2]}
    assert copied["bf16"].dtype == torch.bfloat16


def test_memory_is_used_again_once_it_was_given_back_and_never_before() -> None:
    memory, state = HostMemory(CPU), {"a": torch.ones(5), "b": torch.ones(3)}
    first, release = memory.snapshot_of("f", state)
    state["a"].fill_(2)
    second, _ = memory.snapshot_of("f", state)
    assert torch.equal(first["a"], torch.ones(5))
    release()
    third, _ = memory.snapshot_of("f", state)
    assert third["a"].data_ptr() == first["a"].data_ptr()
    assert third["a"].data_ptr() != second["a"].data_ptr()
    assert torch.equal(third["a"], torch.full((5,), 2.0))


def test_a_tensor_that_grew_gets_memory_of_its_own() -> None:
    memory = HostMemory(CPU)
    _, release = memory.snapshot_of("f", {"a": torch.ones(5)})
    release()
    grown, _ = memory.snapshot_of("f", {"a": torch.ones(7)})
    assert torch.equal(grown["a"], torch.ones(7))


def test_the_writer_gives_the_memory_back(tmp_path: Path) -> None:
    released = threading.Event()
    with writer(tmp_path) as own:
        own.submit(Snapshot(1, {"x": torch.ones(1)}, 0.0, 0.0, released.set))
        own.wait()
    assert released.is_set()


def test_swapped_tensors_are_copied_on_their_disk(tmp_path: Path) -> None:
    path, values = tmp_path / "1.tensor.swp", torch.arange(8, dtype=torch.float32)
    path.write_bytes(values.numpy().tobytes())  # longer than the tensor, as DeepSpeed's are
    swapped, kept = torch.empty(0), torch.ones(2)
    on_disk = {id(swapped): OnDisk(path, 5)}
    copied, release = HostMemory(CPU).snapshot_of("f", [swapped, kept], on_disk=on_disk)
    path.write_bytes(bytes(32))
    assert list(tmp_path.iterdir()) == [path]
    release()
    assert copied[0].tolist() == values[:5].tolist()
    assert copied[1].tolist() == [1.0, 1.0]
