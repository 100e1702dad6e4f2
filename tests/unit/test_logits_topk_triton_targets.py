"""Whole targets by the Triton kernels, in their interpreter: weighted draws, labels and the tail's
entropy are the reference's, and so are the bytes of records."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.logits import (
    Backend,
    CompressedLogits,
    TargetSpec,
    compress_reference,
    encode,
    token_seeds,
)
from stillhouse.logits.head import AS_IT_IS, Curve
from stillhouse.logits.topk.blockmax_triton import compress_block
from stillhouse.logits.topk.dispatch import Tokens, compress_in_blocks
from stillhouse.logits.topk.streams import NUM_BUFFERS, Streams, in_turn


def random_logits(num_tokens: int, vocab_size: int, *, seed: int) -> torch.Tensor:
    return 4 * torch.randn(num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed))


def seeds(num_tokens: int) -> torch.Tensor:
    return token_seeds(2, torch.zeros(num_tokens), torch.arange(num_tokens))


def whole_spec(vocab_size: int, k: int, *, num_draws: int, temperature: float = 1.0) -> TargetSpec:
    """A target that holds everything a target may hold."""
    return TargetSpec(
        vocab_size,
        k,
        num_draws=num_draws,
        temperature=temperature,
        weighted=True,
        label_logprob=True,
        tail_entropy=True,
    )


def by_the_kernels(
    products_of: Callable[[Any], torch.Tensor],
    spec: TargetSpec,
    labels: torch.Tensor,
    *,
    block_tokens: int,
    curve: Curve = AS_IT_IS,
    streams: Streams | None = None,
) -> CompressedLogits:
    return compress_in_blocks(
        products_of,
        spec,
        Tokens.of(seeds(len(labels)), labels),
        block_tokens=block_tokens,
        curve=curve,
        choose_backend=lambda *_, **__: Backend("triton", "the interpreter's"),
        streams=streams,
    )


@pytest.mark.parametrize(
    ("k", "num_draws", "curve", "temperature", "dtype"),
    [
        (5, 11, Curve(), 1.0, torch.float32),
        (0, 9, Curve(scale=0.25), 0.7, torch.bfloat16),
        (6, 24, Curve(scale=2.0, softcap=9.0), 1.0, torch.float16),
        (3, 17, Curve(softcap=5.0), 3.0, torch.bfloat16),
        (4, 8, Curve(scale=-1.0), 1.0, torch.float32),
    ],
)
def test_all_that_a_target_may_hold_is_the_references(
    k: int, num_draws: int, curve: Curve, temperature: float, dtype: torch.dtype
) -> None:
    """Labels are kept, not kept, and of probability 0 where no cap lifts it."""
    products = torch.full((3, 1024), math.nan, dtype=dtype)[:, :1003]
    products.copy_(random_logits(3, 1003, seed=k))
    products[:, 300:420] = -math.inf if curve.scale > 0 else math.inf
    spec = whole_spec(1003, k, num_draws=num_draws, temperature=temperature)
    logits = curve.logits(products.float())
    labels = torch.tensor([int(logits[0].argmax()), 800, 310])
    found, doubtful = compress_block(products, curve, spec, seeds_T=seeds(3), labels_T=labels)
    wanted = compress_reference(logits, spec, seeds_T=seeds(3), labels_T=labels)
    assert not doubtful.any()
    assert list(found.tensors) == list(wanted.tensors)
    for name, value in wanted.tensors.items():
        torch.testing.assert_close(found.tensors[name], value, rtol=2e-6, atol=4e-6)
    assert found.label_logprob_T is not None
    assert math.isinf(found.label_logprob_T[2]) == (curve.softcap is None)


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_any_row_has_the_references_target_or_is_doubted(data: st.DataObject) -> None:
    """Ties at the least kept entry, ids that are ruled out, faint tails, blocks of few ids."""
    k, vocab_size = data.draw(st.integers(0, 7)), data.draw(st.sampled_from([400, 513, 1003]))
    logits = random_logits(1, vocab_size, seed=data.draw(st.integers(0, 10**6)))
    logits = logits.round() if data.draw(st.booleans()) else logits
    random = torch.rand(logits.shape, generator=torch.Generator().manual_seed(k))
    logits[random < data.draw(st.sampled_from([0.0, 0.5]))] = -math.inf
    logits[:, vocab_size // 2] = data.draw(st.sampled_from([0.0, 30.0, 90.0]))
    logits = logits.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    temperature = data.draw(st.sampled_from([1.0, 0.6, 2.5]))
    spec = whole_spec(vocab_size, k, num_draws=9, temperature=temperature)
    labels = torch.tensor([data.draw(st.integers(0, vocab_size - 1))])
    found, doubtful = compress_block(logits, AS_IT_IS, spec, seeds_T=seeds(1), labels_T=labels)
    if doubtful.any():
        return
    wanted = compress_reference(logits, spec, seeds_T=seeds(1), labels_T=labels)
    for name, value in wanted.tensors.items():
        torch.testing.assert_close(found.tensors[name], value, rtol=4e-6, atol=8e-6)


def test_weighted_draws_are_of_ids_without_mass_too() -> None:
    """Half of them are spread evenly over all ids that are not kept."""
    logits = torch.full((1, 1003), -math.inf)
    logits[:, ::25] = random_logits(1, 41, seed=1)
    spec, labels = whole_spec(1003, 6, num_draws=16), torch.tensor([3])
    found, doubtful = compress_block(logits, AS_IT_IS, spec, seeds_T=seeds(1), labels_T=labels)
    wanted = compress_reference(logits, spec, seeds_T=seeds(1), labels_T=labels)
    assert not doubtful.any()
    assert found.draw_logprobs_TN is not None
    assert 6 <= found.draw_logprobs_TN.isinf().sum() <= 10
    for name, value in wanted.tensors.items():
        torch.testing.assert_close(found.tensors[name], value, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize(
    "spec",
    [TargetSpec(1003, 8, num_draws=40), whole_spec(1003, 8, num_draws=24)],
    ids=["default", "whole"],
)
def test_records_are_the_references_byte_for_byte(spec: TargetSpec) -> None:
    """But for a value that lies at the edge between two codes: float32 sums in another order move
    it to the next code. Of 20,000 random rows by the filter in torch, one byte in 200,000 did."""
    logits, labels = random_logits(4, 1003, seed=9), torch.arange(4) * 7
    found, doubtful = compress_block(logits, AS_IT_IS, spec, seeds_T=seeds(4), labels_T=labels)
    wanted = compress_reference(
        logits, spec, seeds_T=seeds(4), labels_T=labels if spec.label_logprob else None
    )
    assert not doubtful.any()
    assert torch.equal(found.token_ids_TK, wanted.token_ids_TK)
    assert torch.equal(found.tail_ids_TN, wanted.tail_ids_TN)
    deviation = (encode(found, spec).int() - encode(wanted, spec).int()).abs()
    assert deviation.max() <= 1
    assert deviation.sum() <= 1


def test_rows_in_doubt_are_capped_in_float32_as_all_others_are() -> None:
    """In bfloat16 the cap would make a tie: 20.625 and 20.75 would both become 17.875."""
    products = random_logits(2, 1024, seed=0).bfloat16()
    products[0] = torch.tensor([20.625, 20.75]).repeat(512)
    curve, spec, labels = Curve(softcap=30.0), TargetSpec(1024, 3), seeds(2)
    _, doubtful = compress_block(products, curve, spec, seeds_T=labels, labels_T=labels)
    assert doubtful.tolist() == [True, False]
    found = by_the_kernels(lambda rows: products[rows], spec, labels, block_tokens=2, curve=curve)
    wanted = compress_reference(curve.logits(products.float()), spec)
    assert wanted.token_ids_TK[0].tolist() == [1, 3, 5]
    assert torch.equal(found.token_ids_TK, wanted.token_ids_TK)
    torch.testing.assert_close(found.logprobs_TK, wanted.logprobs_TK, rtol=2e-6, atol=4e-6)


class AtOnce:
    """A stream whose work is done when it is queued."""

    def wait_stream(self, _: object) -> None: ...

    def wait_event(self, _: object) -> None: ...

    def record_event(self) -> None: ...


def test_two_streams_give_the_targets_of_one_bit_for_bit() -> None:
    """A row in doubt, in the first block, is read again when all blocks are done."""
    logits = random_logits(3, 600, seed=4)
    logits[0] = 0.0
    spec, labels = whole_spec(600, 3, num_draws=4), torch.arange(3)
    buffers = deque(torch.full((1, 640), math.nan)[:, :600] for _ in range(NUM_BUFFERS))

    def products_of(rows: slice | torch.Tensor) -> torch.Tensor:
        buffers.rotate()
        return buffers[0][: len(logits[rows])].copy_(logits[rows])

    alone = by_the_kernels(lambda rows: logits[rows], spec, labels, block_tokens=1)
    streams = Streams(AtOnce(), AtOnce(), on=nullcontext)
    both = by_the_kernels(products_of, spec, labels, block_tokens=1, streams=streams)
    for name, value in alone.tensors.items():
        assert torch.equal(both.tensors[name], value)


@dataclass
class Queue:
    """A stream that holds its work back: tasks, and events that it waits for."""

    work: deque[Any] = field(default_factory=deque)

    def record_event(self) -> list[bool]:
        event: list[bool] = []
        self.work.append(lambda: event.append(True))
        return event

    def wait_event(self, event: list[bool]) -> None:
        self.work.append(event)

    def wait_stream(self, other: "Queue") -> None:
        self.wait_event(other.record_event())

    def step(self) -> bool:
        """Whether there was something to do."""
        if not self.work or self.work[0] == []:
            return False
        task = self.work.popleft()
        if callable(task):
            task()
        return True


@pytest.mark.parametrize("first", ["products", "reads"])
def test_no_block_is_read_before_it_is_made_or_after_its_buffer_is_made_anew(first: str) -> None:
    """Whichever stream runs as far as it can; a product can run before the last block's read."""
    products, reads, current, order = Queue(), Queue(), deque[Queue](), list[str]()
    buffers: list[slice | None] = [None] * NUM_BUFFERS

    @contextmanager
    def on(stream: Queue) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def make(at: slice) -> Any:
        number = at.start % NUM_BUFFERS

        def product() -> None:
            buffers[number] = at
            order.append(f"make {at.start}")

        products.work.append(product)
        return number

    def read(at: slice, number: Any) -> None:
        current[-1].work.append(lambda: order.append(f"read {at.start}, {buffers[number] == at}"))

    # queue five blocks and what follows them, then run
    in_turn([slice(i, i + 1) for i in range(5)], make, read, streams=Streams(products, reads, on))
    products.work.append(lambda: order.append("concatenate"))
    turns = [products, reads] if first == "products" else [reads, products]
    while any(queue.step() for queue in turns):
        pass
    assert [step for step in order if "read" in step] == [f"read {i}, True" for i in range(5)]
    assert order[-1] == "concatenate"
    assert (order[:2] == ["make 0", "make 1"]) == (first == "products")
