"""One shard of rollouts as bytes: what a model wrote to a block of prompts, as a safetensors file
whose checksum covers every byte after its header.

Shapes: S rollouts of a shard, L tokens of one, K entries of a token, T tokens that have them,
J = K - 1.

docs/format.md, section 9, has the format.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import xxhash

from stillhouse.errors import ChunkError
from stillhouse.sequence import Sequences
from stillhouse.store.chunk_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Buffer,
    TensorSpec,
    check_tensors,
    header_length,
    metadata_of,
    parse_object,
)
from stillhouse.store.recipe import canonical_json
from stillhouse.store.stored_sequences import check_sequences

ENDED, CUT, SET_ASIDE = range(3)  # values of `finish`
UNCHANGING = -1  # the version of weights that never change
NO_ENTRY = -1  # in place of an id
ROUNDING = 1e-3  # by which the probabilities that an API gives for a token may exceed 1


@dataclass(frozen=True, slots=True, eq=False)
class TopLogprobs:
    """Log-probabilities that an API returned with its tokens: of the likeliest K at each place,
    under its model's softmax."""

    # by logprob descending, ties by id ascending; where there are none all K are NaN and NO_ENTRY
    logprobs_SLK: npt.NDArray[np.float32]
    ids_SLK: npt.NDArray[np.int32]

    @classmethod
    def nothing(cls, num_rows: int, length: int, num_entries: int) -> "TopLogprobs":
        shape = (num_rows, length, num_entries)
        return cls(np.full(shape, np.nan, np.float32), np.full(shape, NO_ENTRY, np.int32))

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """bool [S, L]: where there are entries."""
        has_entries_SL: npt.NDArray[np.bool_] = self.ids_SLK[..., 0] != NO_ENTRY
        return has_entries_SL


@dataclass(frozen=True, slots=True, eq=False)
class Rollouts:
    """S rollouts, the samples of one prompt after another."""

    number: int  # of the shard
    sequences: Sequences  # loss mask: 1 before each token that was sampled
    prompts_S: npt.NDArray[np.int64]
    samples_S: npt.NDArray[np.int64]  # the number of each among those of its prompt
    weights_version_S: npt.NDArray[np.int64]
    # of the next token under the distribution that it was drawn from, NaN where that is not known;
    # 0 where the mask is 0
    sampled_logprobs_SL: npt.NDArray[np.float32]
    finish_S: npt.NDArray[np.uint8]  # ENDED, CUT or SET_ASIDE
    top: TopLogprobs | None = None  # None where the recipe asks for none

    def __len__(self) -> int:
        return len(self.sequences)

    def ids(self, row: int) -> npt.NDArray[np.int32]:
        """Of a prompt and its sample, without padding; none where it was set aside."""
        sampled = np.flatnonzero(self.sequences.loss_mask_SL[row])
        end = int(sampled[-1]) + 2 if len(sampled) else 0
        return self.sequences.token_ids_SL[row, :end]

    def sampled_ids(self, row: int) -> npt.NDArray[np.int32]:
        """Those that were sampled."""
        sampled = np.flatnonzero(self.sequences.loss_mask_SL[row]) + 1
        ids: npt.NDArray[np.int32] = self.sequences.token_ids_SL[row, sampled]
        return ids

    @property
    def rows_with_logprobs(self) -> npt.NDArray[np.bool_]:
        """bool [S]: that have them at every sampled token, but perhaps the end."""
        if self.top is None:
            return np.zeros(len(self), np.bool_)
        return np.asarray(self.top.mask.any(axis=1), np.bool_)

    @property
    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """By their names in a file."""
        tensors: dict[str, npt.NDArray[Any]] = {
            "prompts": self.prompts_S,
            "samples": self.samples_S,
            "weights_version": self.weights_version_S,
            "sampled_logprobs": self.sampled_logprobs_SL,
            "positions": self.sequences.positions_SL,
            "token_ids": self.sequences.token_ids_SL,
            "finish": self.finish_S,
            "loss_mask": self.sequences.loss_mask_SL,
        }
        if self.top is not None:
            tensors |= {"top_logprobs": self.top.logprobs_SLK, "top_ids": self.top.ids_SLK}
        return tensors


