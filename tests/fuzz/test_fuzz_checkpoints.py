"""Whatever a manifest or a part says, it is what was written there or it is passed over with words,
and the commit before is found."""

import json
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from helpers.bounded import bounded
from helpers.checkpoints import make, write_files
from helpers.mutants import dumps, mutated_bytes, mutated_json
from helpers.sealing import canonical
from stillhouse.checkpoint.choice import choose, newest, newest_step, retain
from stillhouse.checkpoint.integrity import verify
from stillhouse.checkpoint.manifest import Commit, part_of, read_part
from stillhouse.errors import CheckpointError
from stillhouse.store.object_store import Blobs

MUTANTS = 400
FEW_BYTES = 4096  # of all that is read


def sealed(rng: random.Random, kind: str, values: Any) -> bytes:
    """A file of this kind with these values: whole, or with one more change of all of it."""
    try:
        whole = {kind: values, "xxh3": xxhash.xxh3_64_hexdigest(canonical(values))}
    except UnicodeEncodeError:
        whole = {kind: values, "xxh3": ""}
    return dumps(mutated_json(rng, whole) if rng.random() < 0.1 else whole)


def mutant(rng: random.Random, kind: str, whole: bytes) -> bytes:
    if rng.random() < 0.2:
        return mutated_bytes(rng, whole)
    values = json.loads(whole)[kind]
    if kind == "commit" and rng.random() < 0.1:
        return sealed(
            rng,
            kind,
            {**values, "attempt": rng.choice(("../a", "/a", "a/b", "..", "a\0b", "\ud800", "a b"))},
        )
    return sealed(rng, kind, mutated_json(rng, values))


def is_sealed(data: bytes, kind: str) -> bool:
    whole = json.loads(data)
    return bool(whole["xxh3"] == xxhash.xxh3_64_hexdigest(canonical(whole[kind])))


def without_strange_keys(data: bytes) -> Any:
    """The values of a commit that this version knows; later versions may write more."""
    values = json.loads(data)["commit"]
    known = {name: values[name] for name in Commit.__dataclass_fields__}
    return known | {
        "origin": {
            name: known["origin"][name] for name in ("zero_stage", "fingerprint", "settings")
        }
    }


def test_a_manifest_is_a_commit_as_it_was_written_or_the_one_before_is_chosen(
    rng: random.Random, tmp_path: Path
) -> None:
    sound, last = make(tmp_path, 4, 8)
    blobs, path = Blobs(str(tmp_path)), tmp_path / last.manifest
    whole = path.read_bytes()
    num_read = 0
    for _ in range(MUTANTS):
        data = mutant(rng, "commit", whole)
        path.write_bytes(data)
        read = bounded(lambda: choose(blobs, lambda _: "").commit, num_bytes=len(data) + FEW_BYTES)
        if read != sound:
            num_read += 1
            assert read is not None
            assert canonical(asdict(read)) == canonical(without_strange_keys(data)), data
            assert read.manifest == last.manifest, data
            assert is_sealed(data, "commit"), data
            assert (tmp_path / read.folder).resolve().parent == tmp_path, data
            assert all(
                (tmp_path / read.folder / name).resolve().parent == tmp_path / read.folder
                for name in read.files
            ), data
        chosen = bounded(lambda: newest(str(tmp_path)), num_bytes=len(data) + FEW_BYTES)
        assert chosen is not None
        assert chosen in (sound, read), data
        assert chosen == sound or verify(blobs, last, chosen.files) == "", data
    assert num_read > 0


def test_old_commits_go_and_new_folders_stay_whatever_the_manifests_say(
    rng: random.Random, tmp_path: Path
) -> None:
    for number in range(MUTANTS // 10):
        root = tmp_path / str(number)
        _, _, last = make(root, 4, 8, 12)
        write_files(str(root), 16)
        damaged = root / rng.choice(("step-00000004.json", "step-00000008.json"))
        damaged.write_bytes(mutant(rng, "commit", damaged.read_bytes()))
        bounded(
            partial(retain, Blobs(str(root)), 2),
            num_bytes=damaged.stat().st_size if damaged.exists() else FEW_BYTES,
        )
        assert newest(str(root)) == last
        assert newest_step(str(root)) == 12
        assert (root / "step-00000016.a").is_dir()


def test_a_part_is_what_its_rank_wrote_or_is_refused_with_checkpoint_error(
    rng: random.Random, tmp_path: Path
) -> None:
    folder, name = write_files(str(tmp_path), 4), part_of(0, 2)
    blobs, path = Blobs(str(tmp_path)), tmp_path / folder / name
    whole = path.read_bytes()
    num_read = 0
    for _ in range(MUTANTS):
        data = mutant(rng, "part", whole)
        path.write_bytes(data)
        read = bounded(
            lambda: read_part(blobs, folder, rank=0, world_size=2),
            num_bytes=len(data) + FEW_BYTES,
            refusal=CheckpointError,
        )
        if read is not None:
            num_read += 1
            assert is_sealed(data, "part"), data
            assert all(
                (tmp_path / folder / file).resolve().parent == tmp_path / folder for file in read
            ), data
            found = {file: list(digest) for file, digest in read.items() if file != name}
            assert canonical(found) == canonical(
                {file: digest for file, digest in json.loads(data)["part"].items() if file != name}
            ), data
    assert num_read > 0
