"""A checkpoint is chosen only if every byte of it is what was committed; otherwise the one before it is, or a message says what to do."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from stillhouse.errors import CheckpointError
from stillhouse.student.checkpoint import Commit, commit, newest, retain, set_aside_after, tag_of

FILES = {"model_states.pt": b"weights" * 100, "zero/rank_0_optim.pt": b"moments" * 50, "zero/rank_1_optim.pt": b"", "names/ä.txt": b"x"}


def write(root: Path, step: int) -> Path:
    """What all ranks write before the commit."""
    folder = root / tag_of(step)
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data + str(step).encode() if data else data)
    return folder


def make(root: Path, *steps: int) -> list[Commit]:
    made = []
    for step in steps:
        write(root, step)
        made.append(commit(root, step=step, world_size=2, zero_stage=3, fingerprint="ab" * 32))
    return made


def manifest_of(root: Path, step: int) -> Path:
    return root / f"{tag_of(step)}.json"


def step_of_newest(root: Path) -> int | None:
    found = newest(root)
    return None if found is None else found.step


def test_a_commit_tells_what_it_is_of(tmp_path: Path):
    (made,) = make(tmp_path, 40)
    assert newest(tmp_path) == made
    assert (made.step, made.world_size, made.zero_stage, made.fingerprint) == (40, 2, 3, "ab" * 32)
    assert made.files.keys() == FILES.keys()
    assert made.num_bytes == sum(path.stat().st_size for path in (tmp_path / tag_of(40)).rglob("*") if path.is_file())


def test_where_nothing_was_committed_there_is_none(tmp_path: Path):
    assert newest(tmp_path / "absent") is None
    write(tmp_path, 10)
    assert newest(tmp_path) is None


def test_the_newest_step_is_chosen_and_not_the_newest_file(tmp_path: Path):
    make(tmp_path, 1000, 20, 9)
    assert step_of_newest(tmp_path) == 1000


def test_a_checkpoint_without_its_manifest_is_never_chosen(tmp_path: Path):
    make(tmp_path, 10)
    write(tmp_path, 20)
    (tmp_path / f"{tag_of(20)}.4711.tmp").write_bytes(manifest_of(tmp_path, 10).read_bytes())  # killed while it published
    assert step_of_newest(tmp_path) == 10


def test_an_empty_checkpoint_is_not_committed(tmp_path: Path):
    (tmp_path / tag_of(10)).mkdir()
    for step in (10, 20):
        with pytest.raises(CheckpointError, match=f"{tag_of(step)} is empty: no rank wrote its part"):
            commit(tmp_path, step=step, world_size=1, zero_stage=0, fingerprint="")
    assert newest(tmp_path) is None


def test_a_step_is_committed_once(tmp_path: Path):
    make(tmp_path, 10)
    before = manifest_of(tmp_path, 10).read_bytes()
    with pytest.raises(CheckpointError, match=r"step-00000010\.json exists already: two runs write to the same directory"):
        commit(tmp_path, step=10, world_size=4, zero_stage=1, fingerprint="")
    assert manifest_of(tmp_path, 10).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [tag_of(10), f"{tag_of(10)}.json"]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def into_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first byte flipped": lambda path: flip(path, 0),
    "last byte flipped": lambda path: flip(path, -1),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "added to": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": Path.unlink,
    "a directory": into_directory,
}


@pytest.mark.parametrize("name", [name for name, data in FILES.items() if data])
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_means_the_commit_before(tmp_path: Path, damage: str, name: str):
    make(tmp_path, 10, 20)
    DAMAGES[damage](tmp_path / tag_of(20) / name)
    assert step_of_newest(tmp_path) == 10


def test_a_file_that_was_empty_must_be_there_and_stay_empty(tmp_path: Path):
    for step, damage in ((20, Path.unlink), (40, lambda path: path.write_bytes(b"!"))):
        make(tmp_path, step - 10, step)
        damage(tmp_path / tag_of(step) / "zero/rank_1_optim.pt")
        assert step_of_newest(tmp_path) == step - 10


def test_a_bit_flipped_in_any_byte_of_a_manifest_means_the_commit_before_or_nothing_that_matters(tmp_path: Path):
    """A world size or a fingerprint that is another would stop the run, or worse."""
    first, second = make(tmp_path, 10, 20)
    manifest = manifest_of(tmp_path, 20)
    sound = manifest.read_bytes()
    harmless = 0
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << position % 8
        manifest.write_bytes(damaged)
        found = newest(tmp_path)
        assert found in (first, second)
        harmless += found == second
    assert harmless < 0.02 * len(sound)  # one kind of white space became another


def test_where_no_commit_verifies_each_is_named_with_its_problem_and_what_to_do(tmp_path: Path):
    make(tmp_path, 10, 20, 30)
    flip(tmp_path / tag_of(10) / "model_states.pt", 5)
    (tmp_path / tag_of(20) / "zero/rank_0_optim.pt").unlink()
    manifest_of(tmp_path, 30).write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        newest(tmp_path)
    message = str(caught.value)
    assert f"no checkpoint under {tmp_path} verifies" in message
    assert "step-00000010.json: model_states.pt is not what was committed" in message
    assert "step-00000020.json: zero/rank_0_optim.pt is missing" in message
    assert "step-00000030.json: the manifest cannot be read" in message
    assert "Restore the files from a backup" in message


def forge(root: Path, step: int, changes: dict[str, object]) -> None:
    """A manifest with other values and the right checksum."""
    path = manifest_of(root, step)
    values = json.loads(path.read_text())["commit"] | changes
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({"commit": values, "xxh3": xxhash.xxh3_64_hexdigest(text.encode())}))


def test_a_manifest_with_the_right_checksum_is_believed(tmp_path: Path):
    """Or the tests below would prove nothing: `forge` makes what `commit` makes."""
    make(tmp_path, 10)
    forge(tmp_path, 10, {})
    assert step_of_newest(tmp_path) == 10


@pytest.mark.parametrize("name", ["../secret", "../../secret", "/etc/passwd", "zero/../../secret", "link/secret"])
def test_a_manifest_may_not_name_what_lies_outside_of_its_checkpoint(tmp_path: Path, name: str):
    root = tmp_path / "checkpoints"
    make(root, 10, 20)
    (root / "secret").write_bytes(b"s3cret")
    (tmp_path / "secret").write_bytes(b"s3cret")
    (root / tag_of(20) / "link").symlink_to(tmp_path)
    data = (root / tag_of(20) / name).read_bytes()
    forge(root, 20, {"files": {name: [len(data), xxhash.xxh3_64_hexdigest(data)]}})
    assert step_of_newest(root) == 10
    manifest_of(root, 10).unlink()
    with pytest.raises(CheckpointError, match=f"names {name}, which is outside of the checkpoint"):
        newest(root)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 21},
        {"step": None},
        {"world_size": [2]},
        {"files": None},
        {"files": {}},
        {"files": {"model_states.pt": 3}},
        {"files": {"model_states.pt": ["many", "0"]}},
        {"files": {"nul\0.pt": [0, ""]}},
    ],
)
def test_a_manifest_that_makes_no_sense_is_passed_over(tmp_path: Path, changes: dict[str, object]):
    make(tmp_path, 10, 20)
    forge(tmp_path, 20, changes)
    assert step_of_newest(tmp_path) == 10


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"commit": 3, "xxh3": ""}', '{"commit": {}}', "\udcff"])
def test_a_manifest_that_is_none_is_passed_over(tmp_path: Path, text: str):
    make(tmp_path, 10, 20)
    manifest_of(tmp_path, 20).write_bytes(os.fsencode(text))
    assert step_of_newest(tmp_path) == 10


def test_what_was_set_aside_gives_its_name_back(tmp_path: Path):
    make(tmp_path, 10, 20, 30)
    for step in (20, 30):
        flip(tmp_path / tag_of(step) / "model_states.pt", 0)
    assert step_of_newest(tmp_path) == 10
    set_aside_after(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [f"{tag_of(10)}.json", f"{tag_of(20)}.damaged", f"{tag_of(30)}.damaged"]
    assert step_of_newest(tmp_path) == 10
    make(tmp_path, 20)
    assert step_of_newest(tmp_path) == 20


def test_nothing_is_set_aside_where_the_newest_verifies(tmp_path: Path):
    made = make(tmp_path, 10, 20)
    set_aside_after(tmp_path, 20)
    assert newest(tmp_path) == made[-1]


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_newest_are_kept_and_uncommitted_directories_go(tmp_path: Path, keep: int):
    make(tmp_path, 5, 10, 100, 1000)
    write(tmp_path, 50)
    write(tmp_path, 2000)
    retain(tmp_path, keep)
    kept = [5, 10, 100, 1000][-keep:]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [tag_of(step) for step in kept]
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [f"{tag_of(step)}.json" for step in kept]
    assert step_of_newest(tmp_path) == 1000


def test_retaining_leaves_what_is_no_checkpoint_alone(tmp_path: Path):
    make(tmp_path, 10, 20)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.json").write_text("mine")
    retain(tmp_path, 1)
    assert (tmp_path / "notes").is_dir()
    assert (tmp_path / "notes.json").read_text() == "mine"
