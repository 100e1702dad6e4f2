"""The recipe of a store: every choice that decides a target, in clear, and its fingerprint. Only
equal recipes share chunks."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from stillhouse.errors import ConfigError, RecipeError
from stillhouse.logits.record import CODEC_VERSION
from stillhouse.logits.spec import TargetSpec

FORMAT_VERSION = 1
MOST_CHUNKS = 10**10  # whose numbers have ten digits, as the names of chunks do

_MOST_COUNT = 2**31 - 1  # ids and positions are stored in 32 bits

_IN_WORDS = {
    "corpus_digest": "the corpus: its texts, their order and masks",
    "num_sequences": "sequences in the corpus",
    "sequence_length": "tokens in a sequence",
    "packing": "how documents fill sequences",
    "chunk_sequences": "sequences in a chunk",
    "tokenizer_digest": "the tokenizer",
    "vocab_size": "the vocabulary",
    "teacher_digest": "the teacher's weights",
    "teacher_dtype": "the teacher's number format",
    "k": "exact entries a token",
    "num_draws": "draws from the tail a token",
    "temperature": "the softmax temperature",
    "value_bits": "bits a log-probability",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Every choice that decides a target. Raises RecipeError on a value that no store can have."""

    corpus_digest: str
    num_sequences: int
    sequence_length: int
    packing: str
    chunk_sequences: int
    tokenizer_digest: str
    vocab_size: int
    teacher_digest: str
    teacher_dtype: str
    k: int
    num_draws: int = 0
    temperature: float = 1.0
    value_bits: int = 8

    def __post_init__(self) -> None:
        problems = [*_wrong_types(self)] or [*_wrong_values(self)]
        if problems:
            raise RecipeError("this recipe cannot be used: " + "; ".join(problems))

    @property
    def spec(self) -> TargetSpec:
        return TargetSpec(
            self.vocab_size,
            self.k,
            num_draws=self.num_draws,
            value_bits=self.value_bits,
            temperature=self.temperature,
        )

    @property
    def num_chunks(self) -> int:
        return -(-self.num_sequences // self.chunk_sequences)

    def chunk_rows(self, number: int) -> range:
        """The sequences of chunk `number`; the last chunk may be short. Raises RecipeError outside
        0 .. num_chunks - 1."""
        if not 0 <= number < self.num_chunks:
            raise RecipeError(
                f"there is no chunk {number}: this recipe has {self.num_chunks} chunks, counted "
                "from 0"
            )
        start = number * self.chunk_sequences
        return range(start, min(start + self.chunk_sequences, self.num_sequences))

    def canonical_json(self) -> bytes:
        """ASCII JSON of every field and of the versions: sorted keys, no spaces. These are the
        bytes of recipe.json."""
        versions = {
            "format": FORMAT_VERSION,
            "codec": self.spec.codec_name,
            "codec_version": CODEC_VERSION,
        }
        return canonical_json({**asdict(self), "temperature": float(self.temperature), **versions})

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits: sha256 of the canonical JSON."""
        return hashlib.sha256(self.canonical_json()).hexdigest()

    @property
    def draw_seed(self) -> int:
        """The seed of the draws from the tail: the fingerprint's first 64 bits, as a signed number.
        So a chunk made again is the same chunk."""
        return int.from_bytes(bytes.fromhex(self.fingerprint[:16]), "big", signed=True)


def canonical_json(values: dict[str, Any]) -> bytes:
    """Canonical JSON, the one form that a store holds: equal values are equal bytes."""
    return json.dumps(
        values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def parse_recipe(data: bytes, *, where: str) -> Recipe:
    """Read recipe.json. Raises RecipeError, naming `where`, unless `data` is what `canonical_json`
    writes, byte for byte."""
    # a JSON object of a version that is known here
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"{where} is not JSON ({error}); it is damaged: move its directory away"
        ) from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{where} holds a JSON {type(values).__name__}, wanted an object; it is damaged: move "
            "its directory away"
        )
    for key, wanted in (("format", FORMAT_VERSION), ("codec_version", CODEC_VERSION)):
        if values.get(key) != wanted:
            raise RecipeError(
                f"{where} has {key} {values.get(key)!r}, this Stillhouse reads {wanted}; use the "
                "version that wrote it"
            )
    # the fields
    names = [field.name for field in fields(Recipe)]
    strange = sorted(set(values) ^ {*names, "format", "codec", "codec_version"})
    if strange:
        raise RecipeError(
            f"{where} does not have the fields of a recipe: missing or unknown are "
            f"{', '.join(strange)}"
        )
    try:
        recipe = Recipe(**{name: values[name] for name in names})
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    # the form
    if recipe.canonical_json() != data:
        raise RecipeError(
            f"{where} is not in canonical form, so its fingerprint means nothing; it was edited: "
            "restore or move it away"
        )
    return recipe


def differences(recipe: Recipe, other: Recipe) -> list[str]:
    """The fields in which two recipes differ, in words: the value of the first against that of the
    second."""
    mine, theirs = asdict(recipe), asdict(other)
    return [
        f"{name} ({words}): {mine[name]!r} against {theirs[name]!r}"
        for name, words in _IN_WORDS.items()
        if mine[name] != theirs[name]
    ]


def nearest(recipes: Iterable[Recipe], recipe: Recipe) -> Recipe | None:
    """The one that differs from `recipe` in the fewest fields (of several, the lowest fingerprint);
    None if there are none."""

    def distance(other: Recipe) -> tuple[int, str]:
        return len(differences(recipe, other)), other.fingerprint

    return min(recipes, key=distance, default=None)


def _wrong_types(recipe: Recipe) -> Iterable[str]:
    for field in fields(Recipe):
        value = getattr(recipe, field.name)
        wanted = (float, int) if field.type is float else (field.type,)
        if type(value) not in wanted:
            yield (
                f"{field.name} is {value!r}, wanted "
                f"{' or '.join(kind.__name__ for kind in wanted if isinstance(kind, type))}"
            )


def _wrong_values(recipe: Recipe) -> Iterable[str]:
    # of one field
    for name in ("corpus_digest", "tokenizer_digest", "teacher_digest", "teacher_dtype"):
        if not getattr(recipe, name):
            yield f"{name} is empty"
    for name, least in (
        ("num_sequences", 1),
        ("sequence_length", 2),
        ("chunk_sequences", 1),
    ):
        if getattr(recipe, name) < least:
            yield f"{name} is {getattr(recipe, name)}, wanted at least {least}"
    for name in ("sequence_length", "chunk_sequences"):
        if getattr(recipe, name) > _MOST_COUNT:
            yield f"{name} is {getattr(recipe, name)}, wanted at most {_MOST_COUNT}"
    # of fields together, and of those with few values
    if recipe.num_sequences > MOST_CHUNKS * recipe.chunk_sequences:
        yield (
            f"num_sequences is {recipe.num_sequences}, wanted at most {MOST_CHUNKS} chunks of "
            f"{recipe.chunk_sequences}"
        )
    if recipe.packing not in ("packed", "padded"):
        yield f"packing is {recipe.packing!r}, wanted 'packed' or 'padded'"
    try:
        _ = recipe.spec
    except ConfigError as error:
        yield str(error)
