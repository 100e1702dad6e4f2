"""Whether a local model's weights are complete, by the headers of its files: before a model is
loaded or a file is hashed."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from stillhouse.errors import ModelError
from stillhouse.model_path import source_of

WHOLE, INDEX, _PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin*"
_LFS_POINTER = b"version https://git-lfs"


def require_whole_weights(model: str) -> None:
    """Raise ModelError where a local model has no weights, or a safetensors file that is absent,
    cut short or damaged.

    A model from the hub was checked when it was fetched. Pickles have no header with their size.
    """
    folder = Path(source_of(model))
    if not (folder / "config.json").is_file():
        return  # a name on the hub, or no model's directory, which `model_identity` refuses
    files = list(_weight_files(folder))
    if not files and not any(folder.glob(_PICKLED)):
        raise ModelError(
            f"{model} has a config.json and no weights; put {WHOLE}, or {INDEX} and the files "
            'that it names, beside it (a student may start without: student.init = "config")'
        )
    for file in files:
        _require_whole(file)


def _weight_files(folder: Path) -> Iterable[Path]:
    """The files that are loaded: one, or those that an index names."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged ({error}); fetch it again") from None


def _require_whole(file: Path) -> None:
    """Raise ModelError where a safetensors file is absent, cut short or damaged."""
    try:
        with safe_open(file, framework="np"):  # compares the header with the file's size
            return
    except FileNotFoundError:
        raise ModelError(f"{file} is absent, but {INDEX} names it; fetch the whole model") from None
    except (OSError, SafetensorError) as error:
        if _begins_as_pointer(file):
            raise ModelError(
                f"{file} is a pointer of Git LFS, not the weights; run `git lfs pull` in its "
                "directory"
            ) from None
        raise ModelError(
            f"{file} is cut short or damaged: of {file.stat().st_size:,} bytes, not what its "
            f"header promises ({error}); fetch it again"
        ) from None


def _begins_as_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_LFS_POINTER)) == _LFS_POINTER
