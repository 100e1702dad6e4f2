"""Collectives for JSON values: broadcast and gather between ranks. No pickle, so that a process
that has joined the group cannot make a rank run code.

Every rank of the process group calls each of these, in the same order.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse.errors import StillhouseError, StudentError

_MOST_BYTES = 64 << 20  # of one message, or of all that are gathered


def told(value: Any, *, most_bytes: int = _MOST_BYTES) -> Any:
    """Broadcast: the JSON value of rank 0; those of the others are ignored. Raises StudentError
    where it is too long, or no JSON."""
    data = _packed(value) if dist.get_rank() == 0 else b""
    length = torch.tensor([len(data)], dtype=torch.int64, device=_device())
    dist.broadcast(length, src=0)
    num_bytes = int(length)
    _require_lengths([num_bytes], most_bytes)
    bytes_B = _bytes_of(data, num_bytes)
    dist.broadcast(bytes_B, src=0)
    return _unpacked(bytes_B, rank=0)


def gathered(value: Any, *, most_bytes: int = _MOST_BYTES) -> list[Any]:
    """Gather: every rank's JSON value, by rank. Raises StudentError on every rank where they are
    too long, or one of them is no JSON."""
    data, device, world_size = _packed(value), _device(), dist.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(lengths, torch.tensor([len(data)], dtype=torch.int64, device=device))
    nums_bytes = [int(length) for length in lengths]
    _require_lengths(nums_bytes, most_bytes)
    longest = max(nums_bytes)
    padded = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(world_size)]
    dist.all_gather(padded, _bytes_of(data, longest))
    return [
        _unpacked(bytes_B[:length], rank=rank)
        for rank, (bytes_B, length) in enumerate(zip(padded, nums_bytes, strict=True))
    ]


def outcomes(call: Callable[[], Any]) -> list[Any]:
    """Call, and gather the results by rank: the JSON value that a rank's call returned, or the
    StillhouseError that it raised."""
    try:
        own = {"value": call()}
    except StillhouseError as error:
        own = {"kind": type(error).__name__, "message": str(error)}
    # a kind that is unknown here is a StudentError
    kinds = _kinds()
    return [
        each["value"] if "value" in each else kinds.get(each["kind"], StudentError)(each["message"])
        for each in gathered(own)
    ]


def _kinds() -> dict[str, type[StillhouseError]]:
    """Every kind of error of ours, by name."""
    kinds, waiting = {}, [StillhouseError]
    while waiting:
        kind = waiting.pop()
        kinds[kind.__name__] = kind
        waiting += kind.__subclasses__()
    return kinds


def _device() -> torch.device:
    """The device on which the group's backend wants its tensors."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _packed(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _unpacked(bytes_B: Tensor, *, rank: int) -> Any:
    try:
        return json.loads(bytes_B.cpu().numpy().tobytes())
    except (ValueError, RecursionError):
        raise StudentError(
            f"rank {rank} sent {len(bytes_B)} bytes that are no JSON. {_ADVICE}"
        ) from None


def _bytes_of(data: bytes, num_bytes: int) -> Tensor:
    padded = bytearray(data) + bytes(num_bytes - len(data))
    return torch.frombuffer(padded, dtype=torch.uint8).to(_device())


def _require_lengths(nums_bytes: list[int], most_bytes: int) -> None:
    total = sum(nums_bytes)
    if min(nums_bytes) < 1 or total > most_bytes:
        worst = min(nums_bytes) if min(nums_bytes) < 1 else max(nums_bytes)
        raise StudentError(
            f"rank {nums_bytes.index(worst)} wants to send {worst} bytes, of {total} in all; "
            f"at least 1 of each rank and at most {most_bytes} in all are taken. {_ADVICE}"
        )


_ADVICE = (
    "Something else than Stillhouse has joined the ranks' group: give the cluster a network "
    "of its own, and start the run again."
)
