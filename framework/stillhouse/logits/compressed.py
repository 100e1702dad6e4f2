"""The target as a value: what is kept of a teacher's distribution, so that no kept probability is
ever renormalised.

Shapes: T tokens, K exact head entries, N draws from the tail, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stillhouse.errors import ChunkError


@dataclass(frozen=True, slots=True)
class CompressedLogits:
    """T target distributions over V tokens, each as K exact entries and the mass of all the others.

    Every value is of softmax(logits / temperature) over the FULL vocabulary.
    """

    token_ids_TK: Tensor  # int32, by logprob descending, ties by id ascending
    logprobs_TK: Tensor  # float32, never renormalised
    tail_logmass_T: Tensor  # float32, log(1 - sum of the kept p); exactly -inf where K = V
    # int32, ascending, repeats allowed: each draw stands for 1/N of the tail's mass; N = 0: one
    # bucket
    tail_ids_TN: Tensor
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
        """The same target with `change` applied to each of its four tensors: a slice, a device, a
        pin."""
        return replace(
            self,
            token_ids_TK=change(self.token_ids_TK),
            logprobs_TK=change(self.logprobs_TK),
            tail_logmass_T=change(self.tail_logmass_T),
            tail_ids_TN=change(self.tail_ids_TN),
        )

    def with_rows(self, rows_R: Tensor, other: "CompressedLogits") -> "CompressedLogits":
        """The same target with the tokens of these numbers (int64 [R]) taken from another one,
        which has only them."""
        return replace(
            self,
            token_ids_TK=self.token_ids_TK.index_copy(0, rows_R, other.token_ids_TK),
            logprobs_TK=self.logprobs_TK.index_copy(0, rows_R, other.logprobs_TK),
            tail_logmass_T=self.tail_logmass_T.index_copy(0, rows_R, other.tail_logmass_T),
            tail_ids_TN=self.tail_ids_TN.index_copy(0, rows_R, other.tail_ids_TN),
        )

    def without_draws(self) -> "CompressedLogits":
        """The same target with its tail as one bucket."""
        return replace(self, tail_ids_TN=self.tail_ids_TN[:, :0])


def concatenate(parts: Iterable[CompressedLogits]) -> CompressedLogits:
    """One target of all the parts' tokens in order. The parts agree on K, N, vocabulary and
    temperature; there is at least one."""
    parts = list(parts)
    return CompressedLogits(
        torch.cat([part.token_ids_TK for part in parts]),
        torch.cat([part.logprobs_TK for part in parts]),
        torch.cat([part.tail_logmass_T for part in parts]),
        torch.cat([part.tail_ids_TN for part in parts]),
        vocab_size=parts[0].vocab_size,
        temperature=parts[0].temperature,
    )


def densify(c: CompressedLogits) -> Tensor:
    """float32 [T, V] log-probabilities: the kept entries as they are, the tail's mass spread evenly
    over the other ids, or over its draws.

    For tests and small vocabularies: its size is that of the logits.
    """
    kept_TK, draws_TN = c.token_ids_TK.long(), c.tail_ids_TN.long()
    shape = (c.num_tokens, c.vocab_size)
    if c.num_draws:
        shares_TV = c.logprobs_TK.new_zeros(shape).scatter_add_(
            1, draws_TN, c.logprobs_TK.new_ones(draws_TN.shape)
        )
    else:
        shares_TV = c.logprobs_TK.new_ones(shape).scatter_(1, kept_TK, 0.0)
    spread_TV = shares_TV.log() - shares_TV.sum(dim=1, keepdim=True).log()
    return (c.tail_logmass_T[:, None] + spread_TV).scatter(1, kept_TK, c.logprobs_TK)


def kept_mass(c: CompressedLogits) -> Tensor:
    """float64 [T]: the probability that a token's kept entries hold together."""
    return c.logprobs_TK.double().exp().sum(dim=1)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What a target keeps of its distribution, and what its bytes lose of that."""

    kept_mass: float  # mean over tokens of the probability of the kept entries
    codec_kl: float  # mean over tokens of KL(exact || decoded), in nats
    worst_kl: float  # the largest of them


def fidelity(exact: CompressedLogits, decoded: CompressedLogits) -> Fidelity:
    """Compare two targets of the same tokens, on one device, over their K + 1 buckets (the kept
    entries and the tail), in float64.

    Of no tokens, nothing is lost: (1, 0, 0). Raises ChunkError naming the first token for which the
    two keep different ids.
    """
    if exact.num_tokens == 0:
        return Fidelity(kept_mass=1.0, codec_kl=0.0, worst_kl=0.0)
    ids_TK, p_TX = _buckets(exact)
    decoded_ids_TK, q_TX = _buckets(decoded)
    other_T = (ids_TK != decoded_ids_TK).any(dim=1)
    if other_T.any():
        raise ChunkError(
            "the decoded target keeps other ids than the exact one at token "
            f"{int(other_T.int().argmax())}; encode it anew"
        )
    kl_T = torch.where(p_TX == -torch.inf, 0.0, p_TX.exp() * (p_TX - q_TX)).sum(dim=1)
    return Fidelity(
        kept_mass=float(kept_mass(exact).mean()),
        codec_kl=float(kl_T.mean()),
        worst_kl=float(kl_T.max()),
    )


def _buckets(c: CompressedLogits) -> tuple[Tensor, Tensor]:
    """The kept ids, ascending, and the float64 log-probabilities [T, K + 1] of these and of the
    tail."""
    ids_TK, order_TK = c.token_ids_TK.sort(dim=1)
    logprobs_TK = c.logprobs_TK.double().gather(1, order_TK)
    return ids_TK, torch.cat([logprobs_TK, c.tail_logmass_T.double()[:, None]], dim=1)
