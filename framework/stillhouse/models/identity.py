"""A model's identity: a digest of its weights, computed without reading terabytes twice.

The same weights always have the same digest.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from stillhouse import atomic
from stillhouse.cache import writing_cache
from stillhouse.config import ModelSection
from stillhouse.errors import ChangedWeightsError, ModelError
from stillhouse.model_path import source_of
from stillhouse.models.sources import unusable

_Loaded = TypeVar("_Loaded")

_FILES_AT_ONCE = 4  # hashed while the model loads: sha256 takes a core for every 1 to 2 GB/s
WEIGHT_FILES = ("config.json", "*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Of a model from the hub its commit, of a local one the hash of its files, of one behind an
    API that of its names; where no model is asked, that of the rule for a target, and of facts."""

    digest: str
    revision: str | None  # the commit to load; None for a local model
    kind: Literal["weights", "api", "text"] = "weights"
    served_model: str | None = None  # the name under which an API has it


def model_identity(section: ModelSection, *, cache_dir: Path) -> ModelIdentity:
    """The identity of a model's weights. Hashes of local files are kept in `cache_dir`.

    Raises ModelError: no such model or revision, or neither network nor a cached copy from which
    its commit is known. Raises CacheError.
    """
    if not is_local(section):
        commit = _hub_commit(section.model, section.revision)
        return ModelIdentity(commit, revision=commit)
    files = _files_of(section)
    digests = [_noted_hash(file, cache_dir) for file in files]
    return ModelIdentity(_digest_of(files, digests), revision=None)


def forget_identity(section: ModelSection, *, cache_dir: Path) -> None:
    """Drop the hashes of a local model's files from `cache_dir`: the next identity is computed from
    every byte of them."""
    notes = [_note_of(file, cache_dir) for file in _files_of(section)]
    with writing_cache(cache_dir):
        atomic.unlink(notes)


def digest_beside(section: ModelSection, load: Callable[[], _Loaded]) -> tuple[_Loaded, str | None]:
    """What `load` returns for a model, and the digest of the local files that it read, all of whose
    bytes are hashed meanwhile.

    The digest is None for a model from the hub, whose commit was given. Raises ChangedWeightsError
    where the files change meanwhile.
    """
    if not is_local(section):
        return load(), None
    files = _files_of(section)
    before = [_stamp(file) for file in files]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        digests = [threads.submit(_hash, file) for file in files]
        loaded = load()
        digest = _digest_of(files, [each.result() for each in digests])
    if before != [_stamp(file) for file in _files_of(section)]:
        raise ChangedWeightsError(
            f"the files of {section.model} changed while they were loaded; run the same command "
            "again once they rest"
        )
    return loaded, digest


def is_local(section: ModelSection) -> bool:
    return Path(source_of(section.model)).is_dir()


def _files_of(section: ModelSection) -> list[Path]:
    """The files that decide what a local model computes. Raises ModelError where there is no config
    among them."""
    patterns = (*WEIGHT_FILES, "*.py") if section.trust_remote_code else WEIGHT_FILES
    folder = Path(source_of(section.model))
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    if not any(file.name == "config.json" for file in files):
        raise ModelError(
            f"{section.model} has no config.json; give the directory of a saved model (an adapter "
            "has to be merged first)"
        )
    return files


def _digest_of(files: Sequence[Path], digests: Iterable[str]) -> str:
    listing = [(file.name, digest) for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stamp(file: Path) -> list[object]:
    """Values that change with a file's bytes: a tool can keep its size and modification time, but
    not the time of its last change (ctime)."""
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _note_of(file: Path, cache_dir: Path) -> Path:
    """The file that holds the hash of a model's file, as long as that one does not change."""
    return cache_dir / "weights" / hashlib.sha256(json.dumps(_stamp(file)).encode()).hexdigest()


def _noted_hash(file: Path, cache_dir: Path) -> str:
    """The sha256 of a file: kept from before, or computed and kept."""
    note = _note_of(file, cache_dir)
    with writing_cache(cache_dir):
        if note.exists() and re.fullmatch(r"[0-9a-f]{64}", known := note.read_text()):
            return known
    digest = _hash(file)
    with writing_cache(cache_dir):
        atomic.make_directory(note.parent)
        atomic.replace(note, digest.encode())
    return digest


def _hub_commit(model: str, revision: str | None) -> str:
    """The commit of a revision on the hub, or in the cache where the hub does not answer."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        commit = HfApi().model_info(model, revision=revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise unusable("model", model, error) from error
    except Exception as error:  # no network, in any form: the path of a cached copy has the commit
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise unusable("model", model, error) from error
        commit = Path(cached).parent.name
    assert commit is not None
    return commit
