"""What every teacher engine has to keep: right records, in order, the same whoever asks.

Shapes: S sequences, L positions, T target tokens, V vocabulary, B bytes of a record.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.rollouts import make_shard, small_rollout_recipe
from stillhouse.config import TeacherSection
from stillhouse.engines.base import TeacherEngine
from stillhouse.engines.choice import engine_named
from stillhouse.engines.openai_scores import documents_of
from stillhouse.engines.probe import require_same_teacher
from stillhouse.logits import CompressedLogits, concatenate, decode
from stillhouse.models.tokenizers import load_tokenizer, tokenizer_digest, vocab_size_of
from stillhouse.sequence import Sequences, WorkItem
from stillhouse.store import Recipe
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import ENDED, NO_ENTRY

S, L = 4, 24
ROUNDING = 2e-3  # nats: of 8 bits for a log-probability, and of float32


@pytest.fixture
def section(engine_name: str, teacher_dir: Path, tmp_path: Path) -> TeacherSection:
    section = TeacherSection(
        model=str(teacher_dir), engine=engine_name, dtype="float32", batch_sequences=3
    )
    if engine_name != "rollouts":
        return section
    return section.model_copy(update={"rollouts": told_by(section, tmp_path / "rollouts")})


def told_by(section: TeacherSection, folder: Path) -> str:
    """Rollouts with each document of an item, and what the model says of it."""
    # the documents, each a rollout
    recipe = small_rollout_recipe(
        num_prompts=2 * (S - 1), shard_prompts=S, samples=1, sequence_length=L,
        max_new_tokens=L - 1, vocab_size=300, writer_kind="api", top_logprobs=10,
    )  # fmt: skip
    item = item_of(vocab_size=recipe.vocab_size)
    logprobs_TV = distributions_of(item, section, vocab_size=recipe.vocab_size)
    top = logprobs_TV.topk(recipe.top_logprobs, dim=1)
    shards, start = [make_shard(recipe, number) for number in range(recipe.num_shards)], 0
    for number, document in enumerate(documents_of(item)):
        shard, row = shards[number // S], number % S
        end = len(document.token_ids_D)
        shard.sequences.token_ids_SL[row, :end] = document.token_ids_D
        shard.sequences.loss_mask_SL[row] = np.arange(L) < end - 1

        # and what is told of it
        told = slice(start, start + end - 1)
        shard.finish_S[row], shard.sampled_logprobs_SL[row] = ENDED, 0.0
        assert shard.top is not None
        shard.top.ids_SLK[row], shard.top.logprobs_SLK[row] = NO_ENTRY, np.nan
        shard.top.ids_SLK[row, : end - 1] = top.indices[told]
        shard.top.logprobs_SLK[row, : end - 1] = top.values[told]
        start += end - 1
    store = RolloutStore.create(str(folder), recipe)
    for shard in shards:
        store.publish(shard)
    return f"rollouts://{folder}/{recipe.fingerprint[:16]}"


@pytest.fixture
def recipe(section: TeacherSection, engine_name: str, tmp_path: Path) -> Recipe:
    tokenizer = load_tokenizer(section.model)
    capabilities = engine_named(engine_name).describe(section)
    vocab_size = vocab_size_of(tokenizer)
    identity = engine_named(engine_name).identity(section, cache_dir=tmp_path)
    return Recipe(
        corpus_digest="0" * 64,
        num_sequences=10 * S,
        sequence_length=L,
        packing="packed",
        chunk_sequences=S,
        tokenizer_digest=tokenizer_digest(tokenizer),
        vocab_size=vocab_size,
        teacher_kind=identity.kind,
        teacher_digest=identity.digest,
        teacher_dtype=section.dtype,
        k=min(8, capabilities.most_entries or 8),
        num_draws=12 if capabilities.draws else 0,
        weighted=capabilities.weighted_draws,
        label_logprob=capabilities.label_logprob,
        tail_entropy=capabilities.tail_entropy,
    )


@pytest.fixture
def engine(section: TeacherSection, recipe: Recipe, tmp_path: Path) -> TeacherEngine:
    return built(section, recipe, tmp_path)


def built(section: TeacherSection, recipe: Recipe, folder: Path) -> TeacherEngine:
    return engine_named(section.engine)(
        section, recipe, device="cpu", store_url=str(folder / "store")
    )


def item_of(*, vocab_size: int) -> WorkItem:
    """Two documents a row, a row without a target, and ids of the whole vocabulary."""
    number = 2
    ids_SL = np.random.default_rng(number).integers(0, vocab_size, (S, L), dtype=np.int32)
    positions_SL = np.tile(np.r_[np.arange(L // 3), np.arange(L - L // 3)].astype(np.int32), (S, 1))
    mask_SL = np.ones((S, L), np.uint8)
    mask_SL[:, [L // 3 - 1, L - 1]] = 0
    mask_SL[1] = 0
    return WorkItem(number, Sequences(ids_SL, positions_SL, mask_SL))


def records_of(engine: TeacherEngine, item: WorkItem) -> torch.Tensor:
    return torch.cat([part.records_TB.cpu() for part in engine.records(item)])


def targets_of(engine: TeacherEngine, item: WorkItem, recipe: Recipe) -> CompressedLogits:
    return decode(records_of(engine, item), recipe.spec)


def distributions_of(item: WorkItem, section: TeacherSection, *, vocab_size: int) -> torch.Tensor:
    """[T, V]: the model's log-probabilities after each target, of each document alone."""
    model = AutoModelForCausalLM.from_pretrained(section.model, dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for ids_L, mask_L in zip(
            item.sequences.token_ids_SL, item.sequences.loss_mask_SL, strict=True
        ):
            for part in (slice(L // 3), slice(L // 3, L)):
                ids_D = torch.from_numpy(ids_L[part].astype(np.int64))
                logits_DV = model(ids_D[None]).logits[0, :, :vocab_size]
                found.append(logits_DV[np.flatnonzero(mask_L[part])].log_softmax(dim=-1))
    return torch.cat(found)


def one_hot(labels_T: torch.Tensor, *, vocab_size: int) -> torch.Tensor:
    """[T, V]: log-probability 0 of each label, and no mass elsewhere."""
    nothing_TV = torch.full((len(labels_T), vocab_size), -torch.inf)
    return nothing_TV.scatter(1, labels_T[:, None], 0.0)


def test_there_is_one_record_for_each_target_in_row_major_order(
    engine: TeacherEngine, recipe: Recipe
) -> None:
    item = item_of(vocab_size=recipe.vocab_size)
    together = records_of(engine, item)
    assert (together.dtype, together.shape) == (
        torch.uint8,
        (item.sequences.num_targets, recipe.spec.bytes_per_token),
    )
    counts = item.sequences.loss_mask_SL.sum(axis=1).tolist()
    alone = [
        targets_of(engine, item.without(set(range(S)) - {row}), recipe)
        for row in range(S)
        if counts[row]
    ]
    whole = decode(together, recipe.spec)
    assert torch.equal(concatenate(alone).token_ids_TK, whole.token_ids_TK)


def test_the_targets_are_the_teachers_distribution_of_each_document_alone(
    engine: TeacherEngine, recipe: Recipe, section: TeacherSection
) -> None:
    item = item_of(vocab_size=recipe.vocab_size)
    labels_SL = np.roll(item.sequences.token_ids_SL, -1, axis=1).astype(np.int64)
    labels_T = torch.from_numpy(labels_SL[item.sequences.loss_mask_SL == 1])
    wanted_TV = (
        distributions_of(item, section, vocab_size=recipe.vocab_size)
        if section.scored_by is not None
        else one_hot(labels_T, vocab_size=recipe.vocab_size)
    )
    found = targets_of(engine, item, recipe)
    torch.testing.assert_close(
        found.logprobs_TK, wanted_TV.gather(1, found.token_ids_TK.long()), atol=0.1, rtol=0.01
    )
    kept = wanted_TV.exp().gather(1, found.token_ids_TK.long()).sum(dim=1)
    best = wanted_TV.exp().topk(recipe.k, dim=1).values.sum(dim=1)
    assert (best - kept).abs().max() < ROUNDING

    # what else the engine says that it makes
    if found.draw_logprobs_TN is not None:
        wanted_TN = wanted_TV.gather(1, found.tail_ids_TN.long())
        torch.testing.assert_close(found.draw_logprobs_TN, wanted_TN, atol=0.3, rtol=0.01)
    if found.label_logprob_T is not None:
        wanted_T = wanted_TV.gather(1, labels_T[:, None])[:, 0]
        torch.testing.assert_close(found.label_logprob_T, wanted_T, atol=0.01, rtol=0.01)
    if found.tail_entropy_T is not None:
        tail_TV = wanted_TV.scatter(1, found.token_ids_TK.long(), -1e9).log_softmax(dim=1)
        wanted_T = -(tail_TV.exp() * tail_TV).sum(dim=1)
        torch.testing.assert_close(found.tail_entropy_T, wanted_T, atol=0.01, rtol=0.01)


def test_an_item_without_a_target_has_a_part_without_rows(
    engine: TeacherEngine, recipe: Recipe
) -> None:
    assert records_of(engine, item_of(vocab_size=recipe.vocab_size).without(range(S))).shape == (
        0,
        recipe.spec.bytes_per_token,
    )


def test_the_same_item_gives_the_same_records(engine: TeacherEngine, recipe: Recipe) -> None:
    assert torch.equal(
        records_of(engine, item_of(vocab_size=recipe.vocab_size)),
        records_of(engine, item_of(vocab_size=recipe.vocab_size)),
    )


def test_draws_depend_on_the_place_in_the_plan(engine: TeacherEngine, recipe: Recipe) -> None:
    here = item_of(vocab_size=recipe.vocab_size)
    elsewhere = replace(here, number=here.number + 1)
    ours, others = targets_of(engine, here, recipe), targets_of(engine, elsewhere, recipe)
    assert torch.equal(ours.token_ids_TK, others.token_ids_TK)
    assert recipe.num_draws == 0 or not torch.equal(ours.tail_ids_TN, others.tail_ids_TN)


def test_every_part_brings_a_sample_of_its_first_targets(
    engine: TeacherEngine, recipe: Recipe
) -> None:
    for part in engine.records(item_of(vocab_size=recipe.vocab_size)):
        assert min(1, len(part.records_TB)) <= part.sample.num_tokens <= len(part.records_TB)
        written = decode(part.records_TB[: part.sample.num_tokens].cpu(), recipe.spec)
        assert torch.equal(
            written.token_ids_TK.sort().values, part.sample.token_ids_TK.cpu().sort().values
        )


def test_two_of_its_replicas_are_the_same_teacher(
    engine: TeacherEngine, recipe: Recipe, section: TeacherSection, tmp_path: Path
) -> None:
    other = built(section, recipe, tmp_path)
    require_same_teacher(engine.probe(), other.probe(), replica=1)


def test_it_says_how_it_works(engine: TeacherEngine) -> None:
    backend = engine.backend()
    assert backend.name
    assert backend.reason


def test_its_identity_is_known_without_loading_it_and_does_not_change(
    section: TeacherSection, engine_name: str, tmp_path: Path
) -> None:
    first, again = (
        engine_named(engine_name).identity(section, cache_dir=tmp_path) for _ in range(2)
    )
    assert first == again
    assert first.digest
