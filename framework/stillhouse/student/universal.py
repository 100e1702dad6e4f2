"""DeepSpeed's universal checkpoints: the format that any number of ranks can load."""

import io
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from deepspeed.checkpoint import ds_to_universal

from stillhouse.checkpoint.unpickling import only_tensors
from stillhouse.errors import CheckpointError


def convert(folder: Path, out: Path) -> None:
    """Convert the checkpoint in `folder` to a universal one in `out`, in this process. Raises
    CheckpointError where it cannot be converted."""
    options = Namespace(
        input_folder=str(folder),
        output_folder=str(out),
        # more are processes, each of which imports everything first, and opens files by itself
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # stages 1 and 2 save none of what it reads
    )
    printed = io.StringIO()
    try:
        with only_tensors(), redirect_stdout(printed), redirect_stderr(printed):
            ds_to_universal.main(options)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint in {folder} cannot be converted to another number of ranks "
            f"({error!r}); go on with the number of ranks that wrote it"
        ) from error
