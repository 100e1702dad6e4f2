"""`stillhouse check`, its second part: the store, the targets, and what the student's divergence
learns from them."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from stillhouse.checkpoint.choice import newest_step
from stillhouse.cli.findings import Findings, bullets, size_words
from stillhouse.cluster.machine import why_not_writable
from stillhouse.errors import CheckpointError, ChunkError, ConfigError, StoreError
from stillhouse.logits import decode, kept_mass
from stillhouse.losses.divergences import divergence_named, is_unbiased_with_draws
from stillhouse.pipeline import Plan
from stillhouse.store import StoredRecipe, differences, list_recipes, nearest
from stillhouse.student.pairing import LEAST_KEPT_MASS, depends_on_kept_mass, require_kept_mass

_QUIET_TARGETS = 2048  # of a step, with which weighted draws came to 75 % for reverse KL
_MOST_DIFFERENCES = 4  # differing fields up to which another recipe is a near one


def check_store(plan: Plan, found: Findings) -> None:
    """Describe targets and store, what is in it already, and how the divergence pairs with it."""
    recipe, url, num_chunks = plan.recipe, plan.config.store.url, len(plan.chunks)

    # what is there
    stored = _stored(plan, found)
    is_there = any(other.recipe == recipe for other in stored)
    present = plan.store.published() & set(plan.chunks) if is_there else set()

    _writable(plan, found, is_complete=len(present) == num_chunks)

    # what will be
    per_chunk = plan.bytes_per_chunk
    ahead = min(plan.window_chunks, num_chunks)
    draws = f", {recipe.num_draws} draws from the tail" if recipe.num_draws else ""
    spec = recipe.spec
    found.add(
        "targets", f"k = {recipe.k}{draws}, {spec.codec_name}: {spec.bytes_per_token:,} bytes each"
    )
    found.add(
        "store",
        f"{url}/{recipe.fingerprint[:16]}",
        f"{num_chunks:,} chunks of {recipe.chunk_sequences:,} sequences, {size_words(per_chunk)} "
        f"each; {len(present):,} are there already",
        f"{size_words(num_chunks * per_chunk)} in all",
    )
    found.add(
        "window",
        f"teachers run up to {ahead:,} chunks ahead of the student: "
        f"{size_words(ahead * per_chunk)}",
    )
    allowed = plan.config.store.window_bytes
    if ahead < num_chunks and plan.window_chunks * per_chunk > allowed:
        found.notes.append(
            f"store.window_bytes is {size_words(allowed)}, less than a student may need for one "
            "step; lower store.chunk_sequences or student.shuffle_window_chunks to come within it"
        )

    # what teaches, and what nearly would
    _pairing(plan, present, found)
    near = nearest([other.recipe for other in stored], recipe)
    if near is not None and not is_there and len(differences(recipe, near)) <= _MOST_DIFFERENCES:
        found.notes.append(
            f"the store has {near.fingerprint[:16]}, which would serve but for these (this run's "
            "value first):\n" + bullets(differences(recipe, near), "    ")
        )


def _pairing(plan: Plan, present: Collection[int], found: Findings) -> None:
    """Note what the student's divergence does not use of the targets, and find whether training
    would refuse them."""
    student, recipe = plan.config.student, plan.recipe
    divergence = divergence_named(student.divergence, student.mix)
    weighted = recipe.spec.weighted
    is_unbiased = recipe.num_draws and is_unbiased_with_draws(divergence, weighted=weighted)
    if student.divergence_weight == 0.0:
        return
    if is_unbiased:
        _noise(plan, found)
        return

    # what it does not use
    unused = (
        f"learns nothing from the {recipe.num_draws} draws a token and " if recipe.num_draws else ""
    )
    cure = (
        "store draws that it can use: target.weighted_draws = true, target.tail_draws = 25"
        if divergence.generator is not None
        else "unless another student reads this store, spend their bytes on entries: "
        "target.k = 64, target.tail_draws = 0"
        if unused
        else "with target.tail_draws above 0 forward_kl would be unbiased"
    )
    found.notes.append(
        f"student.divergence is {student.divergence}, which {unused}sees all but the {recipe.k} "
        f"kept entries as one bucket; {cure}"
    )
    if not depends_on_kept_mass(student, recipe.spec):
        return

    # whether the entries hold enough
    mass = _kept_mass_of_the_first_batch(plan, present)
    if mass is None:
        found.notes.append(
            "training stops before its first step unless the kept entries hold "
            f"{LEAST_KEPT_MASS:.0%} of the teacher's mass in the first"
            " batch, whose chunks are not there yet, or student.tail_as_bucket = true"
        )
        return
    found.add("", f"the kept entries hold {mass:.1%} of the teacher's mass in the first batch")
    try:
        if not _has_begun(plan.jobs[0].checkpoints):
            require_kept_mass(student, recipe.spec, kept_mass=mass)
    except (ConfigError, CheckpointError, StoreError) as error:
        found.obstacles.append(str(error))


def _noise(plan: Plan, found: Findings) -> None:
    """Note pairings that are right on average and noisy: docs/benchmarks.md, "What each divergence
    learns"."""
    student, sequences = plan.config.student, plan.sources.train
    is_forward = student.divergence == "forward_kl"
    if not plan.recipe.weighted:
        return
    if is_forward:
        found.notes.append(
            "forward_kl learns more from blind draws of the same bytes: unless another student "
            "reads this store, target.weighted_draws = false, target.tail_draws = 40"
        )
    elif student.init == "config" and not student.forward_kl_steps:
        found.notes.append(
            f"weighted draws took students that began with random weights away from a flat "
            f"teacher under {student.divergence}; set student.forward_kl_steps to about "
            f"{max(1, plan.total_steps // 3):,}, a third of the steps"
        )
    per_step = student.global_batch_sequences * sequences.num_targets / sequences.num_sequences
    if not is_forward and student.divergence != "tvd" and per_step < _QUIET_TARGETS:
        found.notes.append(
            f"a step has {per_step:,.0f} targets: of 256 a step, weighted draws brought "
            f"{student.divergence} half of what the whole distribution gains under a flat teacher, "
            f"larger batches bring more; take {_QUIET_TARGETS:,}, or where the teacher is sharp, "
            "entries alone: target.k = 34, target.tail_draws = 0"
        )


