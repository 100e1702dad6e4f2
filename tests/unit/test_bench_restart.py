"""`bench restart` counts from a kill to the next step that the new group takes, and kills only a
group that has something to lose."""

from dataclasses import astuple
from time import time

import pytest

from stillhouse.bench import restart
from stillhouse.bench.restart import Seen, measured


def test_a_restart_ends_with_the_first_step_of_the_new_group_not_with_the_last_of_the_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restart, "_LOOK_EVERY_S", 0.0)
    now = time()
    steps, commits, calls, kills = [now + 0.1], list[float](), [now], list[int]()

    def seen() -> Seen:
        found = Seen(list(steps), list(commits), list(calls))
        if not kills:  # a commit, and then a step
            (commits if len(steps) > len(commits) else steps).append(steps[-1] + 0.1)
        return found

    def kill() -> None:
        kills.append(len(commits))
        killed = time()
        steps.extend([killed + 0.5, killed + 9.0, killed + 9.3])
        calls.append(killed + 5.0)

    (found,) = measured(seen, kill, num_kills=1)
    (num_commits,) = kills
    assert num_commits >= 1
    assert astuple(found) == pytest.approx((9.0, 5.0), abs=0.01)
