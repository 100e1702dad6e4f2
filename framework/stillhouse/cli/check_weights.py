"""`stillhouse check`, its part on a model's weights: their bytes, also where they are quantised."""

from collections.abc import Mapping
from typing import Any

_SCALE_BYTES = 2.5 / 128  # of a weight in few bits: a scale and a zero for each 128


def quantisation_of(lm: Any) -> Mapping[str, Any]:
    """What the config of a model's files says of their quantisation; empty where there is none."""
    found = getattr(lm.config, "quantization_config", None) or {}
    return found if isinstance(found, Mapping) else dict(found.to_dict())


def weight_bytes(lm: Any, quantisation: Mapping[str, Any], *, dtype_bytes: int) -> float:
    """The bytes of a model's weights. Embeddings and head are never quantised. A method whose bits
    are not known counts as none: so much are the weights at most."""
    outside = [lm.get_input_embeddings().weight, lm.get_output_embeddings().weight]
    num_outside: int = sum(each.numel() for each in {id(each): each for each in outside}.values())
    num_inside: int = sum(each.numel() for each in lm.parameters()) - num_outside
    in_layers = _bytes_of_one(quantisation) or dtype_bytes
    return num_outside * dtype_bytes + num_inside * in_layers


def format_words(quantisation: Mapping[str, Any], dtype: str) -> str:
    """The number format of the weights, for people: bfloat16, or fp8."""
    return str(quantisation["quant_method"]) if _bytes_of_one(quantisation) else dtype


def _bytes_of_one(quantisation: Mapping[str, Any]) -> float | None:
    """Of a weight inside of the layers; None where that is not known."""
    if "fp8" in str(quantisation.get("quant_method")):
        return 1.0
    bits = quantisation.get("bits", quantisation.get("w_bit"))
    return bits / 8 + _SCALE_BYTES if isinstance(bits, int) else None
