"""`RawTopK`: what every fast backend finds, and `normalise`, which makes it a target.

Shapes: T tokens, K kept entries, M blocks of a row.

All backends share `normalise`, or repeat its arithmetic (`targets.c`), so that they round alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.logits.compressed import CompressedLogits


@dataclass(frozen=True, slots=True)
class RawTopK:
    """The K greatest logits of each row, and the sums of exponentials of the other ids by block.

    A row of logits with NaN has NaN among its numbers here.
    """

    token_ids_TK: Tensor  # int32, by logit descending, ties by id ascending
    logits_TK: Tensor  # float32, before temperature
    # float32: a logit that keeps the sums in range, the greatest of the others or of all
    rest_base_T: Tensor
    # float32: for each block, the sum of exp((logit - rest_base) / temperature) over its other ids
    rest_sums_TM: Tensor
    block_ids: int  # ids in each block; the last one may have fewer


def normalise(
    raw: RawTopK, *, vocab_size: int, temperature: float
) -> tuple[CompressedLogits, Tensor]:
    """The target without draws, and the log-sum-exp of logits / temperature, float32 [T].

    The log-sum-exp is not finite where a row is no distribution. The arithmetic is in float64 and
    relative to the greatest logit, so neither a tail of e^-90 nor a kept mass of 1e-6 loses digits.
    """
    kept_TK, rest_base_T1 = raw.logits_TK.double(), raw.rest_base_T.double()[:, None]
    top_T1 = torch.cat([kept_TK, rest_base_T1], dim=1).amax(dim=1, keepdim=True)
    kept_TK = (kept_TK - top_T1) / temperature
    rest_sum_T1 = raw.rest_sums_TM.sum(dim=1, keepdim=True, dtype=torch.float64)
    rest_T1 = (rest_base_T1 - top_T1) / temperature + rest_sum_T1.log()
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