def bytes_of_rollout(length: int, *, num_entries: int) -> int:
    """Of the tensors of one rollout of so many tokens, with so many entries of each."""
    return sum(tensor.num_bytes for tensor in _layout(1, length, num_entries))


def pack_rollouts(rollouts: Rollouts, fingerprint: str) -> bytes:
    """The file of a shard, of the recipe with this fingerprint. The same values are the same bytes.
    Raises ChunkError, as `unpack_rollouts` does, on values that mean nothing."""
    top = rollouts.top
    num_entries = 0 if top is None else top.ids_SLK.shape[-1]
    num_rows, length = rollouts.sequences.token_ids_SL.shape
    layout = _layout(num_rows, length, num_entries)
    for tensor in layout:
        array = rollouts.tensors[tensor.name]
        if (array.dtype, array.shape) != (tensor.numpy_dtype, tensor.shape):
            raise ChunkError(
                f"shard {rollouts.number} has {tensor.name} of {array.dtype} {list(array.shape)}, "
                f"wanted {tensor.numpy_dtype.name} {list(tensor.shape)}"
            )
    _check_values(rollouts)
    tensors = {each.name: np.ascontiguousarray(rollouts.tensors[each.name]) for each in layout}
    body = b"".join(each.tobytes() for each in tensors.values())
    about = {
        "fingerprint": fingerprint,
        "number": rollouts.number,
        "xxh3": xxhash.xxh3_64_hexdigest(body),
    }
    data = safetensors.numpy.save(tensors, {"stillhouse": canonical_json(about).decode("ascii")})
    assert data.endswith(body), "safetensors puts the widest tensors first, then goes by name"
    return data


def unpack_rollouts(data: Buffer, fingerprint: str, number: int) -> Rollouts:
    """Read a whole shard. Raises ChunkError naming it unless every byte is what was published, and
    means something."""
    # the header, and the checksum of all behind it
    view, name = memoryview(data), f"shard {number}"
    header, checksum = _parse_start(view, fingerprint, number)
    body = view[LENGTH_BYTES + header_length(view) :]
    found = xxhash.xxh3_64_hexdigest(body)
    if found != checksum:
        raise ChunkError(f"{name} is damaged: it hashes to {found}, {checksum!r} was published")
    # the tensors
    layout = _layout_in(header, name)
    check_tensors(header, layout, name)
    wanted = sum(tensor.num_bytes for tensor in layout)
    if len(body) != wanted:
        raise ChunkError(f"{name} has {len(body)} bytes of tensors, wanted {wanted}")
    arrays, start = {}, 0
    for tensor in layout:
        piece = body[start : start + tensor.num_bytes]
        arrays[tensor.name] = np.frombuffer(piece, tensor.numpy_dtype).reshape(tensor.shape)
        start += tensor.num_bytes
    # what they mean
    top = TopLogprobs(arrays["top_logprobs"], arrays["top_ids"]) if "top_ids" in arrays else None
    rollouts = Rollouts(
        number,
        Sequences(arrays["token_ids"], arrays["positions"], arrays["loss_mask"]),
        arrays["prompts"],
        arrays["samples"],
        arrays["weights_version"],
        arrays["sampled_logprobs"],
        arrays["finish"],
        top,
    )
    _check_values(rollouts)
    return rollouts


def checksum_in(start: Buffer, fingerprint: str, number: int) -> str:
    """The checksum that a shard carries, by the first bytes of its file, in which its header ends.
    What it is of is not looked at. Raises ChunkError."""
    _, checksum = _parse_start(memoryview(start), fingerprint, number)
    if type(checksum) is not str:
        raise ChunkError(f"shard {number} carries the checksum {checksum!r}, wanted text")
    return checksum


