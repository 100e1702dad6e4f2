"""Temporary folders of checkpoints: one's own is left alone, a dead process's goes."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
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


def test_folders_that_are_made_at_the_same_time_stay(tmp_path: Path) -> None:
    """As by the ranks of one machine."""

    def is_there(_number: int) -> bool:
        with scratch_folder(tmp_path / "disk") as folder:
            return folder.is_dir()

    (tmp_path / "disk").mkdir()
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(is_there, range(600)))
    assert not list((tmp_path / "disk").iterdir())
