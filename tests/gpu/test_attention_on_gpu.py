"""On a GPU documents are attended to by torch's varlen kernel, with the hidden states and gradients
of one call a document on the CPU."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.models.attention import attend_by_document, attends_by_document, kernel_is_right
from stillhouse.models.batch import TokenBatch, hidden_at
from stillhouse.models.compiling import check_compiled, compile_layers
from stillhouse.sequence import Sequences


@pytest.mark.parametrize("num_key_heads", [1, 4])
def test_a_model_has_the_hidden_states_and_gradients_of_the_cpu(
    gpu: torch.device, num_key_heads: int
) -> None:
    # a model, and rows of documents
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_key_heads,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    attend_by_document(model)
    assert attends_by_document(model)
    lengths = ((100, 28), (3, 125))
    positions_SL = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    ids_SL = np.random.default_rng(0).integers(0, 512, positions_SL.shape)
    batch = TokenBatch.of(
        Sequences(
            ids_SL.astype(np.int32), positions_SL.astype(np.int32), np.ones_like(ids_SL, np.uint8)
        )
    )

    # on the CPU in float32, on the GPU in bfloat16
    def hidden_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        hidden_TH = hidden_at(model, batch)
        hidden_TH.float().square().mean().backward()
        gradient = model.model.layers[0].self_attn.q_proj.weight.grad
        assert gradient is not None
        return hidden_TH.detach().float().cpu(), gradient.float().cpu()

    wanted = hidden_and_gradient()
    model.to(gpu, torch.bfloat16)
    for has_window in (False, True):
        assert kernel_is_right(gpu, torch.bfloat16, (4, num_key_heads), 64, has_window)
    for ours, theirs in zip(hidden_and_gradient(), wanted, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_compiled_layers_have_the_hidden_states_of_the_layers_as_written(gpu: torch.device) -> None:
    torch.compiler.reset()
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().to(gpu, torch.bfloat16)
    attend_by_document(model)
    compile_layers(model)
    check_compiled(model, vocab_size=512)  # with gradients
    with torch.inference_mode():
        check_compiled(model, vocab_size=512)
