"""`bench checkpoint` measures real checkpoints of the same engine, and leaves nothing on the
disk."""

import json
from pathlib import Path

from helpers.command import stillhouse
from stillhouse.bench.checkpoint import COMMITTED, OURS, STEP, STEP_MEANWHILE, SYNCHRONOUS


def test_both_ways_write_the_engines_state_and_training_waits_for_less_than_the_commit(
    tmp_path: Path,
) -> None:
    out, work = tmp_path / "figures.json", tmp_path / "work"
    sizes = ("--hidden", "64", "--layers", "1", "--repeats", "2")
    outcome = stillhouse("bench", "checkpoint", *sizes, "--work-dir", work, "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    figures = json.loads(out.read_text())
    assert figures["seconds"].keys() == {SYNCHRONOUS, OURS, COMMITTED, STEP, STEP_MEANWHILE}
    # weights, master weights and two moments, 4 bytes each, of the embedding alone
    assert figures["num_bytes"] > 16 * 64 * 16_384
    for blocking, committed in zip(
        figures["every_repeat"][OURS], figures["every_repeat"][COMMITTED], strict=True
    ):
        assert 0 < blocking < committed
    assert list(work.iterdir()) == []
    assert "save_checkpoint" in outcome.out
