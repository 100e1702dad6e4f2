"""Vocabulary-parallel `compress`: a head that is split over ranks, 8 K + 8 bytes a token from each.

Shapes: T tokens, S ids of a shard, K kept entries, R shards, X entries of all shards, P packed
numbers of a rank.

1. Each rank finds the top-k of its own ids, and the sum of exponentials of its others.
2. All ranks gather these.
3. Every rank merges them: the K greatest logits of all are among the K greatest of each shard, and
   sums of exponentials add.

So the result is `compress` of the whole logits on every rank: the same ids, bit for bit, and the
same values to the rounding of float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse.errors import ConfigError, TeacherError
from stillhouse.logits.compressed import CompressedLogits
from stillhouse.logits.spec import TargetSpec
from stillhouse.logits.topk.dispatch import raw_topk
from stillhouse.logits.topk.found import RawTopK, normalise

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
    group: dist.ProcessGroup | None = None,
) -> CompressedLogits:
    """`compress` of [T, V] logits of which this rank holds the ids from `first_id` on.

    A collective: every rank of the group calls it for the same tokens, with shards that together
    hold each id once. Every rank gets the same result, and raises the same errors: TeacherError as
    `compress` does, and ConfigError for a spec with draws, which a split head does not make.
    """
    if spec.num_draws:
        raise ConfigError(
            f"{spec.num_draws} draws are asked for from a head that is split over ranks, which "
            "draws nothing; set num_draws to 0"
        )
    # this rank's top-k, then every rank's
    packed_TP = _pack(
        shard_topk(logits_TS, first_id=first_id, k=spec.k, temperature=spec.temperature)
    )
    gathered = [torch.empty_like(packed_TP) for _ in range(dist.get_world_size(group))]
    if logits_TS.shape[0]:
        dist.all_gather(gathered, packed_TP, group=group)

    # the top-k of all ids
    raw = merge_shards([_unpack(shard_TP) for shard_TP in gathered], spec)
    target, lse_T = normalise(raw, vocab_size=spec.vocab_size, temperature=spec.temperature)
    wrong_T = lse_T.isnan()
    if wrong_T.any():
        token = int(wrong_T.int().argmax())
        row_S = logits_TS[token].float() / spec.temperature
        num_nan, num_infinite = int(row_S.isnan().sum()), int((row_S == torch.inf).sum())
        raise TeacherError(
            f"the logits of token {token} are no distribution: this shard, ids {first_id} to "
            f"{first_id + len(row_S) - 1}, has {num_nan} NaN and {num_infinite} +inf; wanted "
            "finite numbers, or -inf for ids that are ruled out, of which not all may be. Check "
            "the weights of the teacher on every rank"
        )
    return target


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
