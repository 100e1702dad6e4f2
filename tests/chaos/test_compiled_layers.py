"""Layers that a compiler has made have the hidden states and the gradients of those as written; a
teacher of compiled layers is the same teacher, and a student of them trains alike."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.chunks import small_recipe
from helpers.models import make_model
from helpers.ranks import RankGroup
from helpers.training import train_and_tell, with_student
from helpers.world import TinyWorld
from stillhouse.config import ModelSection, TeacherSection
from stillhouse.engines.probe import require_same_teacher
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.models.batch import TokenBatch, hidden_at
from stillhouse.models.compiling import check_compiled, compile_layers
from stillhouse.models.load import load_model
from stillhouse.sequence import Sequences

# what torch's compiler does inside: it imports a module that is written with what torch has
# deprecated, and looks at gradients of tensors that are no leaves
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)

VOCAB_SIZE = 259


def batch_of(*rows: tuple[int, int]) -> TokenBatch:
    """Rows of two documents of these lengths."""
    positions_SL = np.stack([np.concatenate([np.arange(n) for n in row]) for row in rows])
    ids_SL = np.random.default_rng(len(rows)).integers(70, 120, positions_SL.shape)
    mask_SL = np.ones(positions_SL.shape, np.uint8)
    return TokenBatch.of(Sequences(ids_SL.astype(np.int32), positions_SL.astype(np.int32), mask_SL))


@pytest.mark.long_form
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_compiled_layers_are_the_layers_as_written(architecture: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    config = {"sliding_window": 8} if architecture == "gemma2" else {}
    make_model(tmp_path, architecture=architecture, vocab_size=VOCAB_SIZE, config=config)
    model = load_model(ModelSection(model=str(tmp_path), dtype="float32"))
    batches = [batch_of((20, 12)), batch_of((3, 29), (31, 1)), batch_of((5, 6), (9, 2), (10, 1))]

    def hidden_states() -> list[Tensor]:
        with torch.inference_mode():
            return [hidden_at(model, batch) for batch in batches]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        for batch in batches:
            hidden_at(model, batch).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    written, gradients_written = hidden_states(), gradients()
    compile_layers(model)
    check_compiled(model, vocab_size=VOCAB_SIZE)
    for ours_TH, theirs_TH in zip(hidden_states(), written, strict=True):
        torch.testing.assert_close(ours_TH, theirs_TH, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients(), gradients_written, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.long_form
def test_a_teacher_of_compiled_layers_is_the_same_teacher(tmp_path: Path) -> None:
    torch.compiler.reset()
    recipe = small_recipe(num_sequences=5, sequence_length=24, chunk_sequences=5, k=6)
    make_model(tmp_path, vocab_size=recipe.vocab_size, weight_std=0.4)
    section = TeacherSection(model=str(tmp_path), batch_sequences=2)  # in bfloat16
    as_written = TransformersEngine(section, recipe, device="cpu")
    compiled = TransformersEngine(
        section.model_copy(update={"compile": True}), recipe, device="cpu"
    )
    first, other = as_written.probe(), compiled.probe()
    require_same_teacher(first, other, replica=1)
    assert first.rounding_kl / 3 < other.rounding_kl < first.rounding_kl * 3


@pytest.mark.long_form
def test_a_student_of_compiled_layers_trains_alike(
    tiny_world: TinyWorld, rank_groups: dict[int, RankGroup], tmp_path: Path
) -> None:
    plan = tiny_world.plan(tmp_path / "run", student={"max_steps": 3, "warmup_steps": 0})
    tiny_world.fill_store(plan)
    losses = [
        [
            row.loss
            for row in rank_groups[2].call(
                train_and_tell,
                replace(
                    with_student(plan.jobs[0], zero_stage=2, compile=is_compiled),
                    run_dir=tmp_path / str(is_compiled),
                ),
            )[0]
        ]
        for is_compiled in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(losses[1]) == 3
