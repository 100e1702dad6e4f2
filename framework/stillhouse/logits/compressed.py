"""The target as a value: what is kept of a teacher's distribution, so that no kept probability is ever renormalised.

Shapes: T tokens, K exact head entries, N draws from the tail, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CompressedLogits:
    """T target distributions over V tokens, each as K exact entries and the mass of all the others.

    Every value is of softmax(logits / temperature) over the FULL vocabulary.
    """

    token_ids_TK: Tensor  # int32, by logprob descending, ties by id ascending
    logprobs_TK: Tensor  # float32, never renormalised
    tail_logmass_T: Tensor  # float32, log(1 - sum of the kept p); exactly -inf where K = V
    tail_ids_TN: Tensor  # int32, ascending, repeats allowed: each draw stands for 1/N of the tail's mass; N = 0: one bucket
    vocab_size: int
    temperature: float = 1.0

    @property
    def num_tokens(self) -> int:
        return self.token_ids_TK.shape[0]

    @property
    def k(self) -> int:
        return self.token_ids_TK.shape[1]

    @property
    def num_draws(self) -> int:
        return self.tail_ids_TN.shape[1]

    def map(self, change: Callable[[Tensor], Tensor]) -> "CompressedLogits":
        """The same target with `change` applied to each of its four tensors: a slice, a device, a pin."""
        return replace(
            self,
            token_ids_TK=change(self.token_ids_TK),
            logprobs_TK=change(self.logprobs_TK),
            tail_logmass_T=change(self.tail_logmass_T),
            tail_ids_TN=change(self.tail_ids_TN),
        )


def concatenate(parts: Sequence[CompressedLogits]) -> CompressedLogits:
    """One target of all the parts' tokens in order. The parts agree on K, N, vocabulary and temperature; there is at least one."""
    return CompressedLogits(
        torch.cat([part.token_ids_TK for part in parts]),
        torch.cat([part.logprobs_TK for part in parts]),
        torch.cat([part.tail_logmass_T for part in parts]),
        torch.cat([part.tail_ids_TN for part in parts]),
        vocab_size=parts[0].vocab_size,
        temperature=parts[0].temperature,
    )
