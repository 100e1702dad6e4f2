"""Whether all runs on this GPU, and is right: kernels, records and gradients beside references.

These parts need torch, triton and numpy alone; `tests` needs pytest too.

Shapes: T tokens, V vocabulary, H hidden, K kept entries, N draws.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from types import ModuleType

import torch
from torch import Tensor

from stillhouse.bench.gpu.findings import Recorder
from stillhouse.bench.gpu.scale import Scale
from stillhouse.bench.provenance import Provenance
from stillhouse.bench.synthetic import seeds_of
from stillhouse.logits import (
    CompressedLogits,
    Head,
    TargetSpec,
    backend_for,
    codec,
    codec_numpy,
    codec_torch,
    codec_triton,
    compress,
    compress_reference,
)
from stillhouse.logits.topk import blockmax_triton
from stillhouse.logits.topk.found import RawTopK, normalise
from stillhouse.losses import head_passes, head_passes_triton
from stillhouse.losses.distillation import distillation_loss
from stillhouse.losses.divergences import forward_kl

_FORMS = ((64, 0, 8), (12, 12, 6), (0, 50, 8))  # entries, draws and bits, beside the default's
# Shares of the reference's: sums in another order move a draw that is at a border, and a value that
# is at the edge of a code.
_SAME_DRAWS = _SAME_BYTES = 0.99
_ROUNDING = {"rtol": 1e-6, "atol": 1e-6}  # of log-probabilities, which come from exponentials
_SURE_ROWS = 0.9  # of such logits; the kernel leaves the others to the reference
_GRADIENT_ERRORS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the norm; rounding takes 1e-2

Launch = Callable[..., tuple[RawTopK, Tensor]]
"""What `blockmax_triton.launch` is."""


def machine(scale: Scale, recorder: Recorder) -> None:
    """What the figures depend on."""
    on_gpu = scale.device == "cuda"
    name, cuda = torch.cuda.get_device_name() if on_gpu else "cpu", str(torch.version.cuda)
    recorder.tell("device", name, cuda=cuda, **asdict(Provenance.of("make gpu")))
    if on_gpu:
        recorder.tell("memory", torch.cuda.get_device_properties(0).total_memory / 1e9, "GB")


def topk(scale: Scale, recorder: Recorder, *, launch: Launch = blockmax_triton.launch) -> None:
    """The teacher's kernels, for rows of an odd number of logits and rows of whole cache lines."""
    layouts = [
        (torch.float32, scale.vocab_size),
        (torch.bfloat16, scale.vocab_size),
        (torch.bfloat16, scale.row_width),
    ]
    for k in scale.ks:
        for dtype, row_stride in layouts:
            name = f"k = {k}, {str(dtype)[6:]}, rows {row_stride:,} apart"
            with recorder.attempt(name):
                _check_topk(
                    name, _logits(scale, dtype), scale, recorder, launch, k=k, row_stride=row_stride
                )
    backend = backend_for(_logits(scale, torch.float32).to(scale.device), k=scale.default_entries)
    right = backend.name == "triton" or scale.device == "cpu"
    recorder.tell(f"a teacher's logits take the path {backend.name}", right, why=backend.reason)


