"""An exact language for experiments with losses: each context has one known distribution, so that a
student is scored on all of it, and a run takes seconds at any vocabulary.

The teacher's logits are a product of rank 24 and a bias by Zipf's law. The student is of rank 16,
so it cannot copy its teacher. `Language.of` sharpens the teacher until its eight most likely ids
hold what is asked for.

Shapes: C contexts, T tokens, H the student's rank, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from stillhouse.logits import Head
from stillhouse.losses.divergences import Divergence

_TEACHER_RANK = 24
_STUDENT_RANK = 16
_SHARPENINGS = 40  # halvings of the interval in which the sharpness is looked for


@dataclass(frozen=True, slots=True)
class Language:
    """The teacher's log-probabilities of every id after every context."""

    logp_CV: Tensor

    @classmethod
    def of(cls, *, num_contexts: int, vocab_size: int, top8_mass: float, seed: int) -> Self:
        """A language whose eight most likely ids hold `top8_mass` in the mean over contexts."""
        random = torch.Generator().manual_seed(seed)
        of_context = torch.randn(num_contexts, _TEACHER_RANK, generator=random)
        of_id = torch.randn(_TEACHER_RANK, vocab_size, generator=random)
        zipf_V = -(torch.randperm(vocab_size, generator=random) + 2.0).log()
        logits_CV = 1.5 / math.sqrt(_TEACHER_RANK) * of_context @ of_id + zipf_V
        low, high = 0.05, 8.0
        for _ in range(_SHARPENINGS):
            sharpness = (low + high) / 2
            best_C8 = (sharpness * logits_CV).softmax(dim=1).topk(8, dim=1).values
            if float(best_C8.sum(dim=1).mean()) < top8_mass:
                low = sharpness
            else:
                high = sharpness
        return cls((low * logits_CV).log_softmax(dim=1))


class LanguageStudent(nn.Module):
    """A hidden state for each context, and a head with a bias."""

    def __init__(self, language: Language, *, seed: int) -> None:
        super().__init__()
        num_contexts, vocab_size = language.logp_CV.shape
        random = torch.Generator().manual_seed(seed)
        self.hidden_CH = nn.Parameter(
            0.3 * torch.randn(num_contexts, _STUDENT_RANK, generator=random)
        )
        self.weight_VH = nn.Parameter(
            0.3 * torch.randn(vocab_size, _STUDENT_RANK, generator=random)
        )
        self.bias_V = nn.Parameter(torch.zeros(vocab_size))

    @property
    def head(self) -> Head:
        return Head(self.weight_VH, self.bias_V)

    def logq(self, contexts_T: Tensor) -> Tensor:
        """Log-probabilities of every id, [T, V]."""
        return self.head.logits(self.hidden_CH[contexts_T]).log_softmax(dim=1)


@dataclass(frozen=True, slots=True)
class LanguageScores:
    """Means over all contexts, exact."""

    divergence: float  # the one that was trained, nats
    forward_kl: float  # nats
    acceptance: float  # 1 - total variation: the share of the student's tokens a teacher keeps


@torch.no_grad()
def language_scores(
    language: Language, student: LanguageStudent, divergence: Divergence
) -> LanguageScores:
    logp_CV = language.logp_CV
    logq_CV = student.logq(torch.arange(len(logp_CV)))
    return LanguageScores(
        float(divergence.of(logp_CV, logq_CV).mean()),
        float((logp_CV.exp() * (logp_CV - logq_CV)).sum(dim=1).mean()),
        float(torch.minimum(logp_CV, logq_CV).exp().sum(dim=1).mean()),
    )