class TokenPlaces(NamedTuple):
    """Where in a shard's file the tokens of its rollouts are."""

    ids_at: int  # the byte of the first rollout's first id
    mask_at: int  # that of its mask
    length: int  # tokens of a rollout


def token_places(start: Buffer, fingerprint: str, number: int) -> TokenPlaces:
    """By the first bytes of a shard's file, in which its header ends. Raises ChunkError."""
    view, name = memoryview(start), f"shard {number}"
    header, _ = _parse_start(view, fingerprint, number)
    layout = _layout_in(header, name)
    check_tensors(header, layout, name)
    ends = accumulate(tensor.num_bytes for tensor in layout)
    first = LENGTH_BYTES + header_length(view)
    begins = {
        tensor.name: first + end - tensor.num_bytes
        for tensor, end in zip(layout, ends, strict=True)
    }
    length = next(tensor.shape[1] for tensor in layout if tensor.name == "token_ids")
    return TokenPlaces(begins["token_ids"], begins["loss_mask"], length)


def _layout_in(header: Mapping[str, Any], name: str) -> list[TensorSpec]:
    """The layout that a header's shapes ask for. Raises ChunkError where they are none."""
    match header.get("token_ids"):
        case {"shape": [int(num_rows), int(length)]} if num_rows >= 0 and length >= 2:
            pass
        case strange:
            raise ChunkError(f"{name} has token_ids of {strange!r}, wanted a shape of two numbers")
    match header.get("top_ids"):
        case None:
            return _layout(num_rows, length, 0)
        case {"shape": [_, _, int(num_entries)]} if num_entries >= 1:
            return _layout(num_rows, length, num_entries)
        case strange:
            raise ChunkError(f"{name} has top_ids of {strange!r}, wanted a shape of three numbers")


def _layout(num_rows: int, length: int, num_entries: int) -> list[TensorSpec]:
    """The tensors of a shard in the order of their bytes; two of them only where something was
    asked of each token."""
    of_rollouts, of_tokens = (num_rows,), (num_rows, length)
    of_entries = (*of_tokens, num_entries)
    tensors = [
        TensorSpec("prompts", "I64", of_rollouts),
        TensorSpec("samples", "I64", of_rollouts),
        TensorSpec("weights_version", "I64", of_rollouts),
        TensorSpec("sampled_logprobs", "F32", of_tokens),
        TensorSpec("top_logprobs", "F32", of_entries),
        TensorSpec("positions", "I32", of_tokens),
        TensorSpec("token_ids", "I32", of_tokens),
        TensorSpec("top_ids", "I32", of_entries),
        TensorSpec("finish", "U8", of_rollouts),
        TensorSpec("loss_mask", "U8", of_tokens),
    ]
    return [each for each in tensors if num_entries or each.name not in ("top_logprobs", "top_ids")]


def _parse_start(view: memoryview, fingerprint: str, number: int) -> tuple[dict[str, Any], Any]:
    """The header of a shard, and the checksum that it claims. Raises ChunkError."""
    name, header_bytes = f"shard {number}", header_length(view)
    if len(view) < LENGTH_BYTES or header_bytes > min(MAX_HEADER_BYTES, len(view) - LENGTH_BYTES):
        raise ChunkError(
            f"{name} claims a header of {header_bytes} bytes, of which {len(view)} bytes are "
            f"there; the most is {MAX_HEADER_BYTES}"
        )
    text = bytes(view[LENGTH_BYTES : LENGTH_BYTES + header_bytes])
    header = parse_object(text, f"the header of {name}")
    about = metadata_of(header, name)
    wanted = {"fingerprint": fingerprint, "number": number, "xxh3": about.get("xxh3")}
    is_canonical = canonical_json(about).decode("ascii") == header["__metadata__"]["stillhouse"]
    if about != wanted or not is_canonical:
        raise ChunkError(f"{name} says that it is {about}, wanted {wanted}: damaged, or moved")
    return header, about["xxh3"]


