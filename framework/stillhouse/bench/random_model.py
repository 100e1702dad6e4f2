"""A model of random weights for benchmarks: it costs what a trained one does."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from stillhouse.bench.cost import require_device
from stillhouse.errors import ConfigError
from stillhouse.models.load import save_model

_HEAD_SIZE = 32  # the least for which vLLM has a kernel on every kind of CPU


@dataclass(frozen=True, slots=True)
class RandomModel:
    """A model of Qwen3's architecture, and where it runs."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    dtype: str
    device: str
    threads: int

    @property
    def title(self) -> str:
        return f"{self.num_layers} layers of {self.hidden_size}, vocabulary {self.vocab_size:,}"

    def check(self) -> None:
        """Raises ConfigError where there is no such model, or it does not run here."""
        require_device(self.device)
        if self.hidden_size % _HEAD_SIZE:
            raise ConfigError(f"--hidden is {self.hidden_size}; wanted a multiple of {_HEAD_SIZE}")

    def save(self, folder: Path, *, max_positions: int) -> None:
        """Write config and weights, the same for the same arguments."""
        num_heads = self.hidden_size // _HEAD_SIZE
        config = Qwen3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=3 * self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=max(num_heads // 2, 1),
            head_dim=_HEAD_SIZE,
            max_position_embeddings=max_positions,
            initializer_range=0.1,  # logits of random weights differ enough to be compared
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
            save_model(model, folder)
