"""A model of random weights for benchmarks: it costs what a trained one does."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from stillhouse.errors import ConfigError
from stillhouse.models import save_model

_HEAD_SIZE = 32  # the least for which vLLM has a kernel on every kind of CPU


def require_heads(hidden_size: int) -> None:
    """Raises ConfigError where a hidden size is not a number of whole heads."""
    if hidden_size % _HEAD_SIZE:
        raise ConfigError(f"--hidden is {hidden_size}; wanted a multiple of {_HEAD_SIZE}")


def save_random_model(
    folder: Path,
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    max_positions: int,
    dtype: str,
) -> None:
    """Write config and weights of Qwen3's architecture, the same for the same arguments."""
    num_heads = hidden_size // _HEAD_SIZE
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(num_heads // 2, 1),
        head_dim=_HEAD_SIZE,
        max_position_embeddings=max_positions,
        initializer_range=0.1,  # logits of random weights differ enough to be compared
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        save_model(model, folder)
