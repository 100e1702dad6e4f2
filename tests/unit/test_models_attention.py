"""Documents one after the other in one row against the masked attention of transformers: the same
hidden states and gradients, for less work."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from helpers.models import make_model
from stillhouse.config import ModelSection
from stillhouse.models.attention import attends_by_document
from stillhouse.models.batch import TokenBatch, hidden_at
from stillhouse.models.heads import final_hidden
from stillhouse.models.load import load_model
from stillhouse.sequence import Sequences
from stillhouse.student.module import checkpoint_activations

VOCAB_SIZE = 259
WINDOW = 8  # shorter than the documents below
WINDOWED: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": WINDOW},
    "cohere2": {"sliding_window": WINDOW},
    "mistral": {"sliding_window": WINDOW},
}
LENGTHS = ((20, 12), (3, 29), (32,))  # of the documents of each row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def loaded(folder: Path, architecture: str, **config: Any) -> PreTrainedModel:
    made = folder / architecture
    if not made.exists():
        make_model(
            made,
            architecture=architecture,
            vocab_size=300,
            tokenizer_vocab_size=VOCAB_SIZE,
            weight_std=0.2,
            config=config,
        )
    return load_model(ModelSection.model_validate({"model": str(made), "dtype": "float32"}))


def sequences(targets: list[tuple[int, int]] | None = None) -> Sequences:
    """Rows of documents; targets by row and column, or at every token."""
    positions_SL = np.stack(
        [np.concatenate([np.arange(length) for length in row]) for row in LENGTHS]
    ).astype(np.int32)
    ids_SL = np.random.default_rng(0).integers(70, 120, positions_SL.shape).astype(np.int32)
    mask_SL = np.full(positions_SL.shape, targets is None, dtype=np.uint8)
    for row, column in targets or ():
        mask_SL[row, column] = 1
    return Sequences(ids_SL, positions_SL, mask_SL)


@contextmanager
def with_a_mask(model: PreTrainedModel) -> Iterator[None]:
    """The same model with the masked attention of transformers."""
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation("stillhouse")


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral", "phi3", *WINDOWED])
def test_each_document_has_the_hidden_states_that_a_mask_gives_it(
    folder: Path, architecture: str
) -> None:
    model = loaded(folder, architecture, **WINDOWED.get(architecture, {}))
    assert attends_by_document(model)
    batch = TokenBatch.of(sequences())
    with torch.inference_mode():
        ours_TH = hidden_at(model, batch)
        with with_a_mask(model):
            masked_TH = hidden_at(model, batch)
    torch.testing.assert_close(ours_TH, masked_TH, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_a_mask_with_and_without_checkpointed_activations(
    folder: Path,
) -> None:
    model = loaded(folder, "llama").train()
    batch = TokenBatch.of(sequences())

    def gradients() -> list[Tensor]:
        model.zero_grad()
        hidden_at(model, batch).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours = gradients()
    with with_a_mask(model):
        masked = gradients()
    checkpoint_activations(model, every=1)
    checkpointed = gradients()
    assert len(ours) == len(masked) > 10
    for own, other, again in zip(ours, masked, checkpointed, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(own, again, rtol=1e-5, atol=1e-5)


def test_only_what_a_target_depends_on_is_computed(folder: Path) -> None:
    model = loaded(folder, "llama")
    some = TokenBatch.of(sequences([(0, 5), (0, 21), (2, 7)]))
    seen = list[int]()
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.shape[1])
    )
    with torch.inference_mode():
        few_TH = hidden_at(model, some)
        all_BLH = final_hidden(model, some.token_ids_BL, some.positions_BL)
        nothing_TH = hidden_at(model, TokenBatch.of(sequences([])))
    hook.remove()
    assert seen == [6 + 2 + 8, 96, 1]
    assert nothing_TH.shape == (0, few_TH.shape[1])
    torch.testing.assert_close(few_TH, all_BLH.flatten(0, 1)[some.target_positions_T])


@pytest.mark.parametrize("architecture", ["falcon_h1", "llama4_text", "gpt_oss"])
def test_a_model_that_needs_more_than_documents_keeps_its_own_attention(
    folder: Path, architecture: str
) -> None:
    """State-space layers, chunks of a row, sinks."""
    config = {
        "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_state": 8},
        "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    }
    assert not attends_by_document(loaded(folder, architecture, **config.get(architecture, {})))


def test_an_exported_model_names_no_attention_of_ours(folder: Path, tmp_path: Path) -> None:
    loaded(folder, "llama").save_pretrained(tmp_path)
    assert "stillhouse" not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation != "stillhouse"
