"""Which directory is safe for Ray's files, and which word on this machine's cluster is believed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.cluster.ray_directory import (
    base_directory,
    current_address,
    machine_directory,
    new_directory,
    ray_directory,
    remove_directory,
)
from stillhouse.errors import ConfigError

HERE = "10.0.0.5:6379"


def written(directory: Path, text: str = HERE) -> Path:
    """As Ray does, in a directory that it opens to all."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o777)
    path = directory / "ray_current_cluster"
    path.write_text(text)
    path.chmod(0o644)
    return path


def test_a_place_whose_sockets_would_have_too_long_a_path_is_refused_before_ray_starts() -> None:
    assert base_directory({}) == Path("/tmp")
    assert base_directory({"RAY_TMPDIR": "/scratch"}) == Path("/scratch")
    with pytest.raises(ConfigError, match="too long a path"):
        base_directory({"RAY_TMPDIR": "/scratch/of/a/user/with/a/name"})


def test_a_machine_that_belongs_to_no_cluster_has_no_address(tmp_path: Path) -> None:
    assert current_address(tmp_path) is None
    machine_directory(tmp_path)
    assert current_address(tmp_path) is None


def test_what_node_wrote_comes_before_what_ray_wrote(tmp_path: Path) -> None:
    written(tmp_path / "ray", "10.0.0.6:6379")
    assert current_address(tmp_path) == "10.0.0.6:6379"
    written(ray_directory(machine_directory(tmp_path)))
    assert current_address(tmp_path) == HERE


def test_each_cluster_has_a_directory_of_its_own_that_goes_with_it(tmp_path: Path) -> None:
    first, second = new_directory(tmp_path), new_directory(tmp_path)
    assert first != second
    assert first.stat().st_mode & 0o777 == second.stat().st_mode & 0o777 == 0o700
    assert machine_directory(tmp_path).stat().st_mode & 0o777 == 0o700
    (first / "ray").mkdir()
    remove_directory(first)
    assert not first.exists()
    assert second.exists()


def test_a_directory_in_which_others_can_replace_things_is_no_place_for_rays_files(
    tmp_path: Path,
) -> None:
    tmp_path.chmod(0o777)
    for make in (new_directory, machine_directory):
        with pytest.raises(ConfigError, match="others can replace what lies in"):
            make(tmp_path)
    tmp_path.chmod(0o1777)  # as /tmp is: each owner's things stay
    assert new_directory(tmp_path).exists()


def test_a_directory_of_this_users_name_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    taken = tmp_path / f"stillhouse-{os.geteuid()}"
    taken.mkdir()
    taken.chmod(0o755)
    for use in (machine_directory, current_address):
        with pytest.raises(
            ConfigError, match="not a directory of your own that nobody else may enter"
        ):
            use(tmp_path)
    taken.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    taken.symlink_to(tmp_path / "elsewhere")
    for use in (machine_directory, current_address):
        with pytest.raises(ConfigError, match="not a directory of your own"):
            use(tmp_path)


def linked(path: Path) -> None:
    path.rename(path.with_name("another"))
    path.symlink_to("another")


def hard_linked(path: Path) -> None:
    path.with_name("another").hardlink_to(path)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FORGERIES: dict[str, Callable[[Path], object]] = {
    "a link": linked,
    "a second name of a file": hard_linked,
    "a pipe": piped,
    "a file that all may write": lambda path: path.chmod(0o666),
    "no address": lambda path: path.write_text("elsewhere"),
    "two lines": lambda path: path.write_text("10.0.0.5:6379\n10.0.0.6:6379"),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_word_that_another_user_may_have_left_is_not_believed(
    tmp_path: Path, forge: Callable[[Path], object]
) -> None:
    forge(written(tmp_path / "ray"))
    with pytest.raises(ConfigError, match="may be another user's work"):
        current_address(tmp_path)
