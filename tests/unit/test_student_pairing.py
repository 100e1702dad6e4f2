"""Which students need kept entries with most of the teacher's mass, and what a config without them
is told."""

from typing import Any

import pytest
import torch

from stillhouse.config import StudentSection
from stillhouse.errors import ConfigError
from stillhouse.logits import Head, TargetSpec, compress, token_seeds
from stillhouse.losses.distillation import distillation_loss
from stillhouse.losses.divergences import divergence_named
from stillhouse.student.pairing import (
    LEAST_KEPT_MASS,
    depends_on_kept_mass,
    has_loss_constant,
    require_kept_mass,
)

BUCKETED = ["reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]


def section(**settings: Any) -> StudentSection:
    return StudentSection.model_validate({"model": "student", **settings})


@pytest.mark.parametrize("divergence", BUCKETED)
def test_every_divergence_that_draws_do_not_complete_depends_on_the_kept_mass(
    divergence: str,
) -> None:
    blind, weighted = (TargetSpec(1000, 8, num_draws=9, weighted=each) for each in (False, True))
    assert depends_on_kept_mass(section(divergence=divergence), blind)
    assert not depends_on_kept_mass(section(divergence=divergence), weighted)
    assert not depends_on_kept_mass(section(divergence=divergence, tail_as_bucket=True), blind)
    assert not depends_on_kept_mass(
        section(divergence=divergence, divergence_weight=0.0, ce_weight=1.0), blind
    )


def test_forward_kl_never_depends_on_the_kept_mass() -> None:
    assert not depends_on_kept_mass(section(divergence="forward_kl"), TargetSpec(1000, 8))


@pytest.mark.parametrize(
    ("divergence", "target", "wanted"),
    [
        ("forward_kl", {"num_draws": 9}, True),
        ("forward_kl", {"num_draws": 9, "tail_entropy": True}, False),
        ("forward_kl", {"num_draws": 9, "weighted": True}, False),
        ("forward_kl", {}, False),
        ("jsd", {"num_draws": 9}, False),
    ],
)
def test_a_loss_is_said_to_have_a_constant_where_a_student_like_its_teacher_has_one(
    divergence: str, target: dict[str, Any], wanted: bool
) -> None:
    spec = TargetSpec(120, 4, **target)
    logits_TV = 2.0 * torch.randn((4000, 120), generator=torch.Generator().manual_seed(0))
    terms = distillation_loss(
        logits_TV,
        Head(torch.eye(120)),
        compress(logits_TV, spec, seeds_T=token_seeds(0, torch.arange(4000), torch.zeros(4000))),
        divergence=divergence_named(divergence, 0.5),
    )
    assert (float(terms.divergence / terms.num_tokens) > 0.3) == wanted
    assert has_loss_constant(section(divergence=divergence), spec) == wanted


def test_a_student_that_begins_on_forward_kl_begins_with_its_constant() -> None:
    spec, text = TargetSpec(120, 4, num_draws=9), {"divergence_weight": 0.0, "ce_weight": 1.0}
    assert has_loss_constant(section(divergence="jsd", forward_kl_steps=5), spec)
    assert not has_loss_constant(section(**text), spec)


def test_too_little_kept_mass_is_refused_with_what_was_found_why_and_what_to_do() -> None:
    with pytest.raises(ConfigError) as refusal:
        require_kept_mass(
            section(divergence="tvd"), TargetSpec(1000, 8, num_draws=40), kept_mass=0.404
        )
    message = str(refusal.value)
    assert 'student.divergence is "tvd"' in message
    assert (
        "all but the 8 kept entries of a token as one bucket and learns nothing from the 40 draws"
        in message
    )
    assert (
        "hold 40.4% of the teacher's mass, wanted at least 80%. The other 59.6% would be that "
        "bucket" in message
    )
    for cure in (
        "target.weighted_draws = true, target.tail_draws = 25",
        'student.divergence = "forward_kl"',
        "a larger target.k",
        "student.tail_as_bucket = true",
    ):
        assert cure in message
    with pytest.raises(
        ConfigError, match="kept entries of a token as one bucket; in the first batch"
    ):
        require_kept_mass(section(divergence="tvd"), TargetSpec(1000, 8), kept_mass=0.404)


def test_enough_kept_mass_is_accepted() -> None:
    require_kept_mass(section(divergence="tvd"), TargetSpec(1000, 8), kept_mass=LEAST_KEPT_MASS)
