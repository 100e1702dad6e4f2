"""The recipe of a store: every choice that decides a target, in clear, and its fingerprint. Only
equal recipes share chunks.

A recipe is of format 1 or 2. Both hold the same choices; format 1 has no place for another kind of
source or teacher than the usual, nor for what a record of format 2 has more. A store that was begun
in format 1 is filled on in format 1.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from stillhouse.errors import ConfigError, RecipeError
from stillhouse.logits.spec import TargetSpec

NEWEST_FORMAT = 2
MOST_CHUNKS = 10**10  # whose numbers have ten digits, as the names of chunks do

_MOST_COUNT = 2**31 - 1  # ids and positions are stored in 32 bits

_IN_WORDS = {
    "format": "the version of the store's format",
    "source_kind": "where sequences come from",
    "corpus_digest": "the corpus: its texts, their order and masks",
    "num_sequences": "sequences in the corpus",
    "sequence_length": "tokens in a sequence",
    "packing": "how documents fill sequences",
    "chunk_sequences": "sequences in a chunk",
    "tokenizer_digest": "the tokenizer",
    "vocab_size": "the vocabulary",
    "teacher_kind": "what a target comes from: weights, an API or the text itself",
    "teacher_digest": "the teacher's weights",
    "teacher_dtype": "the teacher's number format",
    "k": "exact entries a token",
    "num_draws": "draws from the tail a token",
    "temperature": "the softmax temperature",
    "value_bits": "bits a log-probability",
    "weighted": "a log-probability for each draw",
    "label_logprob": "the log-probability of the label",
    "tail_entropy": "the entropy within the tail",
}
_ONLY_IN_FORMAT_2 = {
    "source_kind": "corpus",
    "teacher_kind": "weights",
    "weighted": False,
    "label_logprob": False,
    "tail_entropy": False,
}
_DRAWS = {False: "ids", True: "weighted"}
_OPTIONAL_BYTES = {False: 0, True: 2}  # of the label's log-probability, or the tail's entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Every choice that decides a target. Raises RecipeError on a value that no store can have.

    Names of fields are those of format 1. In format 2's JSON `source` holds source_kind and
    corpus_digest, `teacher` holds teacher_kind, teacher_digest and teacher_dtype, and `draws` says
    whether they are weighted.
    """

    corpus_digest: str  # of whatever the sequences come from
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
    weighted: bool = False
    label_logprob: bool = False
    tail_entropy: bool = False
    source_kind: str = "corpus"
    teacher_kind: str = "weights"
    format: int = NEWEST_FORMAT

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
            weighted=self.weighted,
            label_logprob=self.label_logprob,
            tail_entropy=self.tail_entropy,
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

    @property
    def target_values(self) -> dict[str, Any]:
        """What decides the records, under the keys of recipe.json and of every chunk's header."""
        shared = {
            "format": self.format,
            "codec": self.spec.codec_name,
            "codec_version": self.format,
            "k": self.k,
            "num_draws": self.num_draws,
            "temperature": float(self.temperature),
            "value_bits": self.value_bits,
            "vocab_size": self.vocab_size,
        }
        if self.format == 1:
            return shared
        return shared | {
            "draws": _DRAWS[self.weighted],
            "label_logprob": _OPTIONAL_BYTES[self.label_logprob],
            "tail_entropy": _OPTIONAL_BYTES[self.tail_entropy],
        }

    def canonical_json(self) -> bytes:
        """ASCII JSON of every field and of the versions: sorted keys, no spaces. These are the
        bytes of recipe.json."""
        names = (
            "num_sequences",
            "sequence_length",
            "packing",
            "chunk_sequences",
            "tokenizer_digest",
        )
        values = {name: getattr(self, name) for name in names} | self.target_values
        if self.format == 1:
            values |= {
                "corpus_digest": self.corpus_digest,
                "teacher_digest": self.teacher_digest,
                "teacher_dtype": self.teacher_dtype,
            }
        else:
            values |= {
                "source": {"kind": self.source_kind, "digest": self.corpus_digest},
                "teacher": {
                    "kind": self.teacher_kind,
                    "digest": self.teacher_digest,
                    "numerics": self.teacher_dtype,
                },
            }
        return canonical_json(values)

    def in_format_1(self) -> "Recipe | None":
        """The recipe under which a store of format 1 holds the same targets; None where format 1
        cannot hold them."""
        is_corpus = self.source_kind == "corpus"
        digest = self.corpus_digest if is_corpus else f"{self.source_kind}:{self.corpus_digest}"
        try:
            return replace(self, format=1, source_kind="corpus", corpus_digest=digest)
        except RecipeError:
            return None

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
    version = values.get("format")
    if type(version) is not int or not 1 <= version <= NEWEST_FORMAT:
        raise RecipeError(
            f"{where} has format {version!r}, this Stillhouse reads 1 to {NEWEST_FORMAT}; use the "
            "version that wrote it"
        )
    if values.get("codec_version") != version:
        raise RecipeError(
            f"{where} has codec_version {values.get('codec_version')!r}, this Stillhouse reads "
            f"{version} in format {version}; use the version that wrote it"
        )
    # the fields
    strange = sorted(_strange_keys(values, version))
    if strange:
        raise RecipeError(
            f"{where} does not have the fields of a recipe: missing or unknown are "
            f"{', '.join(strange)}"
        )
    try:
        recipe = Recipe(**_fields_of(values, version))
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