def _check_topk(
    name: str,
    exact_TV: Tensor,
    scale: Scale,
    recorder: Recorder,
    launch: Launch,
    *,
    k: int,
    row_stride: int,
) -> None:
    # the kernel on rows of this layout
    device, dtype = torch.device(scale.device), exact_TV.dtype
    strides = row_stride, 1
    logits_TV = torch.empty_strided(exact_TV.shape, strides, dtype=dtype, device=device)
    logits_TV.copy_(exact_TV)
    began = monotonic()
    raw, again_T = launch(logits_TV, k=k, temperature=1.0)
    sure_T = ~again_T.cpu()
    first_call_s = monotonic() - began
    found, lse_T = normalise(raw, vocab_size=scale.vocab_size, temperature=1.0)

    # the reference, where the kernel is sure of a row, and the kernel's own test
    wanted = compress_reference(exact_TV, TargetSpec(scale.vocab_size, k))
    same_ids = torch.equal(found.token_ids_TK.cpu()[sure_T], wanted.token_ids_TK[sure_T])
    pairs = (found.logprobs_TK, wanted.logprobs_TK), (found.tail_logmass_T, wanted.tail_logmass_T)
    same_values = all(
        torch.allclose(ours.cpu()[sure_T], theirs[sure_T], rtol=2e-6, atol=4e-6)
        for ours, theirs in pairs
    )
    lse_error = float((lse_T.cpu().double() - exact_TV.double().logsumexp(dim=1)).abs().max())
    self_test = blockmax_triton.self_test_failure(
        device, vocab_size=scale.vocab_size, k=k, dtype=dtype, row_stride=row_stride
    )
    enough_sure = float(sure_T.float().mean()) >= _SURE_ROWS
    recorder.tell(
        name,
        same_ids and same_values and enough_sure and self_test is None,
        same_ids=same_ids,
        same_values=same_values,
        lse_error=lse_error,
        num_doubted=int((~sure_T).sum()),
        self_test=self_test or "passed",
        first_call_s=first_call_s,
    )


def records(scale: Scale, recorder: Recorder) -> None:
    """Targets with draws beside the reference's, and records beside NumPy's, byte for byte."""
    size, default = scale.vocab_size, (scale.default_entries, scale.default_draws, 8)
    specs = [
        TargetSpec(size, k, num_draws=num_draws, value_bits=bits)
        for k, num_draws, bits in (default, *_FORMS)
    ]
    specs.append(replace(specs[0], weighted=True, label_logprob=True, tail_entropy=True))
    for spec in specs:
        name = f"{spec.k} entries, {spec.num_draws} draws, {spec.value_bits} bits"
        name += ", and all else" if spec.weighted else ""
        with recorder.attempt(name):
            _check_target(name, spec, scale, recorder)


def _check_target(name: str, spec: TargetSpec, scale: Scale, recorder: Recorder) -> None:
    # a target by this device and by the reference
    exact_TV = _logits(scale, torch.float32)
    seeds_T = seeds_of(len(exact_TV))
    labels_T = 7 * torch.arange(len(exact_TV)) if spec.label_logprob else None
    wanted = compress_reference(exact_TV, spec, seeds_T=seeds_T, labels_T=labels_T)
    found = compress(exact_TV.to(scale.device), spec, seeds_T=seeds_T, labels_T=labels_T)
    found = found.map(Tensor.cpu)
    same_ids = torch.equal(found.token_ids_TK, wanted.token_ids_TK)
    recorder.tell(f"{name}: the reference's entries", same_ids)
    if spec.num_draws:
        share = float((found.tail_ids_TN == wanted.tail_ids_TN).float().mean())
        recorder.tell(f"{name}: share of the reference's draws", share, at_least=_SAME_DRAWS)

    # their records, and one record by both codecs
    same_TB = codec_numpy.encode(found, spec) == codec_numpy.encode(wanted, spec)
    share = float(same_TB.float().mean())
    recorder.tell(f"{name}: share of the reference's bytes", share, at_least=_SAME_BYTES)
    _check_records(name, wanted, spec, scale, recorder)


def _check_records(
    name: str, target: CompressedLogits, spec: TargetSpec, scale: Scale, recorder: Recorder
) -> None:
    """The codec that a device's targets take, and its kernels and torch's codec on the device."""
    device = torch.device(scale.device)
    backend = codec.backend_for(spec, device)
    right = backend.name == "triton" or scale.device == "cpu"
    recorder.tell(f"{name}: records take the path {backend.name}", right, why=backend.reason)
    for library in (codec_triton, codec_torch):
        same = _same_bytes(library, target, spec, device)
        words = library.__name__.rpartition(".")[2]
        recorder.tell(f"{name}: the CPU's bytes and targets by {words}", same)


