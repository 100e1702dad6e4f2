"""A divergence: the squared Hellinger distance over the kept entries and one bucket for the tail.

Shapes: T tokens, K1 = K + 1 buckets.
"""

from torch import Tensor

from stillhouse.losses.divergences import Divergence


def _squared_hellinger(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
    return 1.0 - (0.5 * (logp_TK1 + logq_TK1)).exp().sum(dim=-1)


squared_hellinger = Divergence(_squared_hellinger)
