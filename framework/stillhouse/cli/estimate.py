"""What a card can do and hold, and an estimate of a run's hours by arithmetic alone: a forward pass
is 2 operations a parameter and token, a training step 6 (Kaplan et al., arXiv 2001.08361, section
2.1).

Nothing is measured, and attention over long sequences is not counted: the result tells hours from
days, not minutes from hours.
"""

from collections.abc import Mapping

PEAK_TFLOPS: Mapping[str, float] = {  # dense bfloat16, from NVIDIA's data sheets
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "L40S": 362.0,
    "A100": 312.0,
    "L4": 121.0,
}
CARD_GB: Mapping[str, float] = {  # memory, from NVIDIA's data sheets; the least where it varies
    "B200": 180.0,
    "H200": 141.0,
    "H100": 80.0,
    "L40S": 48.0,
    "A100-80G": 80.0,
    "A100": 40.0,
    "L4": 24.0,
    "A10G": 24.0,
    "V100": 16.0,
    "T4": 16.0,
}
ASSUMED = "H100"
FORWARD_SHARE, TRAINING_SHARE = 0.4, 0.35  # of the peak: assumed
FORWARD_OPERATIONS = 2  # a parameter and token
_RAY_PREFIX = "accelerator_type:"


def card_of(available: Mapping[str, float]) -> str | None:
    """The slowest known card among the cluster's resources; None where they name none."""
    named = {name.partition("-")[0] for name in _cards(available)}
    return min(named & PEAK_TFLOPS.keys(), key=PEAK_TFLOPS.__getitem__, default=None)


def smallest_card(available: Mapping[str, float]) -> str | None:
    """The card with the least memory, by its key in CARD_GB, among the cluster's resources; None
    where they name no known one."""
    named = {name if name in CARD_GB else name.partition("-")[0] for name in _cards(available)}
    return min(named & CARD_GB.keys(), key=CARD_GB.__getitem__, default=None)


def _cards(available: Mapping[str, float]) -> set[str]:
    return {name.removeprefix(_RAY_PREFIX) for name in available if name.startswith(_RAY_PREFIX)}


def scoring_hours(
    num_parameters: float, num_tokens: float, *, card: str, num_cards: float
) -> float:
    """Hours for the targets of so many tokens, on `num_cards` GPUs that do nothing else."""
    operations = FORWARD_OPERATIONS * num_parameters * num_tokens
    return _hours(operations, FORWARD_SHARE, card, num_cards)


def training_hours(
    num_parameters: float, num_tokens: float, *, checkpointing: bool, card: str, num_cards: float
) -> float:
    """Hours for all steps of one student; activation checkpointing adds a second forward pass."""
    operations = training_operations(checkpointing) * num_parameters * num_tokens
    return _hours(operations, TRAINING_SHARE, card, num_cards)


def training_operations(checkpointing: bool) -> int:
    """Operations a parameter and token: forward, and twice as many backward."""
    return FORWARD_OPERATIONS * (4 if checkpointing else 3)


def _hours(operations: float, share: float, card: str, num_cards: float) -> float:
    return operations / (share * PEAK_TFLOPS[card] * 1e12 * num_cards) / 3600
