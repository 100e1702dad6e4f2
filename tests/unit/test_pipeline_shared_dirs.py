"""Directories that machines have to share are looked for before anything starts. With several
machines: tests/e2e/test_compose.py."""

from pathlib import Path

import pytest

from helpers.damage import read_only
from stillhouse.cluster.placement import Placement
from stillhouse.errors import ConfigError
from stillhouse.pipeline.shared_dirs import require_shared

SMALL = [Placement(0.1, 0.0, {})]


@pytest.mark.usefixtures("ray_cluster")
def test_a_directory_of_the_only_machine_will_do_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    require_shared(str(tmp_path / "store"), SMALL, what="chunks", setting="store.url")
    assert [*(tmp_path / "store").iterdir()] == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_directory_that_need_only_be_read_may_be_read_only(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "recipe.json").touch()
    with read_only(tmp_path / "store", at=tmp_path / "seen") as seen:
        require_shared(
            str(seen), SMALL, what="chunks", setting="store.url", published="recipe.json"
        )
        with pytest.raises(
            ConfigError,
            match=r"nothing can be written: Read-only file system; give store\.url another place",
        ):
            require_shared(str(seen), SMALL, what="chunks", setting="store.url")


def test_a_directory_that_cannot_be_written_is_refused_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"nothing can be written: .*; give store\.url another place"
    ):
        require_shared(str(tmp_path / "file" / "store"), SMALL, what="chunks", setting="store.url")
