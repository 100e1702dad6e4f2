"""A model's final hidden states, and its Head: the language-model head that makes logits of them.

A config may be wrong or incomplete about the head. So a Head is compared with the model's own
logits on a probe, and packing is tested, too.

Shapes: B rows, L tokens in a row, N tokens in a row of documents, H hidden, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import ModelError
from stillhouse.logits import Head
from stillhouse.models.attention import Documents, attends_by_document

# Names in the text configs of transformers for what happens between the head's matmul and the
# logits.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon H1, Muse
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM 3, Inkling
# Gemma and others, RecurrentGemma, xLSTM
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIES_BY_ITS_DIVISOR = ("hyperclovax",)
IGNORES_ITS_MULTIPLIER = ("mpt",)

# of the largest logit; about 4 units in the last place
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# of a hidden state's norm, packed against alone
PACKING_TOLERANCE = {torch.float32: 5e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
# of a hidden state's norm, same shapes and kernels
LEAK_FLOOR = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}
INFLATED_LOGIT = 100.0  # above every soft cap in use, which are 15 to 50


def final_hidden(model: PreTrainedModel, token_ids_BL: Tensor, positions_BL: Tensor) -> Tensor:
    """[B, L, H]: the hidden states that the head reads. A document begins where a position is 0,
    and with each row.

    The model is called without a cache and a mask: with either, documents packed in a row would see
    each other.
    """
    if attends_by_document(model):
        begins_BL = (positions_BL == 0).cpu().numpy()
        begins_BL[:, 0] = True
        places = np.append(np.flatnonzero(begins_BL), begins_BL.size)
        documents = Documents.of(np.diff(places))
        hidden_NH = hidden_of_documents(
            model, token_ids_BL.flatten(), positions_BL.flatten(), documents
        )
        return hidden_NH.reshape(*token_ids_BL.shape, -1)
    device = _input_device(model)
    ids_BL, positions_BL = token_ids_BL.to(device, torch.long), positions_BL.to(device, torch.long)
    output = _body(model)(input_ids=ids_BL, position_ids=positions_BL, use_cache=False)
    hidden_BLH: Tensor = output.last_hidden_state
    return hidden_BLH


def hidden_of_documents(
    model: PreTrainedModel, token_ids_N: Tensor, positions_N: Tensor, documents: Documents
) -> Tensor:
    """[N, H]: the hidden states that the head reads, of documents that lie one after the other, by
    a model that attends by document."""
    device = _input_device(model)
    output = _body(model)(
        input_ids=token_ids_N.to(device, torch.long)[None],
        position_ids=positions_N.to(device, torch.long)[None],
        use_cache=False,
        **documents.map(lambda places: places.to(device)).arguments,
    )
    hidden_NH: Tensor = output.last_hidden_state[0]
    return hidden_NH


def head_of(model: PreTrainedModel, *, vocab_size: int) -> Head:
    """The model's head, cut to the tokenizer's vocabulary: views of the model's parameters.

    Raises ModelError: no linear head of floats, or one with fewer rows than the tokenizer has ids.
    """
    # Refuse a head that is no matrix of floats, or too small.
    name = type(model).__name__
    layer = model.get_output_embeddings()
    weight_VH = getattr(layer, "weight", None)
    if weight_VH is None or weight_VH.ndim != 2 or not weight_VH.is_floating_point():
        raise ModelError(
            f"{name} has no head that is a matrix of floats (found {type(layer).__name__}); use "
            "an unquantised causal language model"
        )
    if weight_VH.shape[0] < vocab_size:
        raise ModelError(
            f"the head of {name} has {weight_VH.shape[0]} rows, fewer than the tokenizer's "
            f"{vocab_size} ids; use the tokenizer that belongs to it"
        )

    # Read it off the layer and the config.
    bias_V = getattr(layer, "bias", None)
    scale, softcap = _scale_and_softcap(model)
    return Head(
        _cut(weight_VH, vocab_size),
        None if bias_V is None else _cut(bias_V, vocab_size),
        scale=scale,
        softcap=softcap,
    )


def _cut(tensor: Tensor, vocab_size: int) -> Tensor:
    return tensor if tensor.shape[0] == vocab_size else tensor[:vocab_size]


def _scale_and_softcap(model: PreTrainedModel) -> tuple[float, float | None]:
    """The factor of the logits and their soft cap, if any, by the model's config."""
    config = model.config.get_text_config()

    def numbers(names: tuple[str, ...]) -> list[float]:
        found = [getattr(config, name, None) for name in names]
        return [float(value) for value in found if isinstance(value, int | float)]

    scale = 1.0
    for factor in () if config.model_type in IGNORES_ITS_MULTIPLIER else numbers(MULTIPLIERS):
        scale *= factor
    multiplies = config.model_type in MULTIPLIES_BY_ITS_DIVISOR
    for divisor in numbers(DIVISORS):
        scale = scale * divisor if multiplies else scale / divisor
    return scale, next(iter(numbers(SOFTCAPS)), None)


