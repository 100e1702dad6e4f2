"""What every fast path finds, and the one place where it becomes a target: so that all of them
round alike.

Shapes: T tokens, K kept entries, M blocks of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.logits.compressed import CompressedLogits


@dataclass(frozen=True, slots=True)
class RawTopK:
    """The K greatest logits of each row as they came, and what the other ids add to its sum of
    exponentials, block by block.

    A row with NaN has NaN among its numbers.
    """

    token_ids_TK: Tensor  # int32, by logit descending, ties by id ascending
    logits_TK: Tensor  # float32, before temperature
    # float32, a logit that keeps the sums in range: the greatest of the others, or of all
    rest_base_T: Tensor
    # float32, over the ids of a block that are not kept, of exp((logit - rest_base) / temperature)
    rest_sums_TM: Tensor
    block_ids: int  # of each block but the last one, which may have fewer


def normalise(
    raw: RawTopK, *, vocab_size: int, temperature: float
) -> tuple[CompressedLogits, Tensor]:
    """The target, without draws, and the log-sum-exp of logits / temperature: float32 [T], not
    finite where a row is no distribution.

    All is relative to the greatest logit and in float64, so neither a tail of e^-90 nor a kept mass
    of 1e-6 loses digits.
    """
    kept_TK, rest_base_T1 = raw.logits_TK.double(), raw.rest_base_T.double()[:, None]
    top_T1 = torch.cat([kept_TK, rest_base_T1], dim=1).amax(dim=1, keepdim=True)
    kept_TK = (kept_TK - top_T1) / temperature
    rest_T1 = (rest_base_T1 - top_T1) / temperature + raw.rest_sums_TM.sum(
        dim=1, keepdim=True, dtype=torch.float64
    ).log()
    log_sum_T1 = torch.cat([kept_TK, rest_T1], dim=1).logsumexp(dim=1, keepdim=True)
    target = CompressedLogits(
        raw.token_ids_TK,
        (kept_TK - log_sum_T1).float(),
        (rest_T1 - log_sum_T1)[:, 0].float(),
        raw.token_ids_TK.new_empty((raw.token_ids_TK.shape[0], 0)),
        vocab_size=vocab_size,
        temperature=temperature,
    )
    return target, (top_T1 / temperature + log_sum_T1)[:, 0].float()
