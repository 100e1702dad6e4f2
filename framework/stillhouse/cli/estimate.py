"""How long a run will take, from arithmetic alone: a forward pass is 2 operations a parameter and
token, a training step 6.

(Kaplan et al., arXiv 2001.08361, section 2.1.) Nothing is measured, and attention over long
sequences is not counted: it says hours or days, not minutes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

PEAK_TFLOPS = {  # dense bfloat16, from NVIDIA's data sheets
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "L40S": 362.0,
    "A100": 312.0,
    "L4": 121.0,
}
ASSUMED = "H100"
FORWARD_SHARE, TRAINING_SHARE = 0.4, 0.35  # of the peak: assumed
FORWARD_OPERATIONS = 2  # a parameter and token
_RAY_NAMES_IT = "accelerator_type:"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Hours of one half of a run, had it its machines to itself."""

    hours: float
    num_cards: float


def card_of(available: Mapping[str, float]) -> str | None:
    """The slowest card that the cluster's resources name, of those that are known here; None where
    they name none."""
    named = {
        name.removeprefix(_RAY_NAMES_IT).partition("-")[0]
        for name in available
        if name.startswith(_RAY_NAMES_IT)
    }
    return min(named & PEAK_TFLOPS.keys(), key=PEAK_TFLOPS.__getitem__, default=None)


def teaching(num_parameters: float, num_tokens: float, *, card: str, num_cards: float) -> Estimate:
    """All targets, by so many cards: a teacher's own number times the replicas."""
    return _estimate(
        FORWARD_OPERATIONS * num_parameters * num_tokens, FORWARD_SHARE, card, num_cards
    )


def training(
    num_parameters: float, num_tokens: float, *, checkpointing: bool, card: str, num_cards: float
) -> Estimate:
    """All steps of one student; with activation checkpointing each forward pass is done twice."""
    return _estimate(
        training_operations(checkpointing) * num_parameters * num_tokens,
        TRAINING_SHARE,
        card,
        num_cards,
    )


def training_operations(checkpointing: bool) -> int:
    """A parameter and token: forward, and twice as much backward."""
    return FORWARD_OPERATIONS * (4 if checkpointing else 3)


def _estimate(operations: float, share: float, card: str, num_cards: float) -> Estimate:
    return Estimate(operations / (share * PEAK_TFLOPS[card] * 1e12 * num_cards) / 3600, num_cards)