def _input_device(model: PreTrainedModel) -> torch.device:
    return next(model.get_input_embeddings().parameters()).device


def _body(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    for body in (model.base_model, getattr(model, "model", None), model.get_decoder()):
        if isinstance(body, nn.Module) and body is not model:
            return body
    raise ModelError(
        f"{type(model).__name__} does not tell its body from its head (base_model); use another "
        "architecture"
    )


def check_head(model: PreTrainedModel, *, vocab_size: int) -> None:
    """Raise ModelError unless `head_of` and `final_hidden` give a model's own logits on a probe."""
    compare_head(model, head_of(model, vocab_size=vocab_size))


@torch.inference_mode()
def compare_head(model: PreTrainedModel, head: Head) -> None:
    """Raise ModelError unless `head` gives the model's own logits, and those are finite and not all
    equal.

    The two are also compared on hidden states inflated until any soft cap shows, and on zeros, of
    which the bias alone is left: the logits of a model that was hardly trained are so small that a
    missing soft cap would pass for rounding.
    """
    # The model's own logits on the probe.
    name = type(model).__name__
    ids_BL = _probe_ids(head.vocab_size, shape=(2, 16))
    positions_BL = torch.arange(16).expand(2, 16)
    try:
        hidden_BLH = final_hidden(model, ids_BL, positions_BL)
        own_BLV = _own_logits(model, ids_BL, positions_BL)[..., : head.vocab_size]
    except (TypeError, AttributeError, ValueError) as error:
        raise ModelError(
            f"{name} cannot be called with input_ids, position_ids and use_cache: {error}; use "
            "another architecture"
        ) from error
    if not torch.isfinite(own_BLV).all():
        raise ModelError(
            f"{name} gives logits that are not finite; its weights are damaged, or need a wider "
            "dtype (float32 or bfloat16)"
        )

    # They must differ between tokens.
    if (own_BLV.amax(-1) - own_BLV.amin(-1)).max() < 1e-6:
        raise ModelError(
            f"{name} gives every token the same logit; its weights did not load, or were never "
            "trained"
        )

    # The head has to give the same.
    _expect_same(name, "on plain text", own_BLV, head.logits(hidden_BLH))
    inflation = max(1.0, INFLATED_LOGIT / float(own_BLV.abs().max()))
    for case, factor in (("inflated", inflation), ("at zero", 0.0)):
        fed_BLH = hidden_BLH * factor
        all_BLV = _own_logits(model, ids_BL, positions_BL, instead_BLH=fed_BLH)
        own_BLV = all_BLV[..., : head.vocab_size]
        _expect_same(name, f"with its hidden states {case}", own_BLV, head.logits(fed_BLH))


@torch.inference_mode()
def check_packing(model: PreTrainedModel, *, vocab_size: int) -> None:
    """Raise ModelError unless documents packed in a row do not see each other.

    Each document must have the hidden states that it has alone, up to rounding. And they must not
    change when the other document of its row does: there rounding is as large as the change in one
    row when the other row changes, which is zero unless experts share kernels between rows.
    """
    # Two rows of two documents each.
    first, second = (slice(0, 10), slice(0, 15)), (slice(10, 24), slice(15, 24))  # of rows 0 and 1
    ids_BL, other_BL = _probe_ids(vocab_size, shape=(2, 2, 24))
    lengths = [[part.stop - part.start for part in row] for row in zip(first, second, strict=True)]
    positions_BL = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed_BLH = final_hidden(model, ids_BL, positions_BL)

    # How far the hidden states move when another row changes, or the other document of the row.
    def after_changing(*parts: tuple[int, slice]) -> Tensor:
        changed_BL = ids_BL.clone()
        for row, part in parts:
            changed_BL[row, part] = other_BL[row, part]
        return _relative_difference(final_hidden(model, changed_BL, positions_BL), packed_BLH)

    noise = max(float(after_changing((row, slice(None)))[1 - row].max()) for row in (0, 1))
    moved = [
        (after_changing(*enumerate(first)), second),
        (after_changing(*enumerate(second)), first),
    ]
    moves = [moved_BL[row, part] for moved_BL, parts in moved for row, part in enumerate(parts)]
    # With noise, a few tokens may have gone to other experts: the median leaves them out.
    leak = max(float(move_L.median() if noise else move_L.max()) for move_L in moves)

    # How far they are from those of each document alone.
    alone = 0.0
    for row, part in (*enumerate(first), *enumerate(second)):
        only = slice(row, row + 1), part
        alone_LH = final_hidden(model, ids_BL[only], positions_BL[only])[0]
        alone = max(alone, float(_relative_difference(packed_BLH[row, part], alone_LH).median()))

    # Neither may be more than rounding.
    rounding = 4 * noise + LEAK_FLOOR[model.dtype]
    if not (leak <= rounding and alone <= PACKING_TOLERANCE[model.dtype]):
        raise ModelError(
            f"{type(model).__name__} lets documents packed in one row see each other: a "
            f"document's hidden states move by {leak:.2g} of their norm when its neighbours change "
            f"(allowed: {rounding:.2g}), and are {alone:.2g} from those it has alone (allowed: "
            f"{PACKING_TOLERANCE[model.dtype]:.2g}). Use a model whose attention heeds "
            "position_ids (state-space models do not), another attention implementation, or "
            "corpus.packing = false with chat"
        )


def _relative_difference(a_TH: Tensor, b_TH: Tensor) -> Tensor:
    """[T] distances, as fractions of the norm of b; T may be several dimensions."""
    shares_T: Tensor = (a_TH.float() - b_TH.float()).norm(dim=-1) / b_TH.float().norm(dim=-1)
    return shares_T


def _probe_ids(vocab_size: int, *, shape: tuple[int, ...]) -> Tensor:
    """Random ids from the middle of the vocabulary, where no special or image tokens are."""
    first, stop = vocab_size // 4, max(vocab_size // 2, vocab_size // 4 + 1)
    return torch.randint(first, stop, shape, generator=torch.Generator().manual_seed(0))


def _own_logits(
    model: PreTrainedModel,
    ids_BL: Tensor,
    positions_BL: Tensor,
    *,
    instead_BLH: Tensor | None = None,
) -> Tensor:
    """[B, L, V]: the model's own logits of these ids, or of hidden states that replace its own in
    front of the head."""

    def replace(_body: nn.Module, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = instead_BLH
        return output

    device = _input_device(model)
    # OPT calls its decoder and not its body
    bodies = {_body(model), model.get_decoder()} - {model} if instead_BLH is not None else set()
    hooks = [body.register_forward_hook(replace) for body in bodies]
    try:
        logits_BLV: Tensor = model(
            input_ids=ids_BL.to(device), position_ids=positions_BL.to(device), use_cache=False
        ).logits
        return logits_BLV
    finally:
        for hook in hooks:
            hook.remove()


def _expect_same(name: str, case: str, own_BLV: Tensor, head_BLV: Tensor) -> None:
    """Raise ModelError where the logits differ by more than rounding."""
    allowed = HEAD_TOLERANCE[head_BLV.dtype] * float(own_BLV.abs().max())
    difference = float((own_BLV.float() - head_BLV.to(own_BLV.device).float()).abs().max())
    if not difference <= allowed:
        raise ModelError(
            f"the head read off {name} does not give the model's own logits {case}: the largest "
            f"difference is {difference:.3g} (allowed: {allowed:.2g}). Something between its final "
            "hidden states and its logits is not known here; use another architecture"
        )
