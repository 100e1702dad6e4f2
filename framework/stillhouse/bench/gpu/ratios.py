"""How fast both hot paths are, as ratios to what they are promised against, timed in one process.

The ways are those of `stillhouse bench topk`, `head` and `loss`, at the sizes of the promises.

Shapes: T tokens, V vocabulary, H hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from inspect import signature

import torch
from torch import Tensor

from stillhouse.bench import head as head_bench
from stillhouse.bench import loss as loss_bench
from stillhouse.bench import topk as topk_bench
from stillhouse.bench.cost import Timings, Work, extra_bytes_of, time_in_turn
from stillhouse.bench.gpu.findings import Recorder
from stillhouse.bench.gpu.scale import Scale
from stillhouse.bench.synthetic import seeds_of
from stillhouse.logits import Head, TargetSpec, compress_hidden, decode, encode

_TOPK_PROMISES = {topk_bench.EAGER: 10.0, topk_bench.COMPILED: 4.0}  # times their speed
_LOSS_PROMISE, _LIGER_PROMISE = 1.15, 1.0  # times their seconds
_LIGER_CHUNKS = 16  # by its measure of memory: blocks of 4,096 tokens at 152 k ids, as ours
_DEFAULT_TARGET, _TUNED_LIGER = "default target", "Liger, text alone, tuned"

LossWay = Callable[[loss_bench.Inputs], Sequence[Tensor]]


def topk(scale: Scale, recorder: Recorder) -> None:
    """From logits to ids, log-probabilities and log-sum-exp; with rows of odd length too."""
    with recorder.attempt("ceilings"):
        _tell_ceilings(scale, recorder)
    cases = [(scale.wide_vocab_size, False), (scale.vocab_size, False)]
    if scale.is_real:
        cases.append((scale.wide_vocab_size, True))
    for vocab_size, with_compile in cases:
        sizes = scale.time_tokens, vocab_size, scale.k
        setting = topk_bench.Setting(*sizes, "bfloat16", scale.device)
        name = f"{vocab_size:,} ids"
        with recorder.attempt(name):
            timings = _timed(partial(_topk_works, setting, with_compile=with_compile), scale)
            _tell_times(name, timings, setting.num_tokens, recorder)
            ours = topk_bench.IN_TRITON if topk_bench.IN_TRITON in timings.seconds else "stillhouse"
            speed = 2 * setting.num_tokens * vocab_size / timings.of(ours).median / 1e12
            recorder.tell(f"{name}: {ours}, logits read", speed, "TB/s")
            other = topk_bench.COMPILED if with_compile else topk_bench.EAGER
            ratio, least = timings.ratio(other, ours).median, scale.promise(_TOPK_PROMISES[other])
            recorder.tell(f"{name}: speed over {other}", ratio, at_least=least)


def _tell_ceilings(scale: Scale, recorder: Recorder) -> None:
    """What this GPU does at best, to read the other figures by."""
    device, size = torch.device(scale.device), scale.time_tokens
    copied, place = (torch.randn(size, size, device=device) for _ in range(2))
    square = copied.bfloat16()
    works: dict[str, Work] = {
        "copy": lambda: [place.copy_(copied)],
        "product": lambda: [square @ square],
    }
    timings = _timed(lambda _: works, scale)
    copy_speed = 8 * size**2 / timings.of("copy").median / 1e12
    recorder.tell("a copy, read and written", copy_speed, "TB/s")
    product_speed = 2 * size**3 / timings.of("product").median / 1e12
    recorder.tell(f"a product of {size:,} in bfloat16", product_speed, "TFLOP/s")


def _topk_works(setting: topk_bench.Setting, repeat: int, *, with_compile: bool) -> dict[str, Work]:
    """All but the filter in torch, which on a GPU goes row by row and would take longest."""
    works = topk_bench.works_of_ways(setting, repeat, with_compile=with_compile)
    return {way: work for way, work in works.items() if way != topk_bench.IN_TORCH}


def head(scale: Scale, recorder: Recorder) -> None:
    """From hidden states to records: the default target, of float32 logits as by default."""
    device = torch.device(scale.device)
    for hidden_size, least in scale.hidden_promises:
        setting = _setting(scale, hidden_size, k=scale.k)
        name = f"H = {hidden_size}"
        with recorder.attempt(name):
            timings = _timed(partial(_head_works, scale, setting), scale)
            _tell_times(name, timings, setting.num_tokens, recorder)
            share = timings.ratio(head_bench.PRODUCT, _DEFAULT_TARGET).median
            words = f"{name}: {_DEFAULT_TARGET}, of the product's speed"
            recorder.tell(words, share, at_least=scale.promise(least))
            extra = extra_bytes_of(_head_works(scale, setting, 0)[_DEFAULT_TARGET], device)
            recorder.tell(f"{name}: {_DEFAULT_TARGET}, extra memory", extra / 1e6, "MB")
    for k, num_draws in ((scale.default_entries, scale.default_draws), (scale.k, 0)):
        with recorder.attempt(f"records of {k} entries, {num_draws} draws"):
            _time_records(scale, recorder, k=k, num_draws=num_draws)


def _head_works(scale: Scale, setting: loss_bench.Setting, repeat: int) -> dict[str, Work]:
    inputs = head_bench.Inputs.of(setting, repeat)
    weight_VH = inputs.head.weight_VH
    wide_WH = torch.cat([weight_VH, weight_VH[: scale.row_width - setting.vocab_size]])
    exact = replace(inputs, head=Head(weight_VH, float32_logits=True))
    seeds_T = seeds_of(setting.num_tokens).to(setting.torch_device)
    spec = TargetSpec(setting.vocab_size, scale.default_entries, num_draws=scale.default_draws)
    more = replace(spec, weighted=True, label_logprob=True, tail_entropy=True)
    return {
        head_bench.PRODUCT: partial(head_bench.product, inputs),
        f"{head_bench.PRODUCT}, {scale.row_width:,} ids": lambda: [inputs.hidden_TH @ wide_WH.T],
        _DEFAULT_TARGET: partial(_to_records, exact, seeds_T, spec),
        f"{_DEFAULT_TARGET}, two streams": partial(_to_records, exact, seeds_T, spec, overlap=True),
        f"{_DEFAULT_TARGET}, bfloat16 logits": partial(_to_records, inputs, seeds_T, spec),
        f"{_DEFAULT_TARGET}, weighted, label, entropy": partial(_to_records, exact, seeds_T, more),
        f"{setting.k} entries, bfloat16 logits": partial(head_bench.ours, inputs),
        head_bench.EAGER: partial(head_bench.eager, inputs),
    }


def _to_records(
    inputs: head_bench.Inputs, seeds_T: Tensor, spec: TargetSpec, *, overlap: bool = False
) -> Sequence[Tensor]:
    labels_T = torch.arange(len(inputs.hidden_TH)) if spec.label_logprob else None
    target = compress_hidden(
        inputs.hidden_TH,
        inputs.head,
        spec=spec,
        seeds_T=seeds_T,
        labels_T=labels_T,
        overlap=overlap,
    )
    return [encode(target, spec)]


def _time_records(scale: Scale, recorder: Recorder, *, k: int, num_draws: int) -> None:
    setting = _setting(scale, scale.check_hidden_size, k=k)
    seeds_T = seeds_of(setting.num_tokens)
    spec = TargetSpec(scale.vocab_size, k, num_draws=num_draws)
    (records_TB,) = _to_records(head_bench.Inputs.of(setting, 0), seeds_T, spec)
    target = decode(records_TB, spec)
    works: dict[str, Work] = {
        "written": lambda: [encode(target, spec)],
        "read": lambda: [decode(records_TB, spec).token_ids_TK],
    }
    timings = _timed(lambda _: works, scale)
    for way in works:
        speed = setting.num_tokens / timings.of(way).median / 1e6
        recorder.tell(f"records of {k} entries, {num_draws} draws: {way}", speed, "M tokens/s")


def loss(scale: Scale, recorder: Recorder) -> None:
    """The student's head, forward and backward, beside three matrix products and Liger."""
    hidden_size = scale.hidden_promises[0][0]
    setting = replace(_setting(scale, hidden_size, k=scale.k), vocab_size=scale.wide_vocab_size)
    device = setting.torch_device

    # beside the three products
    ways: dict[str, LossWay] = {
        loss_bench.PRODUCTS: loss_bench.products,
        loss_bench.OURS: loss_bench.ours,
        "stillhouse, with draws": partial(_ours_with_draws, scale.default_draws),
        loss_bench.NAIVE: loss_bench.naive,
        loss_bench.OUR_TEXT: loss_bench.our_text,
    }
    with recorder.attempt("beside three products"):
        timings = _timed(partial(_loss_works, ways, setting), scale)
        _tell_times("the loss", timings, setting.num_tokens, recorder)
        ratio = timings.ratio(loss_bench.OURS, loss_bench.PRODUCTS).median
        recorder.tell("seconds over three products", ratio, at_most=scale.promise(_LOSS_PROMISE))
        for way in (loss_bench.OURS, loss_bench.NAIVE):
            extra = extra_bytes_of(_loss_works(ways, setting, 0)[way], device)
            recorder.tell(f"the loss: {way}, extra memory", extra / 1e6, "MB")

    # beside Liger, on the text alone
    if scale.device != "cuda" or not find_spec("liger_kernel"):
        return
    texts: dict[str, LossWay] = {
        loss_bench.OUR_TEXT: loss_bench.our_text,
        loss_bench.LIGER: loss_bench.liger,
        _TUNED_LIGER: _tuned_liger,
    }
    with recorder.attempt("beside Liger"):
        timings = _timed(partial(_loss_works, texts, setting), scale)
        _tell_times("the text", timings, setting.num_tokens, recorder)
        ratio = timings.ratio(loss_bench.OUR_TEXT, _TUNED_LIGER).median
        recorder.tell(f"seconds over {_TUNED_LIGER}", ratio, at_most=scale.promise(_LIGER_PROMISE))


