"""Two streams of a GPU: what is read of one block of rows runs under the product of the next."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

NUM_BUFFERS = 2  # of products: one is read while the other is made

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Streams:
    """Where products are made, and where they are read."""

    products: Any  # torch.cuda.Stream, as the next
    reads: Any
    on: Callable[[Any], AbstractContextManager[object]] = torch.cuda.stream

    @classmethod
    def of(cls, device: torch.device) -> Self | None:
        """The current stream and another; None where the device has one queue."""
        if device.type != "cuda":
            return None
        return cls(torch.cuda.current_stream(device), torch.cuda.Stream(device))


def in_turn(
    blocks: Sequence[slice],
    products_of: Callable[[slice], Tensor],
    read: Callable[[slice, Tensor], Part],
    *,
    streams: Streams | None,
) -> list[Part]:
    """Each block's products, read; with two streams, a read is queued beside the next product.

    With streams, `products_of` has NUM_BUFFERS buffers, which it fills in turn.
    """
    if streams is None:
        return [read(at, products_of(at)) for at in blocks]
    # Waits, all of them on the GPU: a read waits for its products; a product waits until the read
    # of the block that had its buffer has ended; what the caller queues later waits for all reads.
    # So neither stream's memory is reused before the other is done with it, without
    # `record_stream`, if the caller drops the parts when it has waited for what reads them.
    parts: list[Part] = []
    reads_ended: list[Any] = []
    try:
        for number, at in enumerate(blocks):
            if number >= NUM_BUFFERS:
                streams.products.wait_event(reads_ended[number - NUM_BUFFERS])
            products_TV = products_of(at)
            streams.reads.wait_stream(streams.products)
            with streams.on(streams.reads):
                parts.append(read(at, products_TV))
            reads_ended.append(streams.reads.record_event())
    finally:
        streams.products.wait_stream(streams.reads)
    return parts
