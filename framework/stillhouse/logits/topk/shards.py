"""Vocabulary-parallel `compress`: a head that is split over ranks, 8 K + 8 bytes a token from each.

Shapes: T tokens, S ids of a shard, C = S + 1 its columns (the last one is -inf and no id), K kept
entries, N draws, R shards, X entries or ids of a token, P packed numbers of a rank.

1. Each rank finds the top-k of its own ids, and the sum of exponentials of its others.
2. All ranks gather these.
3. Every rank merges them: the K greatest logits of all are among the K greatest of each shard, and
   sums of exponentials add.

So the result is `compress` of the whole logits on every rank: the same ids, bit for bit, and the
same values to the rounding of float32.

Draws need 20 bytes a token more from each rank, and 4 N or, weighted, 8 N + 16: the greatest logit
of its tail, the sum of its whole masses, and the draws that fall into its ids. Whole masses add in
any order, so the shards may have any borders.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse.errors import TeacherError
from stillhouse.logits.compressed import CompressedLogits
from stillhouse.logits.spec import TargetSpec
from stillhouse.logits.topk.dispatch import raw_topk
from stillhouse.logits.topk.draws import (
    half_uniform,
    or_lowest,
    others,
    whole_masses,
    whole_places,
)
from stillhouse.logits.topk.found import (
    RawTopK,
    entropy_sums,
    logprobs_at,
    normalise,
    peaks,
    tail_entropy,
)
from stillhouse.logits.topk.reference import checked_labels, checked_seeds

# The id of an entry that a shard of fewer than K ids lacks: behind all ids that tie with it.
_NO_ID = 2**31 - 1


class Shard(NamedTuple):
    """A rank's part of each token: its K greatest logits, and its other ids' sum of
    exponentials."""

    token_ids_TK: Tensor  # int32
    logits_TK: Tensor  # float32, before temperature
    rest_base_T: Tensor  # float32
    rest_sum_T: Tensor  # float32, of exp((logit - rest_base) / temperature)


def shard_topk(logits_TS: Tensor, *, first_id: int, k: int, temperature: float = 1.0) -> Shard:
    """The part of a shard that holds the ids from `first_id` on.

    It has exactly K entries: where S, which may be 0, is less, the others are -inf.
    """
    num_tokens, num_ids = logits_TS.shape
    if logits_TS.numel():
        raw = raw_topk(logits_TS, k=min(k, num_ids), temperature=temperature)
    else:
        nothing_T1 = torch.zeros((num_tokens, 1), device=logits_TS.device)
        none_T0, base_T = nothing_T1[:, :0], nothing_T1[:, 0] - torch.inf
        raw = RawTopK(none_T0.int(), none_T0, base_T, nothing_T1, block_ids=1)
    num_missing = k - raw.token_ids_TK.shape[1]
    return Shard(
        torch.nn.functional.pad(raw.token_ids_TK + first_id, (0, num_missing), value=_NO_ID),
        torch.nn.functional.pad(raw.logits_TK, (0, num_missing), value=-torch.inf),
        raw.rest_base_T,
        raw.rest_sums_TM.sum(dim=1, dtype=torch.float64).float(),
    )


def merge_shards(shards: Sequence[Shard], spec: TargetSpec) -> RawTopK:
    """The top-k of the whole vocabulary from those of its shards, in any order.

    The shards have disjoint ids, together all of `spec`, and the same tokens. Entries that are no
    longer kept join the rest, which is one block.
    """
    k, temperature = spec.k, spec.temperature

    # all entries by logit descending, ties by id ascending: the first K are kept
    ids_TX = torch.cat([shard.token_ids_TK for shard in shards], dim=1)
    logits_TX = torch.cat([shard.logits_TK for shard in shards], dim=1)
    by_id_TX = ids_TX.argsort(dim=1)
    by_logit_TX = logits_TX.gather(1, by_id_TX).argsort(dim=1, descending=True, stable=True)
    order_TX = by_id_TX.gather(1, by_logit_TX)
    kept_TK, lost_TX = order_TX[:, :k], logits_TX.gather(1, order_TX)[:, k:].double()

    # the rest: the shards' own, and the entries that are lost, in float64 relative to the top
    bases_TR = torch.stack([shard.rest_base_T for shard in shards], dim=1).double()
    sums_TR = torch.stack([shard.rest_sum_T for shard in shards], dim=1).double()
    top_T1 = torch.cat([logits_TX.double(), bases_TR], dim=1).amax(dim=1, keepdim=True)
    logs_TR = (bases_TR - top_T1) / temperature + sums_TR.log()
    logs_TX = torch.cat([(lost_TX - top_T1) / temperature, logs_TR], dim=1)
    log_rest_T1 = logs_TX.logsumexp(dim=1, keepdim=True)
    base_T1 = (top_T1 + temperature * log_rest_T1).float()
    sum_T1 = (log_rest_T1 - (base_T1.double() - top_T1) / temperature).exp()
    return RawTopK(
        ids_TX.gather(1, kept_TK),
        logits_TX.gather(1, kept_TK),
        base_T1[:, 0],
        sum_T1.where(log_rest_T1 != -torch.inf, 0.0).float(),
        block_ids=spec.vocab_size,
    )


@torch.no_grad()
def compress_shard(
    logits_TS: Tensor,
    spec: TargetSpec,
    *,
    first_id: int,
    seeds_T: Tensor | None = None,
    labels_T: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> CompressedLogits:
    """`compress` of [T, V] logits of which this rank holds the ids from `first_id` on.

    A collective: every rank of the group calls it for the same tokens, seeds and labels, with
    shards that together hold each id once, whatever their sizes. Every rank gets the same result,
    and raises the same errors, which are those of `compress`. Draws are those of
    `compress_reference`, id for id.
    """
    # the top-k of all ids, from those of every rank
    seeds_T = checked_seeds(seeds_T, logits_TS, spec=spec, vocab_size=spec.vocab_size)
    labels_T = checked_labels(labels_T, logits_TS, spec=spec)
    own = shard_topk(logits_TS, first_id=first_id, k=spec.k, temperature=spec.temperature)
    raw = merge_shards([_unpack(shard_TP) for shard_TP in _gathered(_pack(own), group)], spec)
    target, lse_T = normalise(raw, vocab_size=spec.vocab_size, temperature=spec.temperature)
    _require_distributions(lse_T, logits_TS, spec, first_id=first_id)
    if spec.num_draws or spec.label_logprob or spec.tail_entropy:
        logits_TC = torch.nn.functional.pad(logits_TS.float(), (0, 1), value=-torch.inf)
        shard = _Columns(logits_TC, first_id, lse_T, spec, group)
        return shard.completed(target, seeds_T=seeds_T, labels_T=labels_T)
    return target


@dataclass(frozen=True, slots=True)
class _Columns:
    """A rank's logits with one more column, which is -inf and no id, and what all ranks know."""

    logits_TC: Tensor  # float32, before temperature
    first_id: int
    lse_T: Tensor  # float64, of all ids
    spec: TargetSpec
    group: dist.ProcessGroup | None

    def completed(
        self, target: CompressedLogits, *, seeds_T: Tensor, labels_T: Tensor
    ) -> CompressedLogits:
        """The target with all that its spec holds beside the top-k. A collective."""
        # this rank's part of the tail, and the greatest logit of the whole tail
        spec = self.spec
        others_TC = others(self.logits_TC, self.of(target.token_ids_TK))
        others_TC[:, -1] = False
        tail_TC = (self.logits_TC / spec.temperature).masked_fill_(~others_TC, -torch.inf)
        peaks_T1 = _reduced(peaks(tail_TC), dist.ReduceOp.MAX, self.group)

        # draws
        if spec.num_draws:
            masses_TC = whole_masses(tail_TC, peaks_T1)
            if spec.weighted:
                masses_TC = _half_uniform(masses_TC, others_TC, self.group)
            draws_TN = self.draws(masses_TC, seeds_T)
            draws_TN = or_lowest(draws_TN, target.token_ids_TK, vocab_size=spec.vocab_size)
            target = replace(target, tail_ids_TN=draws_TN)
        if spec.weighted:
            target = replace(target, draw_logprobs_TN=self.logprobs(target.tail_ids_TN))

        # label and entropy
        if spec.label_logprob:
            target = replace(target, label_logprob_T=self.logprobs(labels_T[:, None])[:, 0])
        if spec.tail_entropy:
            sums_T2 = torch.stack(entropy_sums(tail_TC.double(), peaks_T1.double()), dim=1)
            sums_T2 = _reduced(sums_T2, dist.ReduceOp.SUM, self.group)
            target = replace(target, tail_entropy_T=tail_entropy(sums_T2[:, 0], sums_T2[:, 1]))
        return target

    def of(self, ids_TX: Tensor) -> Tensor:
        """int64 [T, X]: the columns of these ids; the last one for those of other shards."""
        last = self.logits_TC.shape[1] - 1
        columns_TX = ids_TX.long() - self.first_id
        return columns_TX.where((columns_TX >= 0) & (columns_TX < last), last)

    def logprobs(self, ids_TX: Tensor) -> Tensor:
        """float32 [T, X]: log p of these ids, on every rank."""
        found_TX = logprobs_at(
            self.logits_TC, self.of(ids_TX), lse_T=self.lse_T, temperature=self.spec.temperature
        )
        return _reduced(found_TX, dist.ReduceOp.MAX, self.group)

    def draws(self, masses_TC: Tensor, seeds_T: Tensor) -> Tensor:
        """int32 [T, N]: the draws of all shards, V in a row without mass.

        The shards are laid out in the order of ids, as `draw` lays out the whole.
        """
        # the mass of all shards, and of those before this one
        sums_T = masses_TC.sum(dim=1)
        first_T = torch.full_like(sums_T, self.first_id)
        gathered = _gathered(torch.stack([first_T, sums_T], dim=1), self.group)
        firsts_TR, sums_TR = torch.stack(gathered, dim=2).unbind(1)
        before_T1 = (sums_TR * (firsts_TR < self.first_id)).sum(dim=1, keepdim=True)
        all_T1 = sums_TR.sum(dim=1, keepdim=True)

        # the draws that fall into this shard, then those of all
        places_TN = whole_places(seeds_T, all_T1, num_draws=self.spec.num_draws) - before_T1
        found_TN = torch.searchsorted(masses_TC.cumsum(dim=1), places_TN, right=True)
        own_TN = (places_TN >= 0) & (places_TN < sums_T[:, None])
        own_ids_TN = (found_TN + self.first_id).where(own_TN, -1).int()
        draws_TN = _reduced(own_ids_TN, dist.ReduceOp.MAX, self.group)
        return draws_TN.where(draws_TN >= 0, self.spec.vocab_size)


