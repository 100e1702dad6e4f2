"""Students that train beside the driver's own work."""

import threading

import pytest
from ray.exceptions import RayError

from stillhouse.errors import HeadGoneError, TeacherError
from stillhouse.pipeline.students import Background

PATIENCE_S = 60.0


class Fit:
    """Stands for Ray Train's `fit`: it waits for what alone can end it, and calls Ray then."""

    def __init__(self) -> None:
        self.given_up, self.has_ended = threading.Event(), threading.Event()

    def __call__(self) -> None:
        assert self.given_up.wait(PATIENCE_S)
        self.has_ended.set()

    def give_up(self) -> None:
        self.given_up.set()


@pytest.mark.parametrize("why", [KeyboardInterrupt, TeacherError])
def test_a_block_that_is_left_early_leaves_no_thread_that_may_call_ray(
    why: type[BaseException],
) -> None:
    """Ray ends a process whose thread calls it while it shuts down."""
    fit = Fit()
    with pytest.raises(why), Background(fit, give_up=fit.give_up):
        raise why
    assert fit.has_ended.is_set()


def test_a_call_that_was_about_to_begin_is_given_up_as_well() -> None:
    """What is given up first is not there yet."""
    fit, num_asked = Fit(), 0

    def give_up() -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked > 1:
            fit.give_up()

    with pytest.raises(KeyboardInterrupt), Background(fit, give_up=give_up):
        raise KeyboardInterrupt
    assert fit.has_ended.is_set()


@pytest.mark.parametrize("why", [HeadGoneError, RayError])
def test_where_the_clusters_head_may_be_gone_nothing_is_asked_of_ray_any_more(
    why: type[BaseException],
) -> None:
    """No answer would come, and the command has its end to write down."""
    fit = Fit()
    try:
        with pytest.raises(why), Background(fit, give_up=fit.give_up):
            raise why
        assert not fit.given_up.is_set()
    finally:
        fit.give_up()


def test_what_the_call_raises_is_raised_where_it_is_waited_for() -> None:
    def fails() -> None:
        raise ValueError("diverged")

    with (
        pytest.raises(ValueError, match="diverged"),
        Background(fails, give_up=lambda: None) as students,
    ):
        students.join(unless=lambda: False)
