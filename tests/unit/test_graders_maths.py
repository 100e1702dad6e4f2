"""Mathematics is compared by what it means, in a process of its own, whatever a text holds."""

import sys
from contextlib import closing

import pytest

from helpers.graders import samples, section
from stillhouse.errors import ConfigError
from stillhouse.graders import graded, make_grader

RIGHT = {
    "1/2": ["0.5", "the answer is $\\frac{1}{2}$", "\\boxed{\\frac12}", "$\\dfrac{3}{6}$"],
    "\\frac{1}{2}": ["$0.5$"],
    "(x+1)^2": ["$x^2 + 2x + 1$", "\\boxed{(1+x)^2}"],
    "\\{1,2,3\\}": ["$\\{3, 2, 1\\}$"],
    "1,234.5": ["so it is 1234.5"],
    "\\sqrt{12}": ["$2\\sqrt{3}$"],
    "x = 3": ["$x=3$", "\\boxed{3}"],
}
WRONG = {
    "1/2": ["1/3", "no idea", ""],
    "(x+1)^2": ["$x^2 + 1$"],
    "\\{1,2,3\\}": ["$\\{1, 2\\}$"],
}


def test_equal_expressions_are_equal_answers_and_one_that_hangs_is_cut_off() -> None:
    cases = [
        (sample, wanted)
        for wanted, answers in ((1.0, RIGHT), (0.0, WRONG))
        for reference, texts in answers.items()
        for sample in samples(texts, reference)
    ]
    others = [*samples([""], ""), *samples(["$9^{9^{9^{9^{9}}}}$"], "7")]  # the last never ends
    with closing(make_grader(section(kind="maths", wall_s=4.0))) as grader:
        found = graded(grader, [*(sample for sample, _ in cases), *others])
    wrong = [
        (sample.text, sample.reference, score)
        for (sample, wanted), score in zip(cases, found.scores, strict=False)
        if score != wanted
    ]
    assert wrong == []
    assert found.scores[-2:] == (0.0, 0.0)
    assert found.failures == {"no expression in the reference": 1, "time": 1}


def test_maths_is_refused_where_its_library_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"pip install 'stillhouse\[maths\]'"):
        make_grader(section(kind="maths"))
