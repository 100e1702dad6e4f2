"""Compiled layers have the hidden states of the layers as they are written, for documents of any
number and length, and what cannot be compiled is refused in words.

Here torch finds the parts and does not compile them, which takes long; `tests/chaos` has the
compiler, too.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from helpers.models import make_model
from stillhouse.config import ModelSection
from stillhouse.errors import ModelError
from stillhouse.models.batch import TokenBatch, hidden_at
from stillhouse.models.compiling import check_compiled, compile_layers
from stillhouse.models.load import load_model
from stillhouse.sequence import Sequences

VOCAB_SIZE, NUM_LAYERS = 259, 2
ROWS = (((20, 12),), ((3, 29), (32, 0)), ((5, 6), (9, 2), (10, 1)))  # documents, by batch and row


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    torch.compiler.reset()
    make_model(
        tmp_path / "model",
        architecture="llama",
        vocab_size=VOCAB_SIZE,
        num_layers=NUM_LAYERS,
        weight_std=0.2,
    )
    section = {"model": str(tmp_path / "model"), "dtype": "float32"}
    return load_model(ModelSection.model_validate(section))


def batches() -> list[TokenBatch]:
    found = []
    for rows in ROWS:
        positions_SL = np.stack([np.concatenate([np.arange(n) for n in row]) for row in rows])
        ids_SL = np.random.default_rng(len(rows)).integers(70, 120, positions_SL.shape)
        mask_SL = np.ones(positions_SL.shape, np.uint8)
        sequences = Sequences(ids_SL.astype(np.int32), positions_SL.astype(np.int32), mask_SL)
        found.append(TokenBatch.of(sequences))
    return found


def hidden_states(model: PreTrainedModel) -> list[Tensor]:
    with torch.inference_mode():
        return [hidden_at(model, batch) for batch in batches()]


def test_layers_of_one_kind_and_batches_of_all_sizes_share_compiled_parts(
    model: PreTrainedModel,
) -> None:
    written = hidden_states(model)
    compile_layers(model, backend="eager")
    with torch.inference_mode():
        check_compiled(model, vocab_size=VOCAB_SIZE)
    counters.clear()
    for ours_TH, theirs_TH in zip(hidden_states(model), written, strict=True):
        torch.testing.assert_close(ours_TH, theirs_TH, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 0  # of what the check has compiled nothing is new


class Undecided(nn.Module):
    """Chooses by a value, which no compiled part can."""

    def forward(self, given: Tensor) -> Tensor:
        return given if given.sum().item() > 0 else 2 * given


def without_compiler(_graph: Any, _inputs: Any) -> Any:
    raise RuntimeError("no C++ compiler was found")


def wrong(graph: Any, _inputs: Any) -> Any:
    return lambda *given: [
        1.1 * found if isinstance(found, Tensor) else found for found in graph(*given)
    ]


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (without_compiler, r"cannot be compiled here: .*no C\+\+ compiler was found"),
        (wrong, "give other hidden states: they are .* of their norm apart"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_words(
    model: PreTrainedModel, backend: Any, words: str
) -> None:
    compile_layers(model, backend=backend)
    with torch.inference_mode(), pytest.raises(ModelError, match=words):
        check_compiled(model, vocab_size=VOCAB_SIZE)


def test_layers_of_which_more_than_attention_is_left_out_are_refused(
    model: PreTrainedModel,
) -> None:
    model.model.layers[1].mlp.act_fn = Undecided()
    compile_layers(model, backend="eager")
    with torch.inference_mode(), pytest.raises(ModelError, match="can be compiled only in part: "):
        check_compiled(model, vocab_size=VOCAB_SIZE)
