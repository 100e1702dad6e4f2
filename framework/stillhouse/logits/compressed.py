"""`CompressedLogits`: targets as a value, and what can be computed from it.

Shapes: T tokens, K exact head entries, N draws from the tail, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import ChunkError

_TENSORS = (
    "token_ids_TK",
    "logprobs_TK",
    "tail_logmass_T",
    "tail_ids_TN",
    "draw_logprobs_TN",
    "label_logprob_T",
    "tail_entropy_T",
)


@dataclass(frozen=True, slots=True)
class CompressedLogits:
    """T target distributions over V ids: K exact entries, the mass of the tail, N draws from it.

    Every value is of softmax(logits / temperature) over the FULL vocabulary; no kept probability is
    renormalised. All tensors are on one device.
    """

    token_ids_TK: Tensor  # int32, by logprob descending, ties by id ascending
    logprobs_TK: Tensor  # float32, never renormalised
    tail_logmass_T: Tensor  # float32, log(1 - sum of the kept p); exactly -inf where K = V
    # int32, ascending, repeats allowed; `draw_log_weights` says what mass each draw stands for.
    # Without draws the tail is one bucket.
    tail_ids_TN: Tensor
    vocab_size: int
    temperature: float = 1.0
    _: KW_ONLY
    # What a target may have more, or None. float32: log p of each draw, where draws are weighted;
    # log p of the token that really follows; the entropy of the distribution within the tail, nats
    draw_logprobs_TN: Tensor | None = None
    label_logprob_T: Tensor | None = None
    tail_entropy_T: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.token_ids_TK.shape[0]

    @property
    def k(self) -> int:
        return self.token_ids_TK.shape[1]

    @property
    def num_draws(self) -> int:
        return self.tail_ids_TN.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by the name of their field; each has T rows."""
        return {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "CompressedLogits":
        """The same targets with `change` applied to each tensor, such as a slice or a copy to a
        device."""
        changed: dict[str, Any] = {name: change(value) for name, value in self.tensors.items()}
        return replace(self, **changed)

    def with_rows(self, rows_R: Tensor, other: "CompressedLogits") -> "CompressedLogits":
        """The same targets with tokens rows_R (int64 [R]) replaced by the R tokens of `other`,
        which has the same tensors."""
        theirs = other.tensors
        changed: dict[str, Any] = {
            name: value.index_copy(0, rows_R, theirs[name]) for name, value in self.tensors.items()
        }
        return replace(self, **changed)

    def without_draws(self) -> "CompressedLogits":
        """The same targets with the tail as one bucket."""
        return replace(self, tail_ids_TN=self.tail_ids_TN[:, :0], draw_logprobs_TN=None)


def concatenate(parts: Iterable[CompressedLogits]) -> CompressedLogits:
    """The tokens of all parts, in order, as one value.

    There is at least one part; all have the same K, N, vocabulary and temperature.
    """
    first, *others = list(parts)
    joined: dict[str, Any] = {
        name: torch.cat([value, *(other.tensors[name] for other in others)])
        for name, value in first.tensors.items()
    }
    return replace(first, **joined)


def kept_mass(compressed: CompressedLogits) -> Tensor:
    """The probability of each token's kept entries together, float64 [T]."""
    return compressed.logprobs_TK.double().exp().sum(dim=1)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What targets keep of their distributions, and what the codec loses of that."""

    kept_mass: float  # mean over tokens of the probability of the kept entries
    codec_kl: float  # mean over tokens of KL(exact || decoded), in nats
    worst_kl: float  # the largest of them


def fidelity(exact: CompressedLogits, decoded: CompressedLogits) -> Fidelity:
    """KL of decoded targets from exact ones, over K + 1 buckets (kept entries and tail), float64.

    Both are of the same tokens, on one device. Without tokens nothing is lost: (1, 0, 0). Raises
    ChunkError naming the first token for which the two keep different ids.
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
    """Kept ids ascending [T, K], and float64 log-probabilities of these and the tail [T, K + 1]."""
    ids_TK, order_TK = c.token_ids_TK.sort(dim=1)
    logprobs_TK = c.logprobs_TK.double().gather(1, order_TK)
    return ids_TK, torch.cat([logprobs_TK, c.tail_logmass_T.double()[:, None]], dim=1)
