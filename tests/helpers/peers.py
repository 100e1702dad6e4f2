"""What the tests of collectives call on the ranks: honest ranks that tell one another something,
and one that sends what it likes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from helpers.checkpoints import ORIGIN
from helpers.training import CPU, Alone, ListTracker, refuse_outage
from stillhouse.checkpoint.restore import restore
from stillhouse.checkpoint.writer import attempt_name
from stillhouse.cluster.collectives import gathered, outcomes, told
from stillhouse.cluster.heartbeat import StopRequest
from stillhouse.errors import StillhouseError, StoreUnavailable, StudentError
from stillhouse.student.job import TrainJob
from stillhouse.student.train import train


def exchange(value: Any) -> tuple[list[Any], Any]:
    """What all ranks gather, each with its own number, and what rank 0 tells them."""
    mine = {"rank": dist.get_rank(), "value": value}
    return gathered(mine), told(mine)


def fail_each_in_its_own_way() -> list[str]:
    """What every rank learns of the others' outcomes: rank 0 has an answer, and the others an
    error."""

    def call() -> str:
        if dist.get_rank() == 0:
            return "done"
        raise StoreUnavailable("rank 1's store is away: “später”")

    return [f"{type(each).__name__}: {each}" for each in outcomes(call)]


def gather_raw(data: bytes) -> None:
    """As a gathering rank of torch's or ours does: a length, then bytes. What comes back is not
    looked at."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)]))
    longest = max(int(length) for length in lengths)
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    dist.all_gather([torch.empty(longest, dtype=torch.uint8) for _ in lengths], mine)


def tell_raw(data: bytes) -> None:
    """As rank 0 does: a length, then bytes."""
    dist.broadcast(torch.tensor([len(data)]), src=0)
    dist.broadcast(torch.tensor(list(data), dtype=torch.uint8), src=0)


def gathers_from(data: bytes) -> str:
    """Rank 1 sends the bytes, and rank 0 gathers; its error."""
    return _refusal(lambda: gathered("honest")) if dist.get_rank() == 0 else _sent(gather_raw, data)


def is_told(data: bytes) -> str:
    """Rank 0 sends the bytes, and rank 1 wants to be told; its error."""
    return _refusal(lambda: told(None)) if dist.get_rank() == 1 else _sent(tell_raw, data)


def names_an_attempt(data: bytes) -> str:
    """The same, in the place where ranks agree on the name of their checkpoints."""
    return _refusal(attempt_name) if dist.get_rank() == 1 else _sent(tell_raw, data)


def restores(data: bytes, url: Path) -> str:
    """Rank 1 sends the bytes where ranks begin to look for a checkpoint; rank 0's error."""
    return _refusal(lambda: _restore(url)) if dist.get_rank() == 0 else _sent(gather_raw, data)


def too_long(num_bytes: int) -> list[str]:
    """The errors of messages of so many bytes in all, where one byte less is taken; none of them
    where it is one more."""
    rank, half = dist.get_rank(), "x" * (num_bytes // 2 - 2)  # and two quotes
    return [
        _refusal(lambda: gathered(half, most_bytes=num_bytes - 1)),
        _refusal(
            lambda: told("x" * (num_bytes - 2) if rank == 0 else None, most_bytes=num_bytes - 1)
        ),
        _refusal(lambda: gathered(half, most_bytes=num_bytes)),
        _refusal(lambda: told("x" * (num_bytes - 2) if rank == 0 else None, most_bytes=num_bytes)),
    ]


def train_without_objects(job: TrainJob) -> bool:
    """Train, where an object that a peer has pickled may not be opened, whoever asks for it."""
    with patch.object(
        distributed_c10d,
        "_tensor_to_object",
        side_effect=AssertionError("an object of a peer's was opened"),
    ):
        return train(job, device=CPU, journal=ListTracker(), link=Alone())


def train_until_rank_1_is_summoned(job: TrainJob) -> tuple[bool, list[tuple[str, object, object]]]:
    """Rank 1 alone knows from the beginning that the group shall leave; whether each trained to the
    end, and what it explained."""
    link = Alone(StopRequest("notice", 60.0, "a machine: “weg”") if dist.get_rank() == 1 else None)
    finished = train(job, device=CPU, journal=ListTracker(), link=link)
    return finished, [each for each in link.told if each[0] == "explain"]


def _restore(url: Path) -> None:
    def convert(_folder: Path, _out: Path) -> None:
        raise AssertionError("there is nothing to convert")

    with restore(str(url), origin=ORIGIN, convert=convert, tell=refuse_outage):
        pass


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except StudentError as error:
        return str(error)
    except StillhouseError as error:
        return f"another error: {error!r}"
    return ""


def _sent(send: Callable[[bytes], None], data: bytes) -> str:
    send(data)
    return ""
