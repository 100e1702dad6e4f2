"""The engine `vllm` gives the records of the engine `transformers`, however it cuts and batches.

Shapes: S sequences, L positions, T target tokens, B bytes of a record.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.vllmtoys import ARCHITECTURES, make_toy, packed_item, recipe_of, section_of
from stillhouse.engines.base import TeacherEngine
from stillhouse.engines.probe import mean_kl, require_same_teacher
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.engines.vllm import VllmEngine
from stillhouse.logits import CompressedLogits, concatenate, decode
from stillhouse.sequence import WorkItem

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
    return VllmEngine(section_of(toy("llama")), RECIPE, device="cpu")


def records_of(engine: TeacherEngine, item: WorkItem) -> Tensor:
    return torch.cat([part.records_TB for part in engine.records(item)])


def exact(engine: TeacherEngine, item: WorkItem) -> CompressedLogits:
    return concatenate(part.sample for part in engine.records(item))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_records_are_those_of_transformers(
    toy: Callable[[str], Path], architecture: str
) -> None:
    section = section_of(toy(architecture))
    ours = VllmEngine(section, RECIPE, device="cpu")
    theirs = TransformersEngine(section, RECIPE, device="cpu")
    item = packed_item()

    # stored
    found_TB, wanted_TB = records_of(ours, item), records_of(theirs, item)
    assert (
        found_TB.shape
        == wanted_TB.shape
        == (item.sequences.num_targets, RECIPE.spec.bytes_per_token)
    )
    found, wanted = decode(found_TB, RECIPE.spec), decode(wanted_TB, RECIPE.spec)
    assert torch.equal(found.tail_ids_TN, wanted.tail_ids_TN)
    assert (found_TB == wanted_TB).all(dim=1).float().mean() > 0.9

    # before encoding
    sample, first = exact(ours, item), next(iter(theirs.targets(item)))
    first = first.map(lambda tensor: tensor[: sample.num_tokens])
    assert sample.num_tokens == 64
    assert mean_kl(first, sample) < 1e-6
    assert first.tensors.keys() == sample.tensors.keys()
    for name, tensor in sample.tensors.items():
        torch.testing.assert_close(tensor, first.tensors[name], atol=2e-4, rtol=1e-4)

    # the same teacher
    require_same_teacher(theirs.probe(), ours.probe(), replica=1)
    require_same_teacher(ours.probe(), theirs.probe(), replica=1)