_KEYS_OF_BOTH = {
    *("format", "codec", "codec_version", "k", "num_draws", "temperature", "value_bits"),
    *("vocab_size", "num_sequences", "sequence_length", "packing", "chunk_sequences"),
    "tokenizer_digest",
}
_KEYS: Mapping[int, set[str]] = {
    1: _KEYS_OF_BOTH | {"corpus_digest", "teacher_digest", "teacher_dtype"},
    2: _KEYS_OF_BOTH | {"source", "teacher", "draws", "label_logprob", "tail_entropy"},
}
_INNER_KEYS: Mapping[str, set[str]] = {
    "source": {"kind", "digest"},
    "teacher": {"kind", "digest", "numerics"},
}


def _strange_keys(values: dict[str, Any], version: int) -> set[str]:
    """Keys that are missing or unknown, those within `source` and `teacher` as 'source.kind'."""
    strange = values.keys() ^ _KEYS[version]
    for key, wanted in _INNER_KEYS.items() if version != 1 else ():
        inner = values.get(key)
        found = inner.keys() if isinstance(inner, dict) else set()
        strange |= {f"{key}.{name}" for name in found ^ wanted}
    return strange


def _fields_of(values: dict[str, Any], version: int) -> dict[str, Any]:
    """The fields of a Recipe, by those of a recipe.json that has exactly the keys of its
    version. Values that mean nothing are passed on for Recipe to refuse."""
    shared = _KEYS_OF_BOTH - {"codec", "codec_version"}
    fields_of = {name: values[name] for name in shared}
    if version == 1:
        return fields_of | {name: values[name] for name in _KEYS[1] - _KEYS_OF_BOTH}
    source, teacher = values["source"], values["teacher"]
    return fields_of | {
        "source_kind": source["kind"],
        "corpus_digest": source["digest"],
        "teacher_kind": teacher["kind"],
        "teacher_digest": teacher["digest"],
        "teacher_dtype": teacher["numerics"],
        "weighted": _meaning_of(values["draws"], _DRAWS),
        "label_logprob": _meaning_of(values["label_logprob"], _OPTIONAL_BYTES),
        "tail_entropy": _meaning_of(values["tail_entropy"], _OPTIONAL_BYTES),
    }


def _meaning_of(found: Any, written: Mapping[bool, Any]) -> Any:
    """The flag that is written so; what stands for none is given back as it is."""
    return next((flag for flag, text in written.items() if text == found), found)


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
    for name in (
        *("source_kind", "corpus_digest", "tokenizer_digest"),
        *("teacher_digest", "teacher_dtype"),
    ):
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
    if recipe.teacher_kind not in ("weights", "api", "text"):
        yield f"teacher_kind is {recipe.teacher_kind!r}, wanted 'weights', 'api' or 'text'"
    # what the format has a place for
    if not 1 <= recipe.format <= NEWEST_FORMAT:
        yield f"format is {recipe.format}, wanted 1 to {NEWEST_FORMAT}"
    elif recipe.format == 1:
        for name, usual in _ONLY_IN_FORMAT_2.items():
            if getattr(recipe, name) != usual:
                yield (
                    f"{name} is {getattr(recipe, name)!r}, which format 1 cannot hold; use "
                    f"{usual!r}, or a store of format 2"
                )
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
