"""A vocabulary split over ranks gives every rank the target of the whole: the ids bit for bit,
whatever the split."""

import math
import multiprocessing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.spawn import start_processes

from stillhouse.errors import TeacherError
from stillhouse.logits import (
    CompressedLogits,
    TargetSpec,
    compress,
    compress_reference,
    token_seeds,
)
from stillhouse.logits.topk.found import normalise
from stillhouse.logits.topk.shards import compress_shard, merge_shards, shard_topk

FIELDS = ("token_ids_TK", "logprobs_TK", "tail_logmass_T", "tail_ids_TN")


def random_logits(
    num_tokens: int, vocab_size: int, *, seed: int, step: float = 0.0
) -> torch.Tensor:
    logits = 4 * torch.randn(num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed))
    return (logits / step).round() * step if step else logits


def assert_same_target(found: CompressedLogits, wanted: CompressedLogits) -> None:
    assert torch.equal(found.token_ids_TK, wanted.token_ids_TK)
    torch.testing.assert_close(found.logprobs_TK, wanted.logprobs_TK, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.tail_logmass_T, wanted.tail_logmass_T, rtol=2e-6, atol=4e-6)
    assert (found.vocab_size, found.temperature) == (wanted.vocab_size, wanted.temperature)


def merged(logits: torch.Tensor, bounds: list[int], spec: TargetSpec) -> CompressedLogits:
    edges = [0, *bounds, logits.shape[1]]
    shards = [
        shard_topk(logits[:, start:stop], first_id=start, k=spec.k, temperature=spec.temperature)
        for start, stop in pairwise(edges)
    ]
    raw = merge_shards(shards[::-1], spec)
    return normalise(raw, vocab_size=spec.vocab_size, temperature=spec.temperature)[0]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_split_gives_the_target_of_the_whole(data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(1, 400))
    k = data.draw(st.one_of(st.integers(0, min(vocab_size, 12)), st.integers(0, vocab_size)))
    logits = random_logits(
        data.draw(st.integers(1, 4)),
        vocab_size,
        seed=data.draw(st.integers(0, 999)),
        step=data.draw(st.sampled_from([0, 4])),
    )
    excluded = torch.rand(logits.shape, generator=torch.Generator().manual_seed(k)) < data.draw(
        st.sampled_from([0.0, 0.9])
    )
    excluded[:, vocab_size // 2] = False
    logits = logits.masked_fill(excluded, -math.inf).to(
        data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    )
    bounds = sorted(data.draw(st.lists(st.integers(0, vocab_size), max_size=4)))
    temperature = data.draw(st.sampled_from([1.0, 0.7, 3.0]))
    # with k = 0 a spec has draws, which a merge does not look at
    spec = TargetSpec(vocab_size, k, num_draws=int(k == 0), temperature=temperature)
    wanted = compress_reference(logits, spec, seeds_T=torch.zeros(len(logits), dtype=torch.int64))
    assert_same_target(merged(logits, bounds, spec), wanted)


def test_a_tail_below_what_float32_can_hold_keeps_its_digits() -> None:
    logits = torch.zeros(2, 1001)
    logits[0, 500], logits[1, 3] = 100.0, 250.0
    tails = merged(logits, [400, 900], TargetSpec(1001, 1)).tail_logmass_T.tolist()
    assert tails == pytest.approx([math.log(1000) - 100, math.log(1000) - 250], rel=1e-6)


LOGITS = random_logits(5, 1003, seed=7, step=0.5)
BAD = LOGITS.index_put((torch.tensor([3]), torch.tensor([1002])), torch.tensor(math.nan))
# uneven: one shard has fewer ids than k, one has none
EDGES = {
    2: [0, 300, 1003],
    4: [0, 500, 503, 503, 1003],
}
K, TEMPERATURE = 16, 1.5


@dataclass(frozen=True)
class Case:
    """A target with draws, and one of the ways to split its logits over four ranks."""

    logits: torch.Tensor
    spec: TargetSpec
    edges: list[int]
    ranks: list[int]  # the shards are not in the order of the ranks
    seeds: torch.Tensor
    labels: torch.Tensor | None

    @classmethod
    def of(cls, number: int) -> "Case":
        random = Random(number)
        num_tokens, vocab_size = random.randint(1, 4), random.choice([2, 7, 130, 1003])
        k = random.randint(0, min(12, vocab_size - 1))
        logits = random_logits(num_tokens, vocab_size, seed=number, step=random.choice([0, 4]))
        excluded = torch.rand(logits.shape, generator=torch.Generator().manual_seed(number))
        logits[excluded < random.choice([0.0, 0.9])] = -math.inf
        logits[:, vocab_size // 2] = random.choice([0.0, 60.0])
        more = random.random() < 0.7
        spec = TargetSpec(
            vocab_size,
            k,
            num_draws=random.randint(1, 30),
            temperature=random.choice([1.0, 0.7, 3.0]),
            weighted=more,
            label_logprob=more,
            tail_entropy=more,
        )
        generator = torch.Generator().manual_seed(number)
        labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
        return cls(
            logits.to(random.choice([torch.float32, torch.bfloat16])),
            spec,
            [0, *sorted(random.choices(range(vocab_size + 1), k=3)), vocab_size],
            random.sample(range(4), 4),
            token_seeds(number, torch.zeros(num_tokens), torch.arange(num_tokens)),
            labels if more else None,
        )

    def on(self, rank: int) -> dict[str, torch.Tensor]:
        first, last = self.edges[self.ranks[rank] :][:2]
        return compress_shard(
            self.logits[:, first:last],
            self.spec,
            first_id=first,
            seeds_T=self.seeds,
            labels_T=self.labels,
        ).tensors


NUM_CASES = 30


def on_a_rank(rank: int, directory: str) -> None:
    """What each of four ranks finds, as a member of a group of four, and the first two as a group
    of two."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=4
    )
    pair = dist.new_group([0, 1])
    found: dict[str, Any] = {
        "4": compress_the_shard_of(rank, 4, LOGITS, None),
        "none": compress_the_shard_of(rank, 4, LOGITS[:0], None),
        "draws": [Case.of(number).on(rank) for number in range(NUM_CASES)],
    }
    if rank < 2:
        found["2"] = compress_the_shard_of(rank, 2, LOGITS.bfloat16(), pair)
    try:
        compress_the_shard_of(rank, 4, BAD, None)
    except TeacherError as error:
        found["error"] = str(error)
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def compress_the_shard_of(
    rank: int, world_size: int, logits: torch.Tensor, group: Any
) -> dict[str, torch.Tensor]:
    first, last = EDGES[world_size][rank : rank + 2]
    c = compress_shard(
        logits[:, first:last],
        TargetSpec(1003, K, temperature=TEMPERATURE),
        first_id=first,
        group=group,
    )
    return {name: getattr(c, name) for name in FIELDS}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload(["helpers.chunks"])  # one import of torch for all
    start_processes(on_a_rank, args=(str(directory),), nprocs=4, start_method="forkserver")
    return [torch.load(Path(directory) / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize(("world_size", "dtype"), [(2, torch.bfloat16), (4, torch.float32)])
def test_every_rank_has_the_target_of_the_whole(
    found: list[dict[str, Any]], world_size: int, dtype: torch.dtype
) -> None:
    wanted = compress(LOGITS.to(dtype), TargetSpec(LOGITS.shape[1], K, temperature=TEMPERATURE))
    for rank in range(world_size):
        target = CompressedLogits(
            **found[rank][str(world_size)], vocab_size=1003, temperature=TEMPERATURE
        )
        assert_same_target(target, wanted)
        for name in FIELDS:
            assert torch.equal(getattr(target, name), found[0][str(world_size)][name])


def test_every_rank_has_the_draws_of_the_whole(found: list[dict[str, Any]]) -> None:
    """Ids bit for bit, whatever the split; other values to the rounding of float32."""
    for number in range(NUM_CASES):
        case = Case.of(number)
        wanted = compress_reference(
            case.logits, case.spec, seeds_T=case.seeds, labels_T=case.labels
        ).tensors
        every = [found[rank]["draws"][number] for rank in range(4)]
        assert all(list(tensors) == list(wanted) for tensors in every)
        assert torch.equal(every[0]["tail_ids_TN"], wanted["tail_ids_TN"])
        for name, value in wanted.items():
            torch.testing.assert_close(every[0][name], value, rtol=2e-6, atol=4e-6)
            assert all(torch.equal(tensors[name], every[0][name]) for tensors in every)


def test_no_tokens_are_no_collective(found: list[dict[str, Any]]) -> None:
    for rank in range(4):
        assert found[rank]["none"]["token_ids_TK"].shape == (0, K)


def test_every_rank_refuses_a_row_that_one_of_them_spoils(found: list[dict[str, Any]]) -> None:
    for rank in range(4):
        assert (
            f"token 3 are no distribution: this shard, ids {EDGES[4][rank]} to "
            in found[rank]["error"]
        )
    assert "1 NaN and 0 +inf" in found[3]["error"]
    assert "0 NaN and 0 +inf" in found[0]["error"]
