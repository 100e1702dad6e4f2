"""Synthetic logits and seeds for benchmarks, the same for the same arguments.

Shapes: T tokens, V vocabulary.
"""

import torch
from torch import Tensor

from stillhouse.logits import token_seeds


def power_law_logits(num_tokens: int, vocab_size: int, *, exponent: float) -> Tensor:
    """[T, V] logits with a language model's long tail: -exponent log(rank) plus N(0, 1), with each
    token's ranks in an order of their own."""
    generator = torch.Generator().manual_seed(round(10 * exponent))
    ranked_TV = -exponent * torch.arange(1, vocab_size + 1).log() + torch.randn(
        num_tokens, vocab_size, generator=generator
    )
    return torch.stack(
        [row_V[torch.randperm(vocab_size, generator=generator)] for row_V in ranked_TV]
    )


def seeds_of(num_tokens: int) -> Tensor:
    """[T] seeds of draws, one for each token."""
    return token_seeds(0, torch.zeros(num_tokens), torch.arange(num_tokens))
