"""Identity: a digest of weights and config, not of names and dates, without reading files twice."""

import os
import shutil
from pathlib import Path

import pytest

from helpers.damage import small_disk
from helpers.models import make_model
from stillhouse.config import ModelSection
from stillhouse.errors import ChangedWeightsError, ModelError, UserError
from stillhouse.models.identity import digest_beside, forget_identity, model_identity

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def digest_of(directory: Path, cache_dir: Path, *, trust_remote_code: bool = False) -> str:
    section = ModelSection(model=str(directory), trust_remote_code=trust_remote_code)
    identity = model_identity(section, cache_dir=cache_dir)
    assert identity.revision is None
    return identity.digest


def test_a_copy_is_the_same_model_and_a_flipped_bit_another(saved: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / "copy")
    original = digest_of(saved, tmp_path / "cache")
    assert digest_of(copy, tmp_path / "other cache") == original
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert digest_of(copy, tmp_path / "other cache") != original


def test_the_config_is_part_of_the_model_and_the_tokenizer_is_not(
    saved: Path, tmp_path: Path
) -> None:
    original = digest_of(saved, tmp_path / "cache")
    (saved / "tokenizer_config.json").write_text("{}")
    assert digest_of(saved, tmp_path / "cache") == original
    config = (saved / "config.json").read_text()
    (saved / "config.json").write_text(
        config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    )
    assert digest_of(saved, tmp_path / "cache") != original


def test_code_is_part_of_the_model_where_it_is_run(saved: Path, tmp_path: Path) -> None:
    plain = digest_of(saved, tmp_path / "cache")
    (saved / "modeling.py").write_text("SCALE = 1")
    assert digest_of(saved, tmp_path / "cache") == plain
    one = digest_of(saved, tmp_path / "cache", trust_remote_code=True)
    (saved / "modeling.py").write_text("SCALE = 22")
    assert digest_of(saved, tmp_path / "cache", trust_remote_code=True) != one


def overwrite_unnoticed(weights: Path) -> None:
    """Other bytes in place, with the same size and modification time, as `rsync -t` and unpacked
    images leave them."""
    before = weights.stat()
    weights.write_bytes(bytes(before.st_size))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = weights.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_weights_that_were_changed_in_place_are_another_model_though_size_and_time_are_the_same(
    saved: Path, tmp_path: Path
) -> None:
    original = digest_of(saved, tmp_path / "cache")
    overwrite_unnoticed(saved / "model.safetensors")
    assert (
        digest_of(saved, tmp_path / "cache")
        == digest_of(saved, tmp_path / "no cache yet")
        != original
    )


def test_files_that_did_not_change_are_not_read_again_until_they_are_forgotten(
    saved: Path, tmp_path: Path
) -> None:
    original = digest_of(saved, tmp_path / "cache")
    for note in (tmp_path / "cache" / "weights").iterdir():
        note.write_text("0" * 64)  # what nobody would find by reading
    assert digest_of(saved, tmp_path / "cache") != original
    forget_identity(ModelSection(model=str(saved)), cache_dir=tmp_path / "cache")
    assert digest_of(saved, tmp_path / "cache") == original


def test_a_model_is_loaded_with_the_digest_of_what_its_files_hold_now(
    saved: Path, tmp_path: Path
) -> None:
    section = ModelSection(model=str(saved))
    planned = digest_of(saved, tmp_path / "cache")
    assert digest_beside(section, lambda: "loaded") == ("loaded", planned)
    overwrite_unnoticed(saved / "model.safetensors")
    assert digest_beside(section, lambda: "loaded") == (
        "loaded",
        digest_of(saved, tmp_path / "no cache yet"),
    )
    assert digest_beside(ModelSection(model="owner/name"), lambda: "loaded") == ("loaded", None)


def test_files_that_change_while_they_are_loaded_are_refused(saved: Path) -> None:
    """Or a copy that goes on might be loaded before it, and hashed after it."""
    section = ModelSection(model=str(saved))
    with pytest.raises(
        ChangedWeightsError, match="changed while they were loaded; run the same command again"
    ):
        digest_beside(section, lambda: overwrite_unnoticed(saved / "model.safetensors"))
    with pytest.raises(ChangedWeightsError):
        digest_beside(section, lambda: (saved / "model-00002.safetensors").touch())


def test_a_cache_of_hashes_that_cannot_be_written_is_named_with_the_way_to_another(
    saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError,
        match=rf"the cache {tmp_path}/file/cache cannot be written: Not a directory.*set "
        r"XDG_CACHE_HOME",
    ):
        digest_of(saved, tmp_path / "file" / "cache")
    with small_disk(tmp_path / "disk", num_bytes=4096) as disk:
        (disk / "full").write_bytes(bytes(4096))
        with pytest.raises(
            UserError,
            match=rf"the cache {disk}/cache cannot be written: No space left.*make room on that "
            r"disk",
        ):
            digest_of(saved, disk / "cache")


def test_a_torn_cache_entry_is_computed_again(saved: Path, tmp_path: Path) -> None:
    original = digest_of(saved, tmp_path / "cache")
    for note in (tmp_path / "cache" / "weights").iterdir():
        note.write_text("0123")
    assert digest_of(saved, tmp_path / "cache") == original


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json.*merged"):
        model_identity(ModelSection(model=str(tmp_path)), cache_dir=tmp_path)


def test_a_commit_is_itself(tmp_path: Path) -> None:
    identity = model_identity(ModelSection(model="owner/name", revision=COMMIT), cache_dir=tmp_path)
    assert (identity.digest, identity.revision) == (COMMIT, COMMIT)


def test_without_a_network_the_cached_copy_tells_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "snapshots" / COMMIT / "config.json").write_text("{}")
    identity = model_identity(ModelSection(model="owner/name"), cache_dir=tmp_path)
    assert (identity.digest, identity.revision) == (COMMIT, COMMIT)
    with pytest.raises(ModelError, match=r"owner/other cannot be loaded.*the hub was not reached"):
        model_identity(ModelSection(model="owner/other"), cache_dir=tmp_path)
