"""The dense scores of a model beside its teacher: KL divergence, cross-entropy, top-1 agreement,
speculative acceptance and calibration error, from both models' logits.

No compressed target is used, so the scores have none of its error. Everything is a sum over tokens:
sums of blocks, or of ranks, are added up, and made into means at the end.

Shapes: T tokens, H hidden, V vocabulary, X sums.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stillhouse.logits import Head

_NUM_BINS = 15
# tokens, cross-entropy, KL, agreement, acceptance; then three for each bin: tokens, confidence and
# correct first choices
_NUM_MEANS = 5
NUM_SUMS = _NUM_MEANS + 3 * _NUM_BINS


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one model: means over the held-out target tokens, in nats. What compares it with
    its teacher is NaN where no weights of the teacher are at hand."""

    num_tokens: int
    cross_entropy: float
    kl: float  # KL(teacher || model); 0 for the teacher itself
    agreement: float  # share of tokens where the model's first choice is the teacher's (top-1)
    # expected calibration error of the first choice, in 15 bins of equal width (arXiv 1706.04599)
    calibration_error: float
    # mean of sum_v min(p, q): the share of drafts that speculative decoding accepts (2211.17192)
    acceptance: float


def no_sums(device: torch.device | str = "cpu") -> Tensor:
    """[X] sums over no token, to which `score_sums` of blocks are added."""
    return torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)


def head_logprobs(hidden_TH: Tensor, head: Head) -> Tensor:
    """[T, V]: the log-probabilities of these final hidden states, in float32 on the head's
    device."""
    logits_TV = head.logits(hidden_TH.to(head.weight_VH.device))
    return torch.log_softmax(logits_TV.float(), dim=-1)


def score_sums(teacher_TV: Tensor, model_TV: Tensor, labels_T: Tensor) -> Tensor:
    """[X] sums over a block of tokens, in float64 on the device of the teacher's values: the order
    of blocks changes no digit that is shown.

    Both models' values are log-probabilities in float32; `labels_T` are the ids that really follow.
    """
    # the means
    model_TV, labels_T = model_TV.to(teacher_TV.device), labels_T.to(teacher_TV.device)
    p_TV = teacher_TV.exp()
    confidence_T, choice_T = model_TV.max(dim=-1)
    confidence_T = confidence_T.exp()
    cross_entropy = -model_TV.gather(1, labels_T[:, None]).sum(dtype=torch.float64)
    kl = torch.where(p_TV > 0, p_TV * (teacher_TV - model_TV), 0.0).sum(dtype=torch.float64)
    agreement = (choice_T == teacher_TV.argmax(dim=-1)).sum(dtype=torch.float64)
    acceptance = torch.minimum(p_TV, model_TV.exp()).sum(dtype=torch.float64)
    num_tokens = torch.full_like(kl, len(labels_T))

    # the bins
    bins_T = (confidence_T * _NUM_BINS).long().clamp_max(_NUM_BINS - 1)
    correct_T = (choice_T == labels_T).double()
    bins_3B = torch.zeros(3, _NUM_BINS, dtype=torch.float64, device=bins_T.device)
    bins_3B.index_add_(
        1, bins_T, torch.stack([torch.ones_like(correct_T), confidence_T.double(), correct_T])
    )
    means_5 = torch.stack([num_tokens, cross_entropy, kl, agreement, acceptance])
    return torch.cat([means_5, bins_3B.flatten()])


def scores_of(sums_X: Tensor) -> Scores:
    """The scores behind these sums; all are 0 where no token was scored."""
    sums_X = sums_X.cpu()
    num_tokens = int(sums_X[0])
    cross_entropy, kl, agreement, acceptance = (sums_X[1:_NUM_MEANS] / max(1, num_tokens)).tolist()
    _, confidence_B, correct_B = sums_X[_NUM_MEANS:].reshape(3, _NUM_BINS)
    calibration_error = float((confidence_B - correct_B).abs().sum()) / max(1, num_tokens)
    return Scores(num_tokens, cross_entropy, kl, agreement, calibration_error, acceptance)


def without_teacher(scores: Scores) -> Scores:
    """What of the scores needs no teacher."""
    return replace(scores, kl=math.nan, agreement=math.nan, acceptance=math.nan)
