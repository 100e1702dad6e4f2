"""Whether a student's divergence can learn from its targets: where it sees the tail as one bucket,
the kept entries must hold most of the teacher's mass.

Weighted draws give every divergence with a generator the gradient of the whole vocabulary, blind
draws only forward KL and its multiples. Every other pairing sees all that a target does not keep as
one bucket, and gives the student no gradient within it.
"""

from stillhouse.config import StudentSection
from stillhouse.errors import ConfigError
from stillhouse.logits import TargetSpec
from stillhouse.losses.divergences import divergence_named, is_unbiased_with_draws

LEAST_KEPT_MASS = 0.8
"""Measured with reverse KL and JSD on 8 entries. Where these held 84 % of the teacher's mass, one
bucket reached three quarters of what the whole distribution gains. Where they held 40 %, students
ended further from their teacher than students of the text alone."""


def depends_on_kept_mass(section: StudentSection, spec: TargetSpec) -> bool:
    """Whether the student sees the tail of such targets as one bucket, without `tail_as_bucket` in
    its config.

    Forward KL never does: it has draws by default, so `target.tail_draws = 0` is an explicit choice
    of the bucket.
    """
    if section.divergence_weight == 0.0 or section.tail_as_bucket:
        return False
    divergence = divergence_named(section.divergence, section.mix)
    return not is_unbiased_with_draws(divergence, weighted=spec.weighted)


def has_loss_constant(section: StudentSection, spec: TargetSpec) -> bool:
    """Whether the divergence that such a student minimises has the entropy of the teacher's tail on
    top: a constant, so that it does not fall to 0.

    Blind draws bring it into forward KL, and targets that hold the entropy take it off.
    """
    is_blind = spec.num_draws > 0 and not spec.weighted
    if section.divergence_weight == 0.0 or not is_blind or spec.tail_entropy:
        return False
    divergence = divergence_named(section.divergence, section.mix)
    return section.forward_kl_steps > 0 or divergence.forward_kl_share > 0.0


def require_kept_mass(section: StudentSection, spec: TargetSpec, *, kept_mass: float) -> None:
    """Raise ConfigError where a student that `depends_on_kept_mass` has targets whose kept entries
    hold too little of the teacher's mass."""
    if kept_mass >= LEAST_KEPT_MASS:
        return
    unused = f" and learns nothing from the {spec.num_draws} draws" if spec.num_draws else ""
    raise ConfigError(
        f'student.divergence is "{section.divergence}", which sees all but the {spec.k} kept '
        f"entries of a token as one bucket{unused}; in the first batch these entries hold "
        f"{kept_mass:.1%} of the teacher's mass, wanted at least {LEAST_KEPT_MASS:.0%}. The other "
        f"{1.0 - kept_mass:.1%} would be that bucket: measured with 60 % in it, such students "
        "ended further from their teacher than students that never met it. "
        f"{_cure_by_weights(section)}Set student.divergence "
        '= "forward_kl", which draws (target.tail_draws = 40) keep unbiased; or keep more entries '
        "(a larger target.k); or say that one bucket is wanted: student.tail_as_bucket = true"
    )


def _cure_by_weights(section: StudentSection) -> str:
    """What to store for a divergence that weighted draws complete; nothing for another one."""
    if divergence_named(section.divergence, section.mix).generator is None:
        return ""
    return (
        "Store draws that this divergence can use (target.weighted_draws = true, "
        "target.tail_draws = 25), which needs a store of their own. Or else: "
    )
