"""What ranks say to one another beside tensors: JSON, which is read and never run, whoever has
joined their group.

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
    """What rank 0 says, a JSON value; what the others pass is ignored. Raises StudentError where it
    is too long, or no JSON."""
    data = _packed(value) if dist.get_rank() == 0 else b""
    length = torch.tensor([len(data)], dtype=torch.int64, device=_device())
    dist.broadcast(length, src=0)
    num_bytes = int(length)
    _require_lengths([num_bytes], most_bytes)
    bytes_B = _bytes_of(data, num_bytes)
    dist.broadcast(bytes_B, src=0)
    return _unpacked(bytes_B, rank=0)


def gathered(value: Any, *, most_bytes: int = _MOST_BYTES) -> list[Any]:
    """Every rank's JSON value, by rank. Raises StudentError on every rank where they are too long,
    or one of them is no JSON."""
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
    """What each rank's call returned, a JSON value, or the StillhouseError that it raised, by
    rank."""
    try:
        own = {"value": call()}
    except StillhouseError as error:
        own = {"error": packed_error(error)}
    return [
        unpacked_error(each["error"]) if "error" in each else each["value"]
        for each in gathered(own)
    ]


def packed_error(error: StillhouseError) -> dict[str, str]:
    """An error of ours as a JSON value: its kind and its message."""
    return {"kind": type(error).__name__, "message": str(error)}


def unpacked_error(values: dict[str, str]) -> StillhouseError:
    """The error of ours that another rank has packed; one of a kind that is not known here is a
    StudentError."""
    return _kinds().get(values["kind"], StudentError)(values["message"])


def _kinds() -> dict[str, type[StillhouseError]]:
    kinds, waiting = {}, [StillhouseError]
    while waiting:
        kind = waiting.pop()
        kinds[kind.__name__] = kind
        waiting += kind.__subclasses__()
    return kinds


def _device() -> torch.device:
    """Where the group's backend wants its tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )


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
    bytes_B = torch.zeros(num_bytes, dtype=torch.uint8)
    bytes_B[: len(data)] = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else bytes_B[:0]
    )
    return bytes_B.to(_device())


def _require_lengths(nums_bytes: list[int], most_bytes: int) -> None:
    if min(nums_bytes) < 1 or sum(nums_bytes) > most_bytes:
        worst = min(nums_bytes) if min(nums_bytes) < 1 else max(nums_bytes)
        raise StudentError(
            f"rank {nums_bytes.index(worst)} wants to send {worst} bytes, of {sum(nums_bytes)} in "
            "all; "
            f"at least 1 of each rank and at most {most_bytes} in all are taken. {_ADVICE}"
        )


_ADVICE = (
    "Something else than Stillhouse has joined the ranks' group: give the cluster a network "
    "of its own, and start the run again."
)
