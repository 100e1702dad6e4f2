"""`densify` spreads the tail as a target says, `fidelity` measures what is kept and what the bytes
lose."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.targets import bucketed
from stillhouse.errors import ChunkError
from stillhouse.logits import (
    CompressedLogits,
    Fidelity,
    TargetSpec,
    compress,
    concatenate,
    densify,
    fidelity,
)

LOGITS = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def with_draws(c: CompressedLogits, draws: list[list[int]]) -> CompressedLogits:
    return replace(c, tail_ids_TN=torch.tensor(draws, dtype=torch.int32))


def test_a_dense_target_keeps_its_entries_and_shares_the_tail_evenly() -> None:
    exact = LOGITS.log_softmax(dim=1)
    dense = densify(compress(LOGITS, TargetSpec(12, 4)))
    kept = exact >= exact.topk(4, dim=1).values[:, -1:]
    assert (dense.dtype, dense.shape) == (torch.float32, (5, 12))
    torch.testing.assert_close(dense[kept], exact[kept])
    others = exact.masked_fill(kept, -math.inf).logsumexp(dim=1, keepdim=True) - math.log(8)
    torch.testing.assert_close(dense[~kept], others.expand(5, 12)[~kept])
    torch.testing.assert_close(dense.exp().sum(dim=1), torch.ones(5))


def test_a_dense_target_gives_each_draw_its_share_of_the_tail() -> None:
    c = CompressedLogits(
        torch.tensor([[2]], dtype=torch.int32),
        torch.tensor([0.25]).log()[None],
        torch.tensor([0.75]).log(),
        torch.tensor([[0, 3, 3]], dtype=torch.int32),
        vocab_size=5,
    )
    torch.testing.assert_close(densify(c).exp(), torch.tensor([[0.25, 0.0, 0.25, 0.5, 0.0]]))


def test_the_extremes_are_dense_distributions() -> None:
    torch.testing.assert_close(
        densify(compress(LOGITS, TargetSpec(12, 12))), LOGITS.log_softmax(dim=1)
    )
    torch.testing.assert_close(densify(bucketed(LOGITS, 0)).exp(), torch.full((5, 12), 1 / 12))
    only_draws = with_draws(bucketed(LOGITS[:1], 0), [[1, 1, 1, 7]])
    torch.testing.assert_close(densify(only_draws).exp()[0, [1, 7]], torch.tensor([0.75, 0.25]))
    assert densify(compress(LOGITS[:0], TargetSpec(12, 4))).shape == (0, 12)


def test_concatenated_parts_are_the_whole() -> None:
    whole, parts = (
        compress(LOGITS, TargetSpec(12, 4)),
        [compress(rows, TargetSpec(rows.shape[1], 4)) for rows in LOGITS.split(2)],
    )
    assert torch.equal(densify(concatenate(parts)), densify(whole))


def test_fidelity_is_the_kl_over_the_kept_entries_and_the_tail_whatever_their_order() -> None:
    exact = compress(LOGITS, TargetSpec(12, 4))
    other = compress(LOGITS + 0.1 * torch.sin(torch.arange(12.0)), TargetSpec(12, 12))
    rows = torch.arange(5)[:, None]
    shuffled_ids = exact.token_ids_TK.flip(1)
    logprobs = densify(other)[rows, shuffled_ids.long()]
    tail = torch.log1p(-logprobs.exp().sum(dim=1))
    decoded = replace(exact, token_ids_TK=shuffled_ids, logprobs_TK=logprobs, tail_logmass_T=tail)
    p = torch.cat([exact.logprobs_TK.flip(1), exact.tail_logmass_T[:, None]], dim=1).double()
    q = torch.cat([logprobs, tail[:, None]], dim=1).double()
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(dim=1)
    found = fidelity(exact, decoded)
    assert found.kept_mass == pytest.approx(
        exact.logprobs_TK.exp().sum(dim=1).mean().item(), rel=1e-6
    )
    assert found.codec_kl == pytest.approx(kl.mean().item(), rel=1e-9)
    assert found.worst_kl == pytest.approx(kl.max().item(), rel=1e-9)
    assert found.worst_kl > found.codec_kl > 0


def test_a_target_is_faithful_to_itself_even_where_probabilities_are_nought() -> None:
    impossible = LOGITS.clone()
    impossible[:, 3:] = -math.inf
    for c in (
        compress(impossible, TargetSpec(impossible.shape[1], 6)),
        compress(LOGITS, TargetSpec(12, 12)),
        bucketed(LOGITS, 0),
    ):
        assert (fidelity(c, c).codec_kl, fidelity(c, c).worst_kl) == (0.0, 0.0)


def test_of_no_tokens_nothing_is_lost() -> None:
    c = compress(LOGITS[:0], TargetSpec(12, 4))
    assert fidelity(c, c) == Fidelity(kept_mass=1.0, codec_kl=0.0, worst_kl=0.0)


def test_targets_that_keep_other_ids_are_refused_by_token() -> None:
    exact = compress(LOGITS, TargetSpec(12, 4))
    ids = exact.token_ids_TK.clone()
    ids[3, 0] = next(number for number in range(12) if number not in ids[3].tolist())
    with pytest.raises(ChunkError, match="token 3"):
        fidelity(exact, replace(exact, token_ids_TK=ids))