def _has_begun(checkpoints: str) -> bool:
    """Whether training resumes from a commit. A directory that is not there is not opened, since
    that would make it."""
    return ("://" in checkpoints or Path(checkpoints).is_dir()) and newest_step(checkpoints) > 0


def _kept_mass_of_the_first_batch(plan: Plan, present: Collection[int]) -> float | None:
    """The mean kept mass that the ranks will measure; None where a chunk of the first batch is not
    there, or cannot be read."""
    numbers, rows = np.divmod(plan.order.sequences(0), plan.recipe.chunk_sequences)
    if not present or not set(numbers.tolist()) <= set(present):
        return None
    try:
        chunks = [
            plan.store.fetch_rows(number, rows[numbers == number])
            for number in np.unique(numbers).tolist()
        ]
        targets = [decode(torch.from_numpy(chunk.targets_NB), plan.recipe.spec) for chunk in chunks]
    except (ChunkError, StoreError):
        return None
    return float(torch.cat([kept_mass(target) for target in targets]).mean())


def _stored(plan: Plan, found: Findings) -> list[StoredRecipe]:
    """The recipes in the store. What keeps it from being read becomes an obstacle; nothing is
    written to find out."""
    try:
        where = plan.store.url
        if where.startswith("memory:"):
            raise StoreError(
                f"{where} cannot be shared between processes; give a directory or a bucket"
            )
        return list_recipes(where)
    except StoreError as error:
        found.obstacles.append(f"store.url: {error}")
        return []


def _writable(plan: Plan, found: Findings, *, is_complete: bool) -> None:
    """A directory that may only be read stops `run`, but not `train` once all chunks are there."""
    try:
        directory = plan.store.blobs.directory
    except StoreError:  # `_stored` has named it
        return
    reason = why_not_writable(directory) if directory is not None else None
    if reason is not None and is_complete:
        found.notes.append(
            f"{reason}: all chunks are there, so `stillhouse train` reads them; `run` would stop"
        )
    elif reason is not None:
        found.obstacles.append(f"store.url: {reason}; name another place")
