"""The codec on a GPU: one Triton kernel writes records, another reads them.

The bytes, ids and refusals are those of `codec_torch`. A kernel marks records that break a rule;
after one synchronisation with the device, to learn whether there are any, `codec_torch` names the
row and the rule. Decoded log-probabilities agree to a bit of float32. Both kernels also run in
Triton's interpreter, on the CPU.

Shapes: T tokens, K exact head entries, N tail draws, B bytes of a record.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from stillhouse.logits import codec_kernels_triton as kernels
from stillhouse.logits import codec_torch
from stillhouse.logits.compressed import CompressedLogits
from stillhouse.logits.launching import may_pass, run_kernel
from stillhouse.logits.spec import TargetSpec

# Of K and of N; for more, a program needs more registers than there are.
MOST_IDS = 512
_NUMBERS = 256  # of one program: the ids of several records, so that all lanes have work
_SAMPLE_TOKENS = 4


def too_many(spec: TargetSpec) -> str | None:
    """The reason if the kernels are not for so many ids, or None."""
    if max(spec.k, spec.num_draws) <= MOST_IDS:
        return None
    found = f"{spec.k} entries and {spec.num_draws} draws"
    return f"a target has {found}, and the kernels are for {MOST_IDS} of each at most"


def encode(c: CompressedLogits, spec: TargetSpec) -> Tensor:
    """`codec.encode` of targets that are of `spec`, which has not `too_many` ids."""
    records_TB, wrong_T = launch_encode(c, spec)
    return codec_torch.encode(c, spec) if wrong_T.any() else records_TB


def decode(records_TB: Tensor, spec: TargetSpec) -> CompressedLogits:
    """`codec.decode` of records that have the size of `spec`, which has not `too_many` ids."""
    target, wrong_T = launch_decode(records_TB, spec)
    return codec_torch.decode(records_TB, spec) if wrong_T.any() else target


def launch_encode(c: CompressedLogits, spec: TargetSpec) -> tuple[Tensor, Tensor]:
    """Records, and bool [T]: those that no target has. Asynchronous."""
    assert c.token_ids_TK.dtype == c.tail_ids_TN.dtype == torch.int32
    c = c.map(Tensor.contiguous)
    shape, device = (c.num_tokens, spec.bytes_per_token), c.tail_logmass_T.device
    records_TB = torch.empty(shape, dtype=torch.uint8, device=device)
    return records_TB, _launch(kernels.encode, records_TB, c, spec)


def launch_decode(records_TB: Tensor, spec: TargetSpec) -> tuple[CompressedLogits, Tensor]:
    """Targets, and bool [T]: those whose record no encoder writes. Asynchronous."""
    num_tokens = len(records_TB)

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((num_tokens, *shape), dtype=of, device=records_TB.device)

    target = CompressedLogits(
        empty(spec.k, of=torch.int32),
        empty(spec.k),
        empty(),
        empty(spec.num_draws, of=torch.int32),
        vocab_size=spec.vocab_size,
        temperature=spec.temperature,
        draw_logprobs_TN=empty(spec.num_draws) if spec.weighted else None,
        label_logprob_T=empty() if spec.label_logprob else None,
        tail_entropy_T=empty() if spec.tail_entropy else None,
    )
    return target, _launch(kernels.decode, records_TB.contiguous(), target, spec)


def _launch(kernel: Any, records_TB: Tensor, c: CompressedLogits, spec: TargetSpec) -> Tensor:
    """Bool [T]: wrong ones."""
    wrong_T = records_TB.new_empty(len(records_TB), dtype=torch.bool)
    # in place of a tensor that there is not, one that will not be read
    others = (c.draw_logprobs_TN, c.label_logprob_T, c.tail_entropy_T)
    draw_logprobs, label, entropy = (wrong_T if one is None else one for one in others)
    options = options_for(spec)
    run_kernel(
        kernel,
        (triton.cdiv(len(records_TB), options["R"]),),
        records_TB,
        len(records_TB),
        spec.bytes_per_token,
        wrong_T,
        c.token_ids_TK,
        c.logprobs_TK,
        c.tail_logmass_T,
        c.tail_ids_TN,
        draw_logprobs,
        label,
        entropy,
        **options,
    )
    return wrong_T


def options_for(spec: TargetSpec) -> dict[str, Any]:
    """The kernels' constants, R records of one program among them, and how to compile them."""
    room: int = triton.next_power_of_2(max(2, spec.k, spec.num_draws))
    return {
        "V": spec.vocab_size,
        "K": spec.k,
        "BITS": spec.value_bits,
        "N": spec.num_draws,
        "WEIGHTED": spec.weighted,
        "LABEL": spec.label_logprob,
        "ENTROPY": spec.tail_entropy,
        "R": max(1, _NUMBERS // room),
        # `store_ids` compares each id with each word of their high bits, of which there are more
        # with the ids
        "num_warps": max(1, room * room >> 15),
        "enable_fp_fusion": False,
    }


@cache
def self_test_failure(
    device: torch.device,
    spec: TargetSpec,
    *,
    write: Callable[..., tuple[Tensor, Tensor]] = launch_encode,
    read: Callable[..., tuple[CompressedLogits, Tensor]] = launch_decode,
) -> str | None:
    """Compile the kernels for such records and compare them with `codec_torch`; None if right.

    Takes some seconds. The answer is cached, with a failure that is for good. A failure that may
    pass, such as too little memory, is raised, and the next call tries again.
    """
    # four targets by the kernels
    sample = _sample(spec)
    wanted_TB = codec_torch.encode(sample, spec)
    try:
        records_TB, unwritten_T = write(sample.map(lambda tensor: tensor.to(device)), spec)
        target, unread_T = read(wanted_TB.to(device), spec)
        records_TB, found = records_TB.cpu(), target.map(Tensor.cpu)
        refused = bool((unwritten_T | unread_T).any())
    except Exception as failure:  # of a compiler, a driver or a device: torch can do it
        if may_pass(failure):
            raise
        return (
            f"triton {triton.__version__} fails on {device}: {type(failure).__name__}: "
            f"{next(iter(str(failure).splitlines()), '')}"
        )

    # the same by torch
    wanted = codec_torch.decode(wanted_TB, spec).tensors
    same = torch.equal(records_TB, wanted_TB) and not refused
    for name, tensor in found.tensors.items():
        same = same and torch.allclose(tensor, wanted[name], rtol=1e-6, atol=1e-6)
    return None if same else f"triton {triton.__version__} answers wrongly on {device}"


def _sample(spec: TargetSpec) -> CompressedLogits:
    """Random targets of `spec` on the CPU."""
    random = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand((_SAMPLE_TOKENS, *shape), generator=random)

    # distinct ids, one in each of K parts of the vocabulary; draws of any ids
    first_K1 = torch.arange(spec.k + 1) * spec.vocab_size // max(1, spec.k)
    ids_TK = first_K1[:-1] + (uniform(spec.k).double() * first_K1.diff()).long()
    draws_TN = (uniform(spec.num_draws).double() * spec.vocab_size).long().sort(dim=1).values

    # their log-probabilities, one for each drawn id, and what else there may be
    whole = spec.k == spec.vocab_size
    tail_T = torch.full((_SAMPLE_TOKENS,), -torch.inf) if whole else -4.0 * uniform() - 0.01
    return CompressedLogits(
        ids_TK.int(),
        -20.0 * uniform(spec.k),
        tail_T,
        draws_TN.int(),
        vocab_size=spec.vocab_size,
        temperature=spec.temperature,
        draw_logprobs_TN=-(draws_TN % 61).float() / 2 if spec.weighted else None,
        label_logprob_T=-9.0 * uniform() - 0.01 if spec.label_logprob else None,
        tail_entropy_T=11.0 * uniform() if spec.tail_entropy else None,
    )
