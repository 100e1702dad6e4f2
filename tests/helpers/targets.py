"""Targets for tests that look at the kept entries and the tail's mass alone."""

from collections.abc import Callable

import torch

from stillhouse.logits import CompressedLogits, TargetSpec, compress


def bucketed(
    logits: torch.Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    by: Callable[..., CompressedLogits] = compress,
) -> CompressedLogits:
    """K entries and one bucket for the tail. K may be 0: a spec without entries needs a draw, which
    is taken away again."""
    spec = TargetSpec(logits.shape[1], k, num_draws=int(k == 0), temperature=temperature)
    seeds_T = torch.zeros(len(logits), dtype=torch.int64)
    return by(logits, spec, seeds_T=seeds_T).without_draws()
