"""What a model's files say of writing with it: the tokens that end a text, and the longest one."""

from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from stillhouse.config import ModelSection
from stillhouse.errors import ModelError
from stillhouse.model_path import source_of
from stillhouse.models.sources import from_hub
from stillhouse.models.tokenizers import vocab_size_of


def end_ids(section: ModelSection, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids with which a text ends, ascending: the tokenizer's own, and those of the model's
    generation config, where it has one. Raises ModelError where there is none."""
    found = [tokenizer.eos_token_id]
    try:
        pinned: dict[str, Any] = {} if section.revision is None else {"revision": section.revision}
        own = GenerationConfig.from_pretrained(source_of(section.model), **pinned)
        found += own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    except OSError:  # it has no such file
        pass
    most = vocab_size_of(tokenizer)
    ids = sorted({each for each in found if each is not None and each < most})
    if not ids:
        raise ModelError(
            f"{section.model} names no token that ends a text, so every sample would be cut; set "
            "eos_token in its tokenizer_config.json"
        )
    return tuple(ids)


def context_length(section: ModelSection) -> int | None:
    """The most tokens that the model is made for; None where its config does not say."""
    config = from_hub(
        lambda: AutoConfig.from_pretrained(
            source_of(section.model),
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        ),
        "config",
        section.model,
    )
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None
