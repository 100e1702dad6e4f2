"""Which students need kept entries with most of the teacher's mass, and what a config without them
is told."""

from typing import Any

import pytest

from stillhouse.config import StudentSection
from stillhouse.errors import ConfigError
from stillhouse.logits import TargetSpec
from stillhouse.student.pairing import LEAST_KEPT_MASS, depends_on_kept_mass, require_kept_mass

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
