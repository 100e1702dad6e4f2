"""The language model's weights in a checkpoint, as a plain state dict."""

import io
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from stillhouse.checkpoint.manifest import Commit
from stillhouse.checkpoint.unpickling import only_tensors, opened
from stillhouse.errors import CheckpointError
from stillhouse.student.adapters import FROZEN

_WHOLE_MODULE = "mp_rank_00_model_states.pt"  # up to stage 2, rank 0 saves the whole module
_PREFIX = "lm."  # of the language model in `StudentModule`


def weight_files(commit: Commit) -> Iterable[str]:
    """The files of a commit that `consolidated_weights` reads."""
    return commit.files if commit.origin.zero_stage == 3 else (_WHOLE_MODULE,)


def frozen_digest_in(folder: Path) -> str | None:
    """The digest of the frozen weights beside which those in a checkpoint's folder were trained;
    None where its files do not say."""
    for file in sorted(folder.glob("*mp_rank_00_model_states.pt")):
        digest: str | None = opened(file, map_location="meta").get(FROZEN)
        return digest
    return None


def consolidated_weights(folder: Path, *, zero_stage: int) -> dict[str, Tensor]:
    """The weights of the language model in a checkpoint's folder by Hugging Face's names, in the
    training dtype, or at stage 3 in float32; frozen ones are not in it.

    Raises CheckpointError where the files hold anything else.
    """
    try:
        if zero_stage == 3:
            root, tag = str(folder.parent), folder.name
            with only_tensors(), redirect_stdout(io.StringIO()):  # it prints each of its steps
                weights = get_fp32_state_dict_from_zero_checkpoint(root, tag=tag)
        else:
            weights = opened(folder / _WHOLE_MODULE)["module"]
        return {
            name.removeprefix(_PREFIX): value
            for name, value in weights.items()
            if name.startswith(_PREFIX)
        }
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint in {folder} does not hold a model's weights ({error!r}); remove its "
            "manifest to use an older one"
        ) from error
