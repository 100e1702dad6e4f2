"""Teachers of all runs and engines are held to the answer of the first one that published."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.damage import places, with_flipped_bit
from helpers.models import make_model
from helpers.placereader import read_probe
from stillhouse.config import TeacherSection
from stillhouse.engines.probe import Probe
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.errors import RecipeError, StoreError
from stillhouse.logits import CompressedLogits
from stillhouse.store import ChunkStore, Recipe
from stillhouse.teacher.first_answer import require_first_teacher

RECIPE = Recipe(
    corpus_digest="0" * 64,
    num_sequences=40,
    sequence_length=24,
    packing="packed",
    chunk_sequences=4,
    tokenizer_digest="0" * 64,
    vocab_size=300,
    teacher_digest="0" * 64,
    teacher_dtype="bfloat16",
    k=8,
)


def probe_of(folder: Path, *, seed: int = 1, dtype: str = "bfloat16") -> Probe:
    """The answer of a model that is the same for the same seed."""
    if not folder.exists():
        make_model(folder, vocab_size=300, weight_std=0.3, seed=seed)
    section = TeacherSection(model=str(folder), dtype=dtype)
    return TransformersEngine(section, RECIPE, device="cpu").probe()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return probe_of(tmp_path_factory.mktemp("models") / "first")


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    return ChunkStore.create(str(tmp_path / "store"), RECIPE)


def kept(store: ChunkStore) -> Path:
    return Path(store.url) / store.folder / "probe.json"


@pytest.mark.parametrize("version", [1, 2])
def test_the_first_answer_stays_and_a_teacher_within_rounding_of_it_is_accepted(
    first: Probe, tmp_path: Path, version: int
) -> None:
    store = ChunkStore.create(str(tmp_path / "store"), replace(RECIPE, format=version))
    require_first_teacher(store, first)
    before = kept(store).read_bytes()
    require_first_teacher(store, first)
    require_first_teacher(store, probe_of(tmp_path / "same", dtype="float32"))
    assert kept(store).read_bytes() == before

    # as the page says
    values = read_probe(before, vocab_size=300, sequence_length=RECIPE.sequence_length)
    assert values["token_ids"] == first.answer.token_ids_TK.tolist()
    assert values["logprobs"] == first.answer.logprobs_TK.tolist()


def test_a_teacher_that_answers_otherwise_is_refused_until_a_person_decides(
    first: Probe, store: ChunkStore, tmp_path: Path
) -> None:
    require_first_teacher(store, first)
    other = probe_of(tmp_path / "other", seed=2)
    with pytest.raises(
        RecipeError, match=rf"filled this store first.*mean KL .*delete {kept(store)}"
    ):
        require_first_teacher(store, other)
    kept(store).unlink()
    require_first_teacher(store, other)
    with pytest.raises(RecipeError):
        require_first_teacher(store, first)


def test_an_answer_without_a_tail_is_kept(store: ChunkStore) -> None:
    """All of the vocabulary is kept: what is left has no mass, and no logarithm."""
    num_tokens, vocab_size = RECIPE.sequence_length - 1, RECIPE.vocab_size
    logprobs_TV = torch.randn(num_tokens, vocab_size).log_softmax(dim=1).sort(descending=True)
    whole = CompressedLogits(
        logprobs_TV.indices.int(),
        logprobs_TV.values,
        torch.full((num_tokens,), -torch.inf),
        torch.empty((num_tokens, 0), dtype=torch.int32),
        vocab_size,
    )
    require_first_teacher(store, Probe(whole, torch.inf, {}))
    require_first_teacher(store, Probe(whole, torch.nan, {}))
    uniform = replace(whole, logprobs_TK=torch.full_like(whole.logprobs_TK, -5.7))
    with pytest.raises(RecipeError):
        require_first_teacher(store, Probe(uniform, 0.0, {}))


def test_damage_anywhere_is_named_and_nothing_is_taken_for_an_answer(
    first: Probe, store: ChunkStore
) -> None:
    require_first_teacher(store, first)
    data = kept(store).read_bytes()
    flipped = [with_flipped_bit(data, place) for place in places(len(data), how_many=20)]
    for damaged in (b"", b"{}", data[:-1], *flipped):
        kept(store).write_bytes(damaged)
        with pytest.raises(StoreError, match=f"{kept(store)} is damaged"):
            require_first_teacher(store, first)
        assert kept(store).read_bytes() == damaged
