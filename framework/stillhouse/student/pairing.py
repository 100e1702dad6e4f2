"""Whether a student's divergence can learn from its targets: a tail that is one bucket must be
small.

Only forward KL (and its multiples) has the gradient of the whole vocabulary from draws. Every other
divergence sees all that a target does not keep as one bucket, and no gradient tells the student
what is inside it.
"""

from stillhouse.config import StudentSection
from stillhouse.errors import ConfigError
from stillhouse.logits import TargetSpec
from stillhouse.losses.divergences import divergence_named, is_unbiased_with_draws

# Measured with reverse KL and JSD on 8 entries: where these held 84 % of the teacher's mass, one
# bucket reached three quarters of what the whole distribution gains; where they held 40 %, students
# ended further from their teacher than students of the text alone.
LEAST_KEPT_MASS = 0.8


def depends_on_kept_mass(section: StudentSection) -> bool:
    """Whether the student sees the tail as one bucket, and its config does not say outright that
    this is wanted.

    Forward KL never does: its draws are the default, so a config without them has said so by
    `target.tail_draws = 0`.
    """
    if section.divergence_weight == 0.0 or section.tail_as_bucket:
        return False
    return not is_unbiased_with_draws(divergence_named(section.divergence, section.mix))


def require_kept_mass(section: StudentSection, spec: TargetSpec, *, kept_mass: float) -> None:
    """Raises ConfigError where the kept entries of a student that `depends_on_kept_mass` hold too
    little of the teacher's mass."""
    if kept_mass >= LEAST_KEPT_MASS:
        return
    unused = f" and learns nothing from the {spec.num_draws} draws" if spec.num_draws else ""
    raise ConfigError(
        f'student.divergence is "{section.divergence}", which sees all but the {spec.k} kept '
        f"entries of a token as one bucket{unused};"
        f" in the first batch these entries hold {kept_mass:.1%} of the teacher's mass, wanted at "
        f"least {LEAST_KEPT_MASS:.0%}."
        f" The other {1.0 - kept_mass:.1%} would be that bucket: measured with 60 % in it, such "
        "students ended further from their teacher"
        ' than students that never met it. Set student.divergence = "forward_kl", which draws '
        "(target.tail_draws = 40) keep unbiased;"
        " or keep more entries (a larger target.k); or say that one bucket is wanted: "
        "student.tail_as_bucket = true"
    )