def _check_values(rollouts: Rollouts) -> None:
    """Raise ChunkError on values that are well hashed, and yet mean nothing."""
    name, mask = f"shard {rollouts.number}", rollouts.sequences.loss_mask_SL
    check_sequences(rollouts.sequences, name, vocab_size=1 << 31)
    logprobs = rollouts.sampled_logprobs_SL
    if not (np.isnan(logprobs) | (np.isfinite(logprobs) & (logprobs <= 0))).all():
        raise ChunkError(f"{name} has log-probabilities that are infinite, or above 0")
    if logprobs[mask == 0].any():
        raise ChunkError(f"{name} has log-probabilities of tokens that were not sampled")
    for field, least, most in (
        ("prompts", 0, None),
        ("samples", 0, None),
        ("weights_version", UNCHANGING, None),
        ("finish", ENDED, SET_ASIDE),
    ):
        values = rollouts.tensors[field]
        if (values < least).any() or (most is not None and (values > most).any()):
            raise ChunkError(
                f"{name} has {field} from {values.min()} to {values.max()}, wanted at least "
                f"{least}" + ("" if most is None else f" and at most {most}")
            )
    if rollouts.top is not None:
        _check_top_logprobs(rollouts, rollouts.top)


def _check_top_logprobs(rollouts: Rollouts, top: TopLogprobs) -> None:
    """Raise ChunkError where the entries mean nothing."""
    # at which places: all of K entries or none, and of a rollout all, but perhaps its end
    name, ids_SLK, has_entries_SL = f"shard {rollouts.number}", top.ids_SLK, top.mask
    is_none_SLK = ids_SLK == NO_ENTRY
    whole = (is_none_SLK == is_none_SLK[..., :1]).all() and (ids_SLK >= NO_ENTRY).all()
    if not whole or not np.array_equal(is_none_SLK, np.isnan(top.logprobs_SLK)):
        raise ChunkError(f"{name} has top_ids or top_logprobs for a part of a place")
    mask_SL = rollouts.sequences.loss_mask_SL == 1
    but_the_end_SL = mask_SL & (np.cumsum(mask_SL, axis=1) < mask_SL.sum(axis=1, keepdims=True))
    is_whole_S = (has_entries_SL == mask_SL).all(axis=1)
    is_whole_S |= (has_entries_SL == but_the_end_SL).all(axis=1) & (rollouts.finish_S == ENDED)
    if not (is_whole_S | ~has_entries_SL.any(axis=1)).all():
        raise ChunkError(
            f"{name} has top_ids for a part of a rollout, or for a token that was not sampled"
        )

    # and which: a distribution's likeliest, in their order
    ids_TK, logprobs_TK = (
        ids_SLK[has_entries_SL],
        top.logprobs_SLK[has_entries_SL].astype(np.float64),
    )
    falls_TJ, ids_fall_TJ = np.diff(logprobs_TK), np.diff(ids_TK.astype(np.int64))
    if not ((falls_TJ < 0) | ((falls_TJ == 0) & (ids_fall_TJ > 0))).all():
        raise ChunkError(f"{name} has top_logprobs that are not in their order")
    if not np.diff(np.sort(ids_TK)).all():
        raise ChunkError(f"{name} has top_ids with one of them twice")
    mass_T = np.exp(logprobs_TK).sum(axis=1)
    if not ((logprobs_TK <= 0).all() and np.isfinite(logprobs_TK).all()):
        raise ChunkError(f"{name} has top_logprobs that are infinite, or above 0")
    if not (mass_T <= 1 + ROUNDING).all():
        raise ChunkError(f"{name} has top_logprobs whose probabilities sum to {mass_T.max():.4f}")
