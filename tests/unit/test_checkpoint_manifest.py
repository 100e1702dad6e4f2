"""A checkpoint is chosen only if every byte of it is what was committed; otherwise the one before
it is, or a message says what to do."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import xxhash

from helpers.checkpoints import FILES, ORIGIN, commit_files, make, write_files
from helpers.training import refuse_outage
from stillhouse.checkpoint.choice import (
    Choice,
    choose,
    newest,
    newest_copy,
    newest_step,
    retain,
    set_aside,
)
from stillhouse.checkpoint.integrity import verify
from stillhouse.checkpoint.manifest import (
    Commit,
    Origin,
    folder_of,
    part_of,
    publish,
    publish_part,
    read_part,
    tag_of,
    unlike,
)
from stillhouse.errors import CheckpointError
from stillhouse.store.object_store import Blobs

PART = part_of(1, 2)


def manifest_of(root: Path, step: int) -> Path:
    return root / f"{tag_of(step)}.json"


def step_of_newest(root: Path) -> int | None:
    found = newest(str(root))
    return None if found is None else found.step


def test_a_commit_tells_what_it_is_of(tmp_path: Path) -> None:
    (made,) = make(tmp_path, 40)
    assert newest(str(tmp_path)) == made
    assert (made.step, made.attempt, made.world_size, made.origin) == (40, "a", 2, ORIGIN)
    assert made.files.keys() == {*FILES, part_of(0, 2), part_of(1, 2)}
    assert made.num_bytes == sum(path.stat().st_size for path in (tmp_path / made.folder).iterdir())


def test_where_nothing_was_committed_there_is_none_and_nothing_is_made(tmp_path: Path) -> None:
    assert newest(str(tmp_path / "absent")) is None
    assert newest_step(str(tmp_path / "absent")) == 0
    assert not (tmp_path / "absent").exists()
    write_files(str(tmp_path), 10)
    assert newest(str(tmp_path)) is None


def test_the_newest_step_is_chosen_and_not_the_newest_file(tmp_path: Path) -> None:
    make(tmp_path, 1000, 20, 9)
    assert step_of_newest(tmp_path) == newest_step(str(tmp_path)) == 1000


def test_a_checkpoint_without_its_manifest_is_never_chosen(tmp_path: Path) -> None:
    make(tmp_path, 10)
    write_files(str(tmp_path), 20)
    # killed as it published
    manifest_of(tmp_path, 20).with_name(f"{tag_of(20)}.json#1").write_bytes(
        manifest_of(tmp_path, 10).read_bytes()
    )
    assert step_of_newest(tmp_path) == 10


def test_what_an_attempt_left_torn_hinders_no_other_at_the_same_step(tmp_path: Path) -> None:
    write_files(str(tmp_path), 10, attempt="torn", world_size=3)
    made = make(tmp_path, 10, attempt="whole")
    assert newest(str(tmp_path)) == made[0]
    assert made[0].folder == folder_of(10, "whole")


def test_a_checkpoint_without_a_file_is_not_committed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no rank wrote a file for step 10"):
        publish(Blobs(str(tmp_path)), Commit(10, "a", 1, ORIGIN, {}))
    assert newest(str(tmp_path)) is None


def test_the_first_commit_of_a_step_stands(tmp_path: Path) -> None:
    """A group that was thought dead may finish: both have trained the same steps."""
    (first,) = make(tmp_path, 10, attempt="first")
    write_files(str(tmp_path), 10, attempt="second")
    assert commit_files(str(tmp_path), 10, attempt="second") == first == newest(str(tmp_path))


def test_another_training_cannot_commit_between(tmp_path: Path) -> None:
    make(tmp_path, 10)
    before = manifest_of(tmp_path, 10).read_bytes()
    write_files(str(tmp_path), 10, attempt="b")
    with pytest.raises(
        CheckpointError,
        match=r"of another training:\n  - seed: found 0, wanted 1\nGive each run a --run-dir",
    ):
        commit_files(
            str(tmp_path),
            10,
            attempt="b",
            origin=Origin(3, ORIGIN.fingerprint, {"seed": 1, "betas": [0.9, 0.95]}),
        )
    assert manifest_of(tmp_path, 10).read_bytes() == before


def test_origins_differ_by_name() -> None:
    assert unlike(ORIGIN, ORIGIN) == []
    assert unlike(ORIGIN, Origin(1, "cd" * 32, {"seed": 0})) == [
        "zero_stage: found 3, wanted 1",
        f"recipe: found '{'ab' * 8}', wanted '{'cd' * 8}'",
        "betas: found [0.9, 0.95], wanted None",
    ]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def into_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def list_of(name: str, _commit: Commit) -> list[str]:
    return [name]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte flipped": lambda path: flip(path, 0),
    "last byte flipped": lambda path: flip(path, -1),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "added to": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": Path.unlink,
    "a directory": into_directory,
}


@pytest.mark.parametrize("name", [*(name for name, data in FILES.items() if data), PART])
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_means_the_commit_before(
    tmp_path: Path, damage: str, name: str
) -> None:
    made = make(tmp_path, 10, 20)
    DAMAGES[damage](tmp_path / made[-1].folder / name)
    assert step_of_newest(tmp_path) == 10


def test_a_file_that_was_empty_must_be_there_and_stay_empty(tmp_path: Path) -> None:
    for step, damage in ((20, Path.unlink), (40, lambda path: path.write_bytes(b"!"))):
        made = make(tmp_path, step - 10, step)
        damage(tmp_path / made[-1].folder / "pp_rank_1_optim.bin")
        assert step_of_newest(tmp_path) == step - 10


def test_any_bit_flipped_in_a_manifest_means_the_commit_before(tmp_path: Path) -> None:
    first, second = make(tmp_path, 10, 20)
    manifest = manifest_of(tmp_path, 20)
    sound = manifest.read_bytes()
    harmless = 0
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << position % 8
        manifest.write_bytes(damaged)
        found = newest(str(tmp_path))
        assert found in (first, second)
        harmless += found == second
    assert harmless < 0.05 * len(sound)  # one kind of white space became another


def test_any_bit_flipped_in_a_part_is_found_before_it_is_committed(tmp_path: Path) -> None:
    folder = write_files(str(tmp_path), 10)
    part = tmp_path / folder / part_of(0, 2)
    sound = part.read_bytes()
    expected = read_part(Blobs(str(tmp_path)), folder, rank=0, world_size=2)
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << position % 8
        part.write_bytes(damaged)
        with suppress(CheckpointError):
            found = read_part(Blobs(str(tmp_path)), folder, rank=0, world_size=2)
            # other white space, the same words
            assert {name: found[name] for name in FILES} == {name: expected[name] for name in FILES}


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    folder = write_files(str(tmp_path), 10)
    flip(tmp_path / folder / part_of(0, 2), 20)
    with pytest.raises(
        CheckpointError,
        match=r"part-00000-of-00002\.json, which rank 0 has written, cannot be read",
    ):
        commit_files(str(tmp_path), 10)


def test_a_part_may_be_published_again(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path))
    for size in (1, 2):
        publish_part(blobs, "step-00000001.a", rank=0, world_size=1, files={"x": (size, "00")})
    assert read_part(blobs, "step-00000001.a", rank=0, world_size=1)["x"] == (2, "00")


def test_where_no_commit_verifies_each_is_named_with_its_problem_and_what_to_do(
    tmp_path: Path,
) -> None:
    made = make(tmp_path, 10, 20, 30)
    flip(tmp_path / made[0].folder / "model_states.bin", 5)
    (tmp_path / made[1].folder / "pp_rank_0_optim.bin").unlink()
    manifest_of(tmp_path, 30).write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        newest(str(tmp_path))
    message = str(caught.value)
    assert f"no checkpoint under {tmp_path} verifies" in message
    assert "step-00000010.json: model_states.bin is not what was committed" in message
    assert "step-00000020.json: pp_rank_0_optim.bin is missing" in message
    assert "step-00000030.json: the manifest cannot be read" in message
    assert "Restore the files from a backup" in message


def forge(root: Path, step: int, changes: dict[str, object]) -> None:
    """A manifest with other values and the right checksum."""
    path = manifest_of(root, step)
    values = json.loads(path.read_text())["commit"] | changes
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({"commit": values, "xxh3": xxhash.xxh3_64_hexdigest(text.encode())}))


def test_a_manifest_with_the_right_checksum_is_believed(tmp_path: Path) -> None:
    """Or the tests below would prove nothing: `forge` makes what `publish` makes."""
    make(tmp_path, 10)
    forge(tmp_path, 10, {})
    assert step_of_newest(tmp_path) == 10


@pytest.mark.parametrize(
    "name", ["../secret", "../../secret", "/etc/passwd", "link/secret", "..", "."]
)
def test_a_manifest_may_not_name_what_lies_outside_of_its_checkpoint(
    tmp_path: Path, name: str
) -> None:
    root = tmp_path / "checkpoints"
    made = make(root, 10, 20)
    (root / made[1].folder / "link").symlink_to(tmp_path)
    (tmp_path / "secret").write_bytes(b"s3cret")
    (root / "secret").write_bytes(b"s3cret")
    path = root / made[1].folder / name
    data = path.read_bytes() if path.is_file() else b""
    forge(root, 20, {"files": {name: [len(data), xxhash.xxh3_64_hexdigest(data)]}})
    assert step_of_newest(root) == 10
    manifest_of(root, 10).unlink()
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        newest(str(root))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 21},
        {"step": None},
        {"world_size": [2]},
        {"attempt": "../a"},
        {"origin": None},
        {"files": None},
        {"files": {}},
        {"files": {"model_states.bin": 3}},
        {"files": {"model_states.bin": ["many", "0"]}},
        {"files": {"nul\0.pt": [0, ""]}},
    ],
)
def test_a_manifest_that_makes_no_sense_is_passed_over(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    make(tmp_path, 10, 20)
    forge(tmp_path, 20, changes)
    assert step_of_newest(tmp_path) == 10


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"commit": 3, "xxh3": ""}', '{"commit": {}}', "\udcff"]
)
def test_a_manifest_that_is_none_is_passed_over(tmp_path: Path, text: str) -> None:
    make(tmp_path, 10, 20)
    manifest_of(tmp_path, 20).write_bytes(os.fsencode(text))
    assert step_of_newest(tmp_path) == 10


def chosen_in(root: Path) -> Choice:
    blobs = Blobs(str(root))
    return choose(blobs, lambda commit: verify(blobs, commit, commit.files))


def test_what_was_set_aside_gives_its_name_back(tmp_path: Path) -> None:
    made = make(tmp_path, 10, 20, 30)
    for commit in made[1:]:
        flip(tmp_path / commit.folder / "model_states.bin", 0)
    assert step_of_newest(tmp_path) == 10
    set_aside(Blobs(str(tmp_path)), chosen_in(tmp_path).passed_over)
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == [f"{tag_of(10)}.json", f"{tag_of(20)}.damaged", f"{tag_of(30)}.damaged"]
    assert step_of_newest(tmp_path) == 10
    make(tmp_path, 20, attempt="again")
    assert step_of_newest(tmp_path) == 20


def test_nothing_is_set_aside_where_the_newest_verifies(tmp_path: Path) -> None:
    made = make(tmp_path, 10, 20)
    set_aside(Blobs(str(tmp_path)), chosen_in(tmp_path).passed_over)
    assert newest(str(tmp_path)) == made[-1]


def test_a_commit_that_a_group_thought_dead_made_after_the_choice_is_not_set_aside(
    tmp_path: Path,
) -> None:
    made = make(tmp_path, 10, 20)
    flip(tmp_path / made[-1].folder / "model_states.bin", 0)
    chosen = chosen_in(tmp_path)
    (late,) = make(tmp_path, 30, attempt="slow")
    set_aside(Blobs(str(tmp_path)), chosen.passed_over)
    assert newest(str(tmp_path)) == late


def test_what_was_passed_over_and_is_gone_needs_no_setting_aside(tmp_path: Path) -> None:
    made = make(tmp_path, 10, 20)
    flip(tmp_path / made[-1].folder / "model_states.bin", 0)
    chosen = chosen_in(tmp_path)
    for _ in range(2):
        set_aside(Blobs(str(tmp_path)), chosen.passed_over)
    assert step_of_newest(tmp_path) == 10


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_newest_are_kept_and_torn_ones_before_them_go(tmp_path: Path, keep: int) -> None:
    made = make(tmp_path, 5, 10, 100, 1000)
    for step in (50, 1000):
        write_files(str(tmp_path), step, attempt="torn")
    being_written = write_files(str(tmp_path), 1010, attempt="b")
    retain(Blobs(str(tmp_path)), keep)
    kept = made[-keep:]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(
        [*(commit.folder for commit in kept), being_written]
    )
    assert sorted(path.name for path in tmp_path.glob("*.json")) == sorted(
        commit.manifest for commit in kept
    )
    assert step_of_newest(tmp_path) == 1000


@pytest.mark.parametrize(("best", "kept"), [(5, [5, 1000]), (1000, [1000]), (7, [1000])])
def test_the_best_commit_is_kept_beside_the_newest_and_is_found_by_its_step(
    tmp_path: Path, best: int, kept: list[int]
) -> None:
    made = {commit.step: commit for commit in make(tmp_path, 5, 10, 100, 1000)}
    retain(Blobs(str(tmp_path)), 1, best=best)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name for step in kept for name in (made[step].folder, made[step].manifest)
    )
    with newest_copy(
        str(tmp_path), lambda commit: commit.files, step=best, tell=refuse_outage
    ) as found:
        assert (None if found is None else found[0]) == (made[best] if best in kept else None)


def test_retaining_leaves_what_is_no_checkpoint_alone(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.json").write_text("mine")
    retain(Blobs(str(tmp_path)), 1)
    assert (tmp_path / "notes").is_dir()
    assert (tmp_path / "notes.json").read_text() == "mine"


def test_retaining_does_not_touch_what_a_damaged_manifest_may_have_named(tmp_path: Path) -> None:
    made = make(tmp_path, 10, 20, 30)
    manifest_of(tmp_path, 20).write_text("{")
    retain(Blobs(str(tmp_path)), 2)
    assert (tmp_path / made[1].folder / "model_states.bin").is_file()
    assert not (tmp_path / made[0].folder).exists()


def test_a_directory_is_read_in_place(tmp_path: Path) -> None:
    (made,) = make(tmp_path, 10)
    with newest_copy(str(tmp_path), lambda commit: commit.files, tell=refuse_outage) as found:
        assert found == (made, tmp_path / made.folder)
    with newest_copy(
        str(tmp_path / "absent"), lambda commit: commit.files, tell=refuse_outage
    ) as found:
        assert found is None


def test_what_is_not_wanted_may_be_damaged(tmp_path: Path) -> None:
    made = make(tmp_path, 10, 20)
    flip(tmp_path / made[1].folder / "pp_rank_0_optim.bin", 0)
    for name, step in (("model_states.bin", 20), ("pp_rank_0_optim.bin", 10)):
        with newest_copy(str(tmp_path), partial(list_of, name), tell=refuse_outage) as found:
            assert found is not None
            assert found[0].step == step
