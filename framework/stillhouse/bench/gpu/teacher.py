"""A teacher of real shape and random weights: its start-up checks, and its share of the GPU's peak.

Shapes: B rows, L positions, T tokens, H hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from stillhouse.bench.cost import Work, time_in_turn
from stillhouse.bench.gpu.findings import Recorder
from stillhouse.bench.gpu.scale import Scale
from stillhouse.bench.synthetic import seeds_of
from stillhouse.logits import TargetSpec, compress_hidden, encode
from stillhouse.models.heads import check_head, check_packing, final_hidden, head_of

_PEAK_TFLOPS = {"A100": 312.0, "H100": 989.4, "H200": 989.4}  # dense bfloat16, by the datasheets
_REPEATS = 2  # a forward pass takes seconds at the greatest length
_DOCUMENT_LENGTHS = (100, 1000)


def teacher(scale: Scale, recorder: Recorder) -> None:
    """None of this depends on the values of weights."""
    model = _model(scale)
    for check in (check_head, check_packing):
        with recorder.attempt(check.__name__):
            check(model, vocab_size=scale.vocab_size)
            recorder.tell(check.__name__, True)
    for num_rows, length, least in scale.length_promises:
        with recorder.attempt(f"L = {length}"), torch.inference_mode():
            _time_forward(scale, model, recorder, num_rows=num_rows, length=length, least=least)
    num_rows, length, _ = scale.length_promises[0]
    with recorder.attempt("targets"), torch.inference_mode():
        _time_targets(scale, model, recorder, num_rows=num_rows, length=length)


def _time_forward(
    scale: Scale,
    model: PreTrainedModel,
    recorder: Recorder,
    *,
    num_rows: int,
    length: int,
    least: float,
) -> None:
    ids_BL, positions_BL, num_pairs = _packed(scale, num_rows=num_rows, length=length)
    seconds = _seconds(lambda: [final_hidden(model, ids_BL, positions_BL)], scale)
    recorder.tell(f"L = {length}: forward", num_rows * length / seconds, "tokens/s")
    tflops = _flops(model, num_rows * length, num_pairs) / seconds / 1e12
    recorder.tell(f"L = {length}: forward", tflops, "TFLOP/s")
    peak_tflops = _peak_tflops(scale.device)
    if peak_tflops:
        share = tflops / peak_tflops
        name = f"L = {length}: forward, of the peak of {peak_tflops:g} TFLOP/s"
        recorder.tell(name, share, at_least=scale.promise(least))


def _time_targets(
    scale: Scale, model: PreTrainedModel, recorder: Recorder, *, num_rows: int, length: int
) -> None:
    ids_BL, positions_BL, _ = _packed(scale, num_rows=num_rows, length=length)
    head = head_of(model, vocab_size=scale.vocab_size)
    spec = TargetSpec(scale.vocab_size, scale.default_entries, num_draws=scale.default_draws)
    seeds_T = seeds_of(num_rows * length).to(scale.device)

    def work() -> Sequence[Tensor]:
        hidden_TH = final_hidden(model, ids_BL, positions_BL).flatten(0, 1)
        target = compress_hidden(hidden_TH, head, spec=spec, seeds_T=seeds_T)
        return [encode(target, spec)]

    speed = num_rows * length / _seconds(work, scale)
    recorder.tell(f"L = {length}: forward and default target", speed, "tokens/s")


def _seconds(work: Work, scale: Scale) -> float:
    device = torch.device(scale.device)
    timings = time_in_turn(lambda _: {"work": work}, repeats=_REPEATS, device=device)
    return timings.of("work").median


def _packed(scale: Scale, *, num_rows: int, length: int) -> tuple[Tensor, Tensor, int]:
    """Token ids and positions, on the device, and how many pairs of tokens attend to each other."""
    positions_BL, num_pairs = packed_positions(num_rows, length)
    ids_BL = torch.randint(scale.vocab_size, (num_rows, length))
    return ids_BL.to(scale.device), positions_BL.to(scale.device), num_pairs


def _model(scale: Scale) -> PreTrainedModel:
    """Made where it is needed, so that no weight travels."""
    shape = scale.teacher
    config = Qwen3Config(
        vocab_size=scale.wide_vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max(length for _, length, _ in scale.length_promises),
        tie_word_embeddings=False,
    )
    dtype = getattr(torch, scale.teacher_dtype)
    with torch.device(scale.device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval()
    return model


def packed_positions(num_rows: int, length: int) -> tuple[Tensor, int]:
    """[B, L] positions of documents of 100 to 1,000 tokens, end to end; and the pairs in them."""
    random, rows, num_pairs = torch.Generator().manual_seed(0), [], 0
    for _ in range(num_rows):
        sizes: list[int] = []
        while sum(sizes) < length:
            size = int(torch.randint(*_DOCUMENT_LENGTHS, (), generator=random))
            sizes.append(min(size, length - sum(sizes)))
        rows.append(torch.cat([torch.arange(size) for size in sizes]))
        num_pairs += sum(size * (size + 1) // 2 for size in sizes)
    return torch.stack(rows), num_pairs


def _flops(model: PreTrainedModel, num_tokens: int, num_pairs: int) -> float:
    """Of the body: 2 for each weight and token, 4 for each pair, layer and channel of attention."""
    named = model.named_parameters()
    num_weights = sum(
        weight.numel() for name, weight in named if "embed" not in name and "lm_head" not in name
    )
    config = model.config
    channels: int = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2.0 * num_weights * num_tokens + 4.0 * channels * num_pairs


def _peak_tflops(device: str) -> float | None:
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for model, peak in _PEAK_TFLOPS.items() if model in name), None)
