"""Private names of Transformers: each that is relied on, behind a function whose docstring gives
the reason.

No other file of the package uses a private name of Transformers'. Its version is capped in
pyproject.toml.
"""

from transformers import PreTrainedModel


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention that a model uses. No public name tells it."""
    return str(model.config.get_text_config()._attn_implementation)


def attends_without_mask(model: PreTrainedModel) -> bool:
    """Whether attention alone mixes a model's tokens, and can be handed to a function that gets no
    mask, as FlashAttention gets none. Models with state-space layers are stateful."""
    if model._is_stateful or not model._can_set_attn_implementation():
        return False
    return bool(model._supports_flash_attn)
