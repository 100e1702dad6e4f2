"""What decides a grader's scores, as JSON values: the names of its verdicts are digests of it."""

from typing import Any

from stillhouse.config.graders import GraderSection, OwnSection
from stillhouse.config.servers import ChatSection
from stillhouse.extension import extension_digest

VERSION = 1  # of what the graders of each kind do; another one where one gives other scores

# settings that do not decide a score
_OUTSIDE = {
    "name",
    "num_processes",
    "interpreter",
    "patience_s",
    *ChatSection.model_fields,  # where a judge is, and what it may cost
} - {"served_model", "request"}


def identity_of(section: GraderSection) -> dict[str, Any]:
    """Kind, settings and version; for a function of the user's own also the digest of its file."""
    values = section.model_dump(mode="json", exclude=_OUTSIDE)
    digest = {"digest": extension_digest(section.kind)} if isinstance(section, OwnSection) else {}
    return {**values, **digest, "version": VERSION}
