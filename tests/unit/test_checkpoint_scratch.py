"""Temporary folders of checkpoints: one's own is left alone, a dead process's goes."""

import tempfile
from pathlib import Path

import pytest

from stillhouse.checkpoint.scratch import scratch_folder


def test_what_a_dead_process_left_goes_and_what_is_in_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as used:
        (used / "zero.pt").write_bytes(b"x")
        left = tmp_path / used.name.replace("checkpoint-", "checkpoint-dead")
        left.mkdir()
        for name in ("in-use", "zero.pt"):
            (left / name).write_bytes(b"")
        (tmp_path / "others").mkdir()
        with scratch_folder() as another:
            assert sorted(tmp_path.iterdir()) == sorted([used, another, tmp_path / "others"])
            assert (used / "zero.pt").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "others"]