def _same_bytes(
    library: ModuleType, target: CompressedLogits, spec: TargetSpec, device: torch.device
) -> bool:
    """Bit for bit, but for log-probabilities."""
    records_TB = codec_numpy.encode(target, spec)
    on_device_TB = library.encode(target.map(lambda tensor: tensor.to(device)), spec)
    found = library.decode(on_device_TB, spec).map(Tensor.cpu).tensors
    wanted = codec_numpy.decode(records_TB, spec).tensors
    same = torch.equal(on_device_TB.cpu(), records_TB) and found.keys() == wanted.keys()
    for name, theirs in wanted.items():
        loose = name in ("logprobs_TK", "draw_logprobs_TN")
        equal = torch.allclose if loose else torch.equal
        same = same and equal(found[name], theirs, **(_ROUNDING if loose else {}))
    return same


def loss(scale: Scale, recorder: Recorder) -> None:
    """The student's two kernels, and loss and gradients beside those of float64."""
    device = torch.device(scale.device)
    with recorder.attempt("the kernels' own test"):
        self_test = head_passes_triton.self_test_failure(device)
        recorder.tell("the kernels' own test", self_test is None, why=self_test or "passed")
    for num_draws in (0, scale.default_draws):
        # inputs
        random = torch.Generator().manual_seed(0)
        exact_TV = _logits(scale, torch.float32)
        seeds_T = seeds_of(len(exact_TV))
        spec = TargetSpec(scale.vocab_size, scale.default_entries, num_draws=num_draws)
        target = compress(exact_TV, spec, seeds_T=seeds_T)
        target = target.map(lambda tensor: tensor.to(device))
        hidden_TH = torch.randn(len(exact_TV), scale.check_hidden_size, generator=random)
        weight_VH = torch.randn(scale.vocab_size, scale.check_hidden_size, generator=random)
        weight_VH *= 3.0 / scale.check_hidden_size**0.5

        # loss and gradients in each format
        for dtype, most in _GRADIENT_ERRORS.items():
            name = f"{num_draws} draws, {str(dtype)[6:]}: greatest error of loss and gradients"
            with recorder.attempt(name):
                inputs_TH, head_VH = hidden_TH.to(device, dtype), weight_VH.to(device, dtype)
                ours = _gradients(inputs_TH, head_VH, target)
                exact = _gradients(inputs_TH.double(), head_VH.double(), target)
                pairs = zip(ours, exact, strict=True)
                errors = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
                backend = head_passes.backend_for(head_VH)
                recorder.tell(name, max(errors), at_most=most, errors=errors, path=backend.name)


def _gradients(hidden_TH: Tensor, weight_VH: Tensor, target: CompressedLogits) -> Sequence[Tensor]:
    hidden_TH, weight_VH = (tensor.detach().requires_grad_() for tensor in (hidden_TH, weight_VH))
    total = distillation_loss(hidden_TH, Head(weight_VH), target, divergence=forward_kl).total
    return [total.detach(), *torch.autograd.grad(total, [hidden_TH, weight_VH])]


def tests(scale: Scale, recorder: Recorder) -> None:
    """`tests/gpu`, a finding for each test; without a GPU they are collected alone."""
    folder = Path(__file__).parents[4] / "tests" / "gpu"
    command = [sys.executable, "-m", "pytest", str(folder), "-p", "no:cacheprovider", "--tb=short"]
    name, options = "tests/gpu can be collected", ["--collect-only"]
    if scale.is_real:
        # several processes, since most of the time is the compiler's
        in_parallel = ["-n", "6"] if find_spec("xdist") else []
        name, options = "tests/gpu", [f"--findings={recorder.path.absolute()}", *in_parallel]
    code = subprocess.run([*command, *options], check=False).returncode
    recorder.tell(name, code == 0, exit_code=code)


def _logits(scale: Scale, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return (4.0 * torch.randn(scale.check_tokens, scale.vocab_size, generator=random)).to(dtype)
