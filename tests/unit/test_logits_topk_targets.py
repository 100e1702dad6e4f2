"""Targets that C makes whole: the entropy of any tail, labels wherever they are, weighted draws; no
operation of torch's on the logits is left. Without a compiler, torch makes them."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.logits import Backend, CompressedLogits, TargetSpec, token_seeds
from stillhouse.logits.topk import blockmax_cpu
from stillhouse.logits.topk.dispatch import Tokens, compress_in_blocks

IS_COMPILED = blockmax_cpu.compiled().make_targets is not None
LEAST = 1e-30 if IS_COMPILED else 1e-5  # entropies up to it are held to no digits


def whole_spec(vocab_size: int, k: int, *, temperature: float = 1.0) -> TargetSpec:
    return TargetSpec(
        vocab_size,
        k,
        num_draws=min(25, max(1, vocab_size // 256)),
        temperature=temperature,
        weighted=True,
        label_logprob=True,
        tail_entropy=True,
    )


def seeds(num_tokens: int) -> torch.Tensor:
    return token_seeds(7, torch.zeros(num_tokens, dtype=torch.int64), torch.arange(num_tokens))


def by_backend(
    backend: str, logits: torch.Tensor, spec: TargetSpec, *, labels: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of targets by one backend; labels are 0 unless given."""
    labels = torch.zeros(len(logits), dtype=torch.int64) if labels is None else labels
    found: CompressedLogits = compress_in_blocks(
        lambda rows: logits[rows],
        spec,
        Tokens.of(seeds(len(logits)), labels),
        block_tokens=len(logits),
        choose_backend=lambda *_, **__: Backend(backend, "it is asked for"),
    )
    return found.tensors


def exact_entropy(logits: torch.Tensor, kept_ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Float64 [T], with the greatest id's share apart: it may be all but 1e-20 of the tail."""
    tail = (logits.double() / temperature).scatter(1, kept_ids.long(), -math.inf)
    greatest, place = tail.max(dim=1, keepdim=True)
    below = (tail - greatest.nan_to_num(neginf=0.0)).scatter(1, place, -math.inf)
    masses = below.exp()
    beyond_one = masses.sum(dim=1)
    weighted = (masses * below.clamp(min=-1e4)).sum(dim=1)
    return beyond_one.log1p() - weighted / (1 + beyond_one)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_entropy_of_any_tail_is_within_1e5_of_float64(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([256, 257, 700, 2304, 11_000]))
    k = data.draw(st.sampled_from([0, 1, 8, 128, vocab_size - 1]))
    temperature = data.draw(st.sampled_from([1.0, 0.6, 30.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scale = data.draw(st.sampled_from([0.0, 0.1, 4.0, 20.0]))
    logits = scale * torch.randn(3, vocab_size, generator=generator)
    ruled_out = torch.rand(logits.shape, generator=generator)
    logits[ruled_out < data.draw(st.sampled_from([0.0, 0.5, 0.99]))] = -math.inf
    logits[:, vocab_size // 2] = data.draw(st.sampled_from([0.0, 60.0]))
    logits = logits.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    found = by_backend("native", logits, whole_spec(vocab_size, k, temperature=temperature))
    wanted = exact_entropy(logits, found["token_ids_TK"], temperature)
    torch.testing.assert_close(found["tail_entropy_T"].double(), wanted, rtol=1e-5, atol=LEAST)


def test_tails_of_one_id_of_none_of_equal_ones_and_far_from_what_is_kept() -> None:
    logits = torch.full((5, 700), -math.inf)
    logits[:, 3] = 2.0  # kept
    logits[1, 640] = -3.0
    logits[2, 10:310] = -1.5
    logits[3, 400:403] = -300.0
    logits[4] = 0.25
    entropies = by_backend("native", logits, whole_spec(700, 1))["tail_entropy_T"]
    wanted = [0.0, 0.0, math.log(300), math.log(3), math.log(699)]
    assert entropies.tolist() == pytest.approx(wanted, rel=1e-6, abs=0.0)


def test_the_entropy_of_a_tail_that_is_nearly_one_id_keeps_its_digits() -> None:
    """In float32 the sum of such a tail is 1: what is beyond is all of the entropy."""
    distances = [3.0, 12.0, 20.0, 40.0, 60.0]
    logits = torch.full((5, 2000), -math.inf)
    logits[:, 1] = 9.0  # kept
    logits[:, 130] = 5.0
    for row, distance in enumerate(distances):
        logits[row, 131 if row % 2 else 1999] = 5.0 - distance  # of the same block, or another
    entropies = by_backend("native", logits, whole_spec(2000, 1))["tail_entropy_T"]
    wanted = [
        math.log1p(math.exp(-distance)) + distance / (1 + math.exp(distance))
        for distance in distances
    ]
    assert entropies.tolist() == pytest.approx(wanted, rel=1e-5, abs=LEAST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_label_may_be_kept_or_in_the_tail_or_impossible(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(2)
    logits = (4 * torch.randn(1, 701, generator=random)).to(dtype).expand(6, 701).clone()
    logits[:, 7] = -math.inf
    first, last, *_, lowest = logits[0].argsort(descending=True)[[0, 7, 8, 699]].tolist()
    labels = torch.tensor([first, last, lowest, 0, 700, 7])
    found = by_backend("native", logits, whole_spec(701, 8), labels=labels)["label_logprob_T"]
    wanted = logits.double().log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    assert found[5] == -math.inf


class Operations(TorchDispatchMode):
    """The names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("dtype", "vocab_size"), [(torch.float32, 151_669), (torch.bfloat16, 151_936)]
)
def test_a_whole_target_of_a_real_vocabulary_is_made_in_c_as_torch_makes_it(
    dtype: torch.dtype, vocab_size: int
) -> None:
    random = torch.Generator().manual_seed(1)
    wide = (4 * torch.randn(8, vocab_size + 3, generator=random)).to(dtype)
    logits, labels = wide[::2, :vocab_size], torch.tensor([5, 0, vocab_size - 1, 77])
    spec = whole_spec(vocab_size, 8)
    with Operations() as operations:
        found = by_backend("native", logits, spec, labels=labels)
    assert not IS_COMPILED or not operations.names & {"exp", "gather", "topk", "cumsum"}

    wanted = by_backend("blockmax", logits, spec, labels=labels)
    assert list(found) == list(wanted)
    alike = found["tail_ids_TN"] == wanted["tail_ids_TN"]
    assert (~alike).sum() <= 1  # a draw within float32 rounding of the border between two ids
    for name in ("token_ids_TK", "logprobs_TK", "tail_logmass_T", "label_logprob_T"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-6)
    values = found["draw_logprobs_TN"][alike], wanted["draw_logprobs_TN"][alike]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)
    exact = exact_entropy(logits, found["token_ids_TK"], 1.0)
    torch.testing.assert_close(found["tail_entropy_T"].double(), exact, rtol=1e-5, atol=0.0)
