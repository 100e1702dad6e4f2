"""What held-out scores decide: the best step, and whether a student goes on. A pure function of the
scores so far, and of what a file holds."""

import math
from pathlib import Path

import pytest

from helpers.training import refuse_outage
from stillhouse.errors import StudentError
from stillhouse.store.object_store import Blobs
from stillhouse.student.best import History, read_history, write_history

FALLS_THEN_RISES = History(((10, 0.5), (20, 0.25), (30, 0.25), (40, 0.75)))


def test_the_best_step_is_the_first_with_the_lowest_kl() -> None:
    assert FALLS_THEN_RISES.best == (20, 0.25)
    assert FALLS_THEN_RISES.until(15).best == (10, 0.5)
    assert FALLS_THEN_RISES.until(5).best is None
    assert History(((10, math.nan), (20, 3.0), (30, -math.inf))).best == (20, 3.0)


@pytest.mark.parametrize(("patience", "over_after"), [(0, None), (1, 30), (2, 40), (3, None)])
def test_it_is_over_after_so_many_scores_that_are_not_lower(
    patience: int, over_after: int | None
) -> None:
    over = [
        step for step in (10, 20, 30, 40) if FALLS_THEN_RISES.until(step).is_over(patience=patience)
    ]
    assert over[:1] == ([] if over_after is None else [over_after])


def test_a_step_that_is_taken_again_replaces_what_was_scored_from_there_on() -> None:
    assert FALLS_THEN_RISES.after(30, 0.125).kls == ((10, 0.5), (20, 0.25), (30, 0.125))


def test_a_file_of_scores_is_read_as_it_was_written_or_refused_by_name(tmp_path: Path) -> None:
    blobs, key = Blobs(str(tmp_path)), "heldout/0f-student.json"
    assert read_history(blobs, key, tell=refuse_outage) == History()
    write_history(blobs, key, FALLS_THEN_RISES, tell=refuse_outage)
    assert read_history(blobs, key, tell=refuse_outage) == FALLS_THEN_RISES
    whole = (tmp_path / key).read_bytes()
    flips = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    for data in (*flips, whole[:-1], b"", b"{}", b"[" * 100_000):
        (tmp_path / key).write_bytes(data)
        with pytest.raises(StudentError, match=r"0f-student.* is damaged"):
            read_history(blobs, key, tell=refuse_outage)
