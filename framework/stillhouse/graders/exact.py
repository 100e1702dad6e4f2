"""The grader `exact`: the text is the reference, once both are normalised."""

import re
import string

from stillhouse.graders.base import Failure, Sample

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(sample: Sample, *, normalise: str, after: str | None) -> float:
    """See `ExactSection`."""
    if sample.reference is None:
        return Failure("no reference")
    text, wanted = (
        normalised(each if after is None else each.rpartition(after)[2], normalise)
        for each in (sample.text, sample.reference)
    )
    return float(text == wanted)


def normalised(text: str, how: str) -> str:
    """A text as `ExactSection.normalise` says; `words` is the normalisation of SQuAD (Rajpurkar et
    al. 2016, arXiv 1606.05250)."""
    if how == "none":
        return text
    if how == "words":
        text = _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION))
    return " ".join(text.split())
