"""DeepSpeed's private interfaces: each private name that is relied on, behind a function whose
docstring gives the reason.

No other file of the package uses a private name of DeepSpeed's. Its version is capped in
pyproject.toml; tests/unit/test_deepspeed_compat.py holds what must be true before the cap is
raised.
"""

import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import Tensor

from stillhouse.checkpoint.snapshot import OnDisk
from stillhouse.errors import ConfigError

_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


def initialize(**options: Any) -> Any:
    """The engine of `deepspeed.initialize`, without the two compilers that it would load or look
    for.

    `deepspeed.ops.__compatible_ops__` is filled on first use by looking for a C++ compiler, and the
    first engine on a CPU then compiles for a minute.
    """
    deepspeed.ops.__compatible_ops__ = {}
    import_muon()
    engine, *_ = deepspeed.initialize(**options)
    return engine


def import_muon() -> None:
    """Import Muon, as every engine does, with `torch.compile` set aside: its decorators load
    torch's compiler, which takes 0.7 s."""
    compiles = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        importlib.import_module(_MUON)
    finally:
        torch.compile = compiles


def save_through(engine: Any, writer: CheckpointEngine) -> None:
    """Make `engine.save_checkpoint` hand all files to the writer, and write none itself: it copies
    scripts into a checkpoint otherwise."""
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = lambda _folder: None


def forget_swap_folder(engine: Any) -> None:
    """Take the folder of swapped states, which is open now, out of the config that DeepSpeed writes
    into checkpoints: no path of a machine belongs there."""
    engine.config["zero_optimization"]["offload_optimizer"]["nvme_path"] = None


def load_async_io() -> None:
    """Load DeepSpeed's reads and writes of swapped states, which the first process on a machine
    compiles. Raises ConfigError where that is not possible."""
    try:
        AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        raise ConfigError(
            f'student.offload is "nvme", for which DeepSpeed compiles its op async_io: {error}; '
            "install libaio's headers (libaio-dev) and a C++ compiler on every machine, or set "
            'student.offload = "cpu"'
        ) from None


def swapped_states(engine: Any) -> dict[int, OnDisk]:
    """Where the values of swapped states are, by the ids of their tensors, which are empty between
    two steps. DeepSpeed copies the folder of all of them into a checkpoint, from which it restores
    neither the moments nor the number of steps: so they are written as states in memory are."""
    return {
        id(state.compute_tensor): OnDisk(Path(state.swap_path), info.numel())
        for group in _swapped_groups(engine.optimizer)
        for info in [engine.optimizer.optimizer_swapper.swap_params_info[group.ds_id]]
        for state in info.tensors
    }


@contextmanager
def as_if_in_memory(engine: Any) -> Iterator[None]:
    """While the block lasts, the engine saves and loads as one whose states are not swapped."""
    groups = _swapped_groups(engine.optimizer)
    if groups:
        engine.optimizer.swap_optimizer = False
    try:
        yield
    finally:
        if groups:
            engine.optimizer.swap_optimizer = True


def _swapped_groups(optimizer: Any) -> list[Any]:
    """The float32 weights, one tensor a group, that are swapped with their states: those of at
    least a MiB, at stage 3."""
    if not getattr(optimizer, "swap_optimizer", False):
        return []
    known = optimizer.optimizer_swapper.swap_params_info
    return [group for group in optimizer.fp32_partitioned_groups_flat if group.ds_id in known]


def load(engine: Any, folder: Path, *, universal: bool) -> dict[str, Any] | None:
    """Load a checkpoint, as it is or universal, which DeepSpeed reads from its config alone.
    Returns the client's state in it; None where there was no checkpoint."""
    settings = [dict(group, params=None) for group in engine.optimizer.param_groups]
    engine._config.load_universal_checkpoint = universal
    # swapped states are loaded into memory, and swapped out afterwards
    swapped, on_disk = _swapped_groups(engine.optimizer), swapped_states(engine)
    for group in swapped:
        group.data = torch.empty(on_disk[id(group)].num_values)
    # one of its optimisers prints what it does
    with redirect_stdout(io.StringIO()), as_if_in_memory(engine):
        path, state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    engine._config.load_universal_checkpoint = False
    if path is None:
        return None
    if universal:
        _repair(engine.optimizer, settings)
    if swapped:
        engine.optimizer.optimizer_swapper.purge_state()
    for group in swapped:
        _swap_out(engine.optimizer.optimizer_swapper, group)
    return dict(state)


def _swap_out(swapper: Any, group: Any) -> None:
    """Write a group, all of which is in common memory, to its files. `swap_out_optimizer_state`
    wants some of it in the swapper's own buffers, as it is after a step."""
    info = swapper._get_param_swap_info(group)
    buffers = swapper.swap_buffer_manager.allocate_all(
        num_elems=swapper.largest_numel, dtype=swapper.dtype
    )
    swapper._swap_out_unpinned_tensors(
        aio_handle=swapper.aio_handle,
        unpinned_tensors=info.get_compute_tensors(),
        dest_paths=info.get_swap_paths(),
        pinned_buffers=buffers,
    )
    swapper.swap_buffer_manager.free(buffers)
    info.release_memory()


def _repair(optimizer: Any, settings: list[dict[str, Any]]) -> None:
    """Undo what DeepSpeed 0.19.8 does wrong as it loads a universal checkpoint at stage 3.

    It gives every group the settings of the first, so that gains would decay like matrices. And it
    gives all states one tensor to count steps in, which would then count each step once for each
    group.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group["weight_decay"] = own["weight_decay"]
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
