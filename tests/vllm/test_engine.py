"""The engine `vllm` gives the records of the engine `transformers`, however it cuts and batches.

Shapes: S sequences, L positions, T target tokens, B bytes of a record.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.vllmtoys import ARCHITECTURES, S, make_toy, packed_item, recipe_of, section_of, started
from stillhouse.engines.base import TeacherEngine
from stillhouse.engines.probe import mean_kl, require_same_teacher
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.engines.vllm import VllmEngine
from stillhouse.errors import TeacherError
from stillhouse.logits import CompressedLogits, concatenate, decode
from stillhouse.sequence import WorkItem
from stillhouse.store import Chunk, ChunkStore

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own are many
RECIPE = recipe_of()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that makes the toy of an architecture once."""
    made: dict[str, Path] = {}

    def toy(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_toy(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return toy


@pytest.fixture(scope="module")
def llama(toy: Callable[[str], Path]) -> VllmEngine:
    return started(section_of(toy("llama")), RECIPE)


def records_of(engine: TeacherEngine, item: WorkItem) -> Tensor:
    return torch.cat([part.records_TB for part in engine.records(item)])


def exact(engine: TeacherEngine, item: WorkItem) -> CompressedLogits:
    return concatenate(part.sample for part in engine.records(item))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_records_are_those_of_transformers(
    toy: Callable[[str], Path], architecture: str
) -> None:
    # theirs first: vLLM may run a model by transformers' own class, which it changes
    section, item = section_of(toy(architecture)), packed_item()
    theirs = TransformersEngine(section, RECIPE, device="cpu")
    wanted_TB, exact_targets = records_of(theirs, item), concatenate(theirs.targets(item))
    their_probe = theirs.probe()
    ours = started(section, RECIPE)

    # stored
    found_TB = records_of(ours, item)
    assert found_TB.shape == (item.sequences.num_targets, RECIPE.spec.bytes_per_token)
    assert found_TB.shape == wanted_TB.shape
    found, wanted = decode(found_TB, RECIPE.spec), decode(wanted_TB, RECIPE.spec)
    assert (found.tail_ids_TN == wanted.tail_ids_TN).float().mean() > 0.999  # borders are rounded
    assert (found_TB == wanted_TB).all(dim=1).float().mean() > 0.9

    # before encoding
    sample = exact(ours, item)
    first = exact_targets.map(lambda tensor: tensor[: sample.num_tokens])
    assert sample.num_tokens == 64
    assert mean_kl(first, sample) < 1e-6
    assert first.tensors.keys() == sample.tensors.keys()
    for name, tensor in sample.tensors.items():
        torch.testing.assert_close(tensor, first.tensors[name], atol=2e-4, rtol=1e-4)

    # the same teacher
    require_same_teacher(their_probe, ours.probe(), replica=1)
    require_same_teacher(ours.probe(), their_probe, replica=1)


@pytest.fixture
def item() -> WorkItem:
    return packed_item()


def test_the_same_item_gives_the_same_bytes_whatever_a_cache_holds(
    llama: VllmEngine, item: WorkItem
) -> None:
    """The cache of prefixes holds the item's tokens from the first time on."""
    assert torch.equal(records_of(llama, item), records_of(llama, item))


def test_chunks_of_a_document_give_the_same_bytes(
    toy: Callable[[str], Path], llama: VllmEngine, item: WorkItem
) -> None:
    cut = started(section_of(toy("llama"), max_batched_tokens=24), RECIPE)
    assert torch.equal(records_of(cut, item), records_of(llama, item))
    for found, wanted in zip(
        exact(cut, item).tensors.values(), exact(llama, item).tensors.values(), strict=True
    ):
        assert torch.equal(found, wanted)


def test_a_row_gives_the_same_bytes_alone_and_among_others(
    llama: VllmEngine, item: WorkItem
) -> None:
    together = records_of(llama, item)
    alone = [records_of(llama, item.without(set(range(S)) - {row})) for row in range(S)]
    assert torch.equal(torch.cat(alone), together)


def test_an_item_without_a_target_is_one_part_of_no_records(
    llama: VllmEngine, item: WorkItem
) -> None:
    [part] = llama.records(item.without(range(S)))
    assert part.records_TB.shape == (0, RECIPE.spec.bytes_per_token)
    assert part.sample.num_tokens == 0


def test_a_teacher_without_a_distribution_is_named_and_the_engine_goes_on(
    tmp_path: Path, item: WorkItem
) -> None:
    """One id's embedding is NaN: documents with it have none, others are computed after it."""
    folder = make_toy(tmp_path, "llama", tied=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    engine = started(section_of(folder), RECIPE)
    ids_SL = np.where(item.sequences.token_ids_SL == 7, 8, item.sequences.token_ids_SL)
    healthy = replace(item, sequences=replace(item.sequences, token_ids_SL=ids_SL))
    ids_SL = ids_SL.copy()
    ids_SL[0, 0] = 7
    ill = replace(item, sequences=replace(item.sequences, token_ids_SL=ids_SL))

    before = records_of(engine, healthy)
    with pytest.raises(TeacherError, match="no distribution"):
        records_of(engine, ill)
    assert torch.equal(records_of(engine, healthy), before)


def test_an_engine_that_vllm_left_unfinished_ends_its_process(
    toy: Callable[[str], Path], item: WorkItem
) -> None:
    engine = started(section_of(toy("llama")), RECIPE)
    ids_SL = item.sequences.token_ids_SL.copy()
    ids_SL[2, 1] = 10**6
    with pytest.raises(Exception, match="out of vocabulary"):
        records_of(engine, replace(item, sequences=replace(item.sequences, token_ids_SL=ids_SL)))
    with pytest.raises(SystemExit):
        records_of(engine, item)


@pytest.mark.parametrize(
    "changes",
    [
        {"weighted": False, "label_logprob": False, "tail_entropy": False},
        {"k": 0, "weighted": False},
        {"num_draws": 0, "weighted": False},
    ],
)
def test_every_form_of_target_is_made(
    toy: Callable[[str], Path], item: WorkItem, changes: dict[str, Any]
) -> None:
    recipe, section = recipe_of(**changes), section_of(toy("llama"))
    ours, theirs = started(section, recipe), TransformersEngine(section, recipe, device="cpu")
    found_TB, wanted_TB = records_of(ours, item), records_of(theirs, item)
    assert found_TB.shape == wanted_TB.shape
    assert (found_TB == wanted_TB).all(dim=1).float().mean() > 0.9
    assert exact(ours, item).tensors.keys() == next(iter(theirs.targets(item))).tensors.keys()


def test_a_store_of_format_1_gets_the_chunks_of_either_engine(
    toy: Callable[[str], Path], item: WorkItem, tmp_path: Path
) -> None:
    """A blind draw is an id alone, whose seed is a hash of the recipe in its own format."""
    recipe = recipe_of(format=1, weighted=False, label_logprob=False, tail_entropy=False)
    section = section_of(toy("llama"))
    engines: dict[str, TeacherEngine] = {
        "transformers": TransformersEngine(section, recipe, device="cpu"),
        "vllm": started(section, recipe),
    }
    chunks = []
    for name, engine in engines.items():
        store = ChunkStore.create(str(tmp_path / name), recipe)
        store.publish(Chunk(item.number, item.sequences, records_of(engine, item).numpy()))
        store.verify(item.number)
        chunks.append(store.fetch(item.number))
    wanted, found = (decode(torch.from_numpy(each.targets_NB), recipe.spec) for each in chunks)
    assert torch.equal(found.token_ids_TK, wanted.token_ids_TK)
    torch.testing.assert_close(found.logprobs_TK, wanted.logprobs_TK, atol=2e-2, rtol=2e-2)
    assert (found.tail_ids_TN == wanted.tail_ids_TN).float().mean() > 0.999  # borders are rounded
    assert (chunks[0].targets_NB == chunks[1].targets_NB).all(axis=1).mean() > 0.9


def test_in_bfloat16_both_engines_are_one_teacher(toy: Callable[[str], Path]) -> None:
    section, recipe = section_of(toy("qwen3"), dtype="bfloat16"), recipe_of(dtype="bfloat16")
    theirs = TransformersEngine(section, recipe, device="cpu").probe()
    ours = started(section, recipe).probe()
    require_same_teacher(theirs, ours, replica=1)
    require_same_teacher(ours, theirs, replica=1)


def test_another_teacher_is_told_by_the_probe(toy: Callable[[str], Path], tmp_path: Path) -> None:
    other = started(section_of(make_toy(tmp_path, "llama", seed=1)), RECIPE)
    theirs = TransformersEngine(section_of(toy("llama")), RECIPE, device="cpu")
    with pytest.raises(TeacherError, match="disagrees"):
        require_same_teacher(theirs.probe(), other.probe(), replica=1)
