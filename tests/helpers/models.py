"""Tiny tokenizers and tiny random causal language models on disk: real Hugging Face files, the same
for the same arguments."""

import inspect
import json.decoder
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
MIN_VOCAB_SIZE = 256 + 1 + len(TURN_TOKENS)  # every byte, EOS and the turn tokens
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(
    directory: str | Path, *, vocab_size: int = 320, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Save and return a byte-level BPE of exactly `vocab_size` >= MIN_VOCAB_SIZE ids, learnt from
    Python source; any text survives it."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; at least {MIN_VOCAB_SIZE} is wanted")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, *TURN_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(
        [inspect.getsource(module) for module in (inspect, textwrap, json.decoder)], trainer
    )
    if core.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the training text holds only {core.get_vocab_size()} tokens; {vocab_size} were wanted"
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=EOS, model_max_length=1 << 20
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(directory))
    return tokenizer


def make_model(
    directory: str | Path,
    *,
    architecture: str = "llama",
    vocab_size: int = 320,
    tokenizer_vocab_size: int | None = None,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
    intermediate_size: int = 64,
    max_positions: int = 512,
    tied: bool = True,
    seed: int = 0,
    weight_std: float = 0.02,
    chat_template: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Save a random float32 model, its config and a tokenizer to `directory`, and return the
    directory.

    `vocab_size` is the width of the head, `tokenizer_vocab_size` (None: the same) that of the
    tokenizer; a larger `weight_std` makes a less uniform model; `config` holds further fields of
    the architecture's own config.
    """
    directory = Path(directory)
    tokenizer = make_tokenizer(
        directory, vocab_size=tokenizer_vocab_size or vocab_size, chat_template=chat_template
    )
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_positions,
        "initializer_range": weight_std,
        "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(architecture, **(fields | dict(config or {}))), dtype=torch.float32
        )
    model.save_pretrained(str(directory))
    return directory