def _loss_works(
    ways: Mapping[str, LossWay], setting: loss_bench.Setting, repeat: int
) -> dict[str, Work]:
    inputs = loss_bench.Inputs.of(setting, repeat)
    return {way: partial(do, inputs) for way, do in ways.items()}


def _ours_with_draws(num_draws: int, inputs: loss_bench.Inputs) -> Sequence[Tensor]:
    target, device = inputs.target, inputs.hidden_TH.device
    shape = len(inputs.hidden_TH), num_draws
    ids_TN = torch.randint(target.vocab_size, shape, device=device, dtype=torch.int32)
    target = replace(target, tail_ids_TN=ids_TN.sort(dim=1).values)
    return loss_bench.ours(replace(inputs, target=target))


def _tuned_liger(inputs: loss_bench.Inputs) -> Sequence[Tensor]:
    """With blocks as large as ours, and the weight's gradient summed in float32, as ours is."""
    from liger_kernel.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction as Function,
    )

    tuned = {"reduction": "sum", "accum_dtype": torch.float32, "chunk_mem_const": _LIGER_CHUNKS}
    call = signature(Function.forward).bind(
        None, inputs.hidden_TH, inputs.weight_VH, inputs.labels_T, **tuned
    )
    call.apply_defaults()  # since `apply` takes no keywords
    return inputs.with_gradients(Function.apply(*call.args[1:])[0])


def _setting(scale: Scale, hidden_size: int, *, k: int) -> loss_bench.Setting:
    sizes = scale.time_tokens, scale.vocab_size, hidden_size, k
    return loss_bench.Setting(*sizes, dtype="bfloat16", device=scale.device)


def _timed(works_of: Callable[[int], Mapping[str, Work]], scale: Scale) -> Timings:
    return time_in_turn(works_of, repeats=scale.repeats, device=torch.device(scale.device))


def _tell_times(name: str, timings: Timings, num_tokens: int, recorder: Recorder) -> None:
    for way in timings.seconds:
        recorder.tell(f"{name}: {way}", 1e6 * timings.of(way).median / num_tokens, "us a token")