def _require_distributions(
    lse_T: Tensor, logits_TS: Tensor, spec: TargetSpec, *, first_id: int
) -> None:
    """Raise TeacherError naming the first token whose log-sum-exp is NaN, on every rank."""
    wrong_T = lse_T.isnan()
    if not wrong_T.any():
        return
    token = int(wrong_T.int().argmax())
    row_S = logits_TS[token].float() / spec.temperature
    num_nan, num_infinite = int(row_S.isnan().sum()), int((row_S == torch.inf).sum())
    raise TeacherError(
        f"the logits of token {token} are no distribution: this shard, ids {first_id} to "
        f"{first_id + len(row_S) - 1}, has {num_nan} NaN and {num_infinite} +inf; wanted "
        "finite numbers, or -inf for ids that are ruled out, of which not all may be. Check "
        "the weights of the teacher on every rank"
    )


def _half_uniform(masses_TC: Tensor, others_TC: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`half_uniform` over the ids of all shards."""
    sums_T2 = torch.stack([masses_TC.sum(dim=1), others_TC.sum(dim=1)], dim=1)
    sums_T1, counts_T1 = _reduced(sums_T2, dist.ReduceOp.SUM, group).split(1, dim=1)
    return half_uniform(masses_TC, others_TC, sums_T1=sums_T1, counts_T1=counts_T1)


def _gathered(own_TX: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Every rank's tensor; no tokens are no collective."""
    gathered = [torch.empty_like(own_TX) for _ in range(dist.get_world_size(group))]
    if own_TX.shape[0]:
        dist.all_gather(gathered, own_TX, group=group)
    return gathered


def _reduced(
    own_TX: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> Tensor:
    """The reduction of every rank's tensor, in place; no tokens are no collective."""
    if own_TX.shape[0]:
        dist.all_reduce(own_TX, operation, group=group)
    return own_TX


def _pack(shard: Shard) -> Tensor:
    """int32 [T, 2 K + 2]: the bits of all four tensors."""
    floats_TP = torch.cat(
        [shard.logits_TK, shard.rest_base_T[:, None], shard.rest_sum_T[:, None]], dim=1
    )
    return torch.cat([shard.token_ids_TK, floats_TP.view(torch.int32)], dim=1)


def _unpack(packed_TP: Tensor) -> Shard:
    k = packed_TP.shape[1] // 2 - 1
    floats_TP = packed_TP[:, k:].contiguous().view(torch.float32)
    return Shard(packed_TP[:, :k], floats_TP[:, :k], floats_TP[:, k], floats_TP[:, k + 1])
