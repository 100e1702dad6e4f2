"""Heads of many architectures against their models' own logits, and packed documents against the
same documents alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from helpers.models import make_model
from stillhouse.config import ModelSection
from stillhouse.errors import ModelError
from stillhouse.models.heads import check_head, check_packing, compare_head, final_hidden, head_of
from stillhouse.models.load import load_model

VOCAB_SIZE = 259  # of the tokenizer; heads have 300 rows
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
    "falcon_h1": {
        "lm_head_multiplier": 0.5,
        "num_hidden_layers": 1,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_state": 8,
    },
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 4.0},
    "minicpm3": {"dim_model_base": 8},
    "mpt": {"logit_scale": 4.0},
    "opt": {"word_embed_proj_dim": 16},
}
WITH_SCALE = ["cohere", "cohere2", "falcon_h1", "granite", "hyperclovax", "minicpm3"]
WITH_SOFTCAP = ["gemma2", "nanochat", "recurrent_gemma"]
WITH_BIAS = ["gptj", "phi"]
PLAIN = [
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "llama4_text",
    "mistral",
    "mixtral",
    "mpt",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
]
SEEING_PACKED_DOCUMENTS = ["bloom", "falcon_h1", "mamba", "mpt", "recurrent_gemma"]
KEEPING_THEM_APART = sorted(
    {*WITH_SCALE, *WITH_SOFTCAP, *WITH_BIAS, *PLAIN} - {*SEEING_PACKED_DOCUMENTS}
)


@pytest.fixture(scope="module")
def directories() -> dict[tuple[str, bool], Path]:
    return {}


@pytest.fixture
def tiny(
    directories: dict[tuple[str, bool], Path], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A function that loads a tiny model of an architecture; with a bias where it has one, since
    new models have zeros there."""

    def load(
        architecture: str, *, tied: bool = True, dtype: str = "float32", weight_std: float = 0.02
    ) -> PreTrainedModel:
        key = (f"{architecture} {weight_std}", tied)
        if key not in directories:
            directories[key] = make_model(
                tmp_path_factory.mktemp(architecture),
                architecture=architecture,
                vocab_size=300,
                tokenizer_vocab_size=VOCAB_SIZE,
                tied=tied,
                weight_std=weight_std,
                config=SPECIAL.get(architecture, {}),
            )
        model = load_model(
            ModelSection.model_validate({"model": str(directories[key]), "dtype": dtype})
        )
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            torch.nn.init.normal_(bias, std=0.1, generator=torch.Generator().manual_seed(1))
        return model

    return load


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", [*WITH_SCALE, *WITH_SOFTCAP, *WITH_BIAS, *PLAIN])
def test_the_head_read_off_a_model_gives_its_own_logits(
    tiny: Any, architecture: str, dtype: str
) -> None:
    check_head(tiny(architecture, dtype=dtype), vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("architecture", ["gemma2", "llama", "qwen3", "phi"])
def test_head_of_and_final_hidden_are_the_logits_of_a_padded_head(
    tiny: Any, architecture: str
) -> None:
    model = tiny(architecture, tied=False, weight_std=0.5)
    ids = torch.arange(100, 112, dtype=torch.int32).reshape(1, 12)
    positions = torch.arange(12, dtype=torch.int32).reshape(1, 12)
    head = head_of(model, vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        own = model(input_ids=ids.long(), position_ids=positions.long(), use_cache=False).logits[
            ..., :VOCAB_SIZE
        ]
        ours = head.logits(final_hidden(model, ids, positions))
    assert head.vocab_size == VOCAB_SIZE
    assert own.std() > 0.5
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_a_view_of_the_models_own_parameters(tiny: Any, tied: bool) -> None:
    model = tiny("llama", tied=tied)
    weight = model.get_output_embeddings().weight
    assert head_of(model, vocab_size=300).weight_VH is weight
    assert head_of(model, vocab_size=VOCAB_SIZE).weight_VH.data_ptr() == weight.data_ptr()
    assert (weight is model.get_input_embeddings().weight) == tied


# ---- what a forgetful head looks like


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", WITH_SCALE)
def test_a_head_that_forgets_its_scale_is_refused(tiny: Any, architecture: str, dtype: str) -> None:
    model = tiny(architecture, dtype=dtype)
    forgetful = replace(head_of(model, vocab_size=VOCAB_SIZE), scale=1.0)
    with pytest.raises(ModelError, match="does not give the model's own logits"):
        compare_head(model, forgetful)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight_std", [0.02, 1.0])
@pytest.mark.parametrize("architecture", WITH_SOFTCAP)
def test_a_head_that_forgets_its_soft_cap_is_refused_even_where_no_logit_of_the_text_reaches_it(
    tiny: Any, architecture: str, weight_std: float, dtype: str
) -> None:
    model = tiny(architecture, dtype=dtype, weight_std=weight_std)
    forgetful = replace(head_of(model, vocab_size=VOCAB_SIZE), softcap=None)
    with pytest.raises(ModelError, match="does not give the model's own logits"):
        compare_head(model, forgetful)


def test_inflated_weights_make_the_cap_of_gemma_2_bite_on_plain_text(tiny: Any) -> None:
    model = tiny("gemma2", weight_std=1.0)
    forgetful = replace(head_of(model, vocab_size=VOCAB_SIZE), softcap=None)
    check_head(model, vocab_size=VOCAB_SIZE)
    with pytest.raises(ModelError, match="own logits on plain text"):
        compare_head(model, forgetful)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", WITH_BIAS)
def test_a_head_that_forgets_its_bias_is_refused_even_where_the_bias_is_small(
    tiny: Any, architecture: str, dtype: str
) -> None:
    model = tiny(architecture, dtype=dtype)
    model.get_output_embeddings().bias.data.mul_(1e-3)
    forgetful = replace(head_of(model, vocab_size=VOCAB_SIZE), bias_V=None)
    check_head(model, vocab_size=VOCAB_SIZE)
    with pytest.raises(ModelError, match="does not give the model's own logits"):
        compare_head(model, forgetful)


def test_a_head_of_another_model_is_refused(tiny: Any) -> None:
    other = tiny("llama")
    shifted = replace(
        head_of(other, vocab_size=VOCAB_SIZE),
        weight_VH=other.get_output_embeddings().weight.data.roll(1, 0)[:VOCAB_SIZE],
    )
    with pytest.raises(ModelError, match="on plain text"):
        compare_head(tiny("llama"), shifted)


def test_an_architecture_that_transforms_before_its_head_is_refused(tiny: Any) -> None:
    with pytest.raises(ModelError, match=r"BertLMHeadModel.*not known here"):
        check_head(tiny("bert"), vocab_size=VOCAB_SIZE)


# ---- models that are no use


def test_a_vocabulary_larger_than_the_head_is_refused(tiny: Any) -> None:
    with pytest.raises(ModelError, match="300 rows, fewer than the tokenizer's 301 ids"):
        head_of(tiny("llama"), vocab_size=301)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_a_uniform_model_is_refused(tiny: Any, fill: float) -> None:
    model = tiny("llama", tied=False)
    model.get_output_embeddings().weight.data.fill_(fill)
    with pytest.raises(ModelError, match="every token the same logit"):
        check_head(model, vocab_size=VOCAB_SIZE)


def test_a_model_whose_logits_are_not_finite_is_refused(tiny: Any) -> None:
    model = tiny("llama", tied=False)
    model.get_output_embeddings().weight.data[7, 3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        check_head(model, vocab_size=VOCAB_SIZE)


def test_a_model_that_takes_no_positions_is_refused_in_words(tiny: Any) -> None:
    class WithoutPositions(torch.nn.Module):
        def __init__(self, body: torch.nn.Module) -> None:
            super().__init__()
            self.body, self.embed_tokens = body, body.embed_tokens

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.body(input_ids=input_ids)

    model = tiny("llama")
    model.model = WithoutPositions(model.model)
    with pytest.raises(ModelError, match="cannot be called with input_ids, position_ids"):
        check_head(model, vocab_size=VOCAB_SIZE)


# ---- packing


@pytest.mark.parametrize("architecture", KEEPING_THEM_APART)
def test_packed_documents_do_not_see_each_other(tiny: Any, architecture: str) -> None:
    check_packing(tiny(architecture), vocab_size=VOCAB_SIZE)
    check_packing(tiny(architecture, dtype="bfloat16"), vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", SEEING_PACKED_DOCUMENTS)
def test_an_architecture_whose_packed_documents_see_each_other_is_refused(
    tiny: Any, architecture: str, dtype: str
) -> None:
    with pytest.raises(ModelError, match="packed in one row see each other"):
        check_packing(tiny(architecture, dtype=dtype), vocab_size=VOCAB_SIZE)


def test_a_packed_document_has_the_hidden_states_that_it_has_alone(tiny: Any) -> None:
    model = tiny("llama", weight_std=0.3)
    ids = torch.arange(100, 116).reshape(1, 16)
    positions = torch.cat([torch.arange(6), torch.arange(10)]).reshape(1, 16)
    with torch.no_grad():
        packed = final_hidden(model, ids, positions)
        torch.testing.assert_close(
            packed[:, 6:], final_hidden(model, ids[:, 6:], positions[:, 6:]), rtol=1e-4, atol=1e-5
        )
        run_on = final_hidden(model, ids, torch.arange(16).reshape(1, 16))
    assert (packed[:, 6:] - run_on[:, 6:]).abs().max() > 0.1
