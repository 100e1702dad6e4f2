"""Sequences that were read from a store: whether their values mean anything."""

from stillhouse.errors import ChunkError
from stillhouse.sequence import Sequences


def check_sequences(sequences: Sequences, name: str, *, vocab_size: int) -> None:
    """Raise ChunkError on values that are well hashed, and yet mean nothing; `name` is that of what
    holds them."""
    ids, positions, mask = sequences.arrays
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ChunkError(
            f"{name} has token ids from {ids.min()} to {ids.max()}, wanted 0 to {vocab_size - 1}"
        )
    if mask.any() and (mask.max() > 1 or mask[:, -1].any()):
        raise ChunkError(
            f"{name} has a loss_mask that is not 0 or 1, or that is not 0 in the last column"
        )
    restarts = positions[:, 1:] == 0
    if positions[:, 0].any() or not (restarts | (positions[:, 1:] == positions[:, :-1] + 1)).all():
        raise ChunkError(f"{name} has positions that neither count up nor restart at 0")
    if (mask[:, :-1].astype(bool) & restarts).any():
        raise ChunkError(
            f"{name} has a loss_mask of 1 at the last token of a document, whose next token is of "
            "another"
        )
