"""Which weights a model has, told without reading terabytes twice: the same weights have the same digest in every year."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from stillhouse import atomic
from stillhouse.config import ModelSection
from stillhouse.errors import ModelError
from stillhouse.modelpath import source_of
from stillhouse.models.sources import unusable

WEIGHT_FILES = ("config.json", "*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A hub model is its commit, a local one the hash of its files; `revision` pins the former and is None for the latter."""

    digest: str
    revision: str | None


def model_identity(section: ModelSection, *, cache_dir: Path) -> ModelIdentity:
    """Identify weights without reading terabytes twice: file hashes are kept in `cache_dir`.

    Raises ModelError: no such model or revision, or neither network nor a cached copy to tell its commit.
    """
    source = source_of(section.model)
    if not Path(source).is_dir():
        commit = _hub_commit(section.model, section.revision)
        return ModelIdentity(commit, revision=commit)
    patterns = (*WEIGHT_FILES, "*.py") if section.trust_remote_code else WEIGHT_FILES
    files = sorted(file for pattern in patterns for file in Path(source).glob(pattern))
    if not any(file.name == "config.json" for file in files):
        raise ModelError(f"{section.model} has no config.json; give the directory of a saved model (an adapter has to be merged first)")
    listing = [(file.name, _file_digest(file, cache_dir / "weights")) for file in files]
    return ModelIdentity(hashlib.sha256(json.dumps(listing).encode()).hexdigest(), revision=None)


def _file_digest(file: Path, cache_dir: Path) -> str:
    stat = file.stat()
    key = hashlib.sha256(json.dumps([str(file.resolve()), stat.st_size, stat.st_mtime_ns]).encode()).hexdigest()
    note = cache_dir / key
    if note.exists() and re.fullmatch(r"[0-9a-f]{64}", known := note.read_text()):
        return known
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    atomic.make_directory(cache_dir)
    atomic.replace(note, digest.encode())
    return digest


def _hub_commit(model: str, revision: str | None) -> str:
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        commit = HfApi().model_info(model, revision=revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise unusable("model", model, error) from error
    except Exception as error:  # no network, in whichever of its shapes: a cached copy knows its commit
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise unusable("model", model, error) from error
        commit = Path(cached).parent.name
    assert commit is not None
    return commit
