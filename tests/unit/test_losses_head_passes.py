"""The GPU's kernels in Triton's interpreter against torch, and compiled for a GPU that need not be
there.

Triton decides when it is imported whether it interprets, so each way has a process of its own; what
runs there is named `in_...`.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.compiling import Kernel, machine_code
from stillhouse.logits import CompressedLogits, Head
from stillhouse.losses.divergences import forward_kl
from stillhouse.losses.fused_head import head_loss
from stillhouse.losses.head_passes import backend_for, passes_for
from stillhouse.losses.head_passes_torch import TailGrad, TorchPasses
from stillhouse.losses.sparse_gradient import Objective

C, V, K = 3, 4_133, 5  # more than a tile, and no multiple of anything
DTYPES = [torch.float32, torch.bfloat16]
BENDS = {
    "plain": {},
    "temperature": {"temperature": 2.0},
    "softcap": {"scale": 0.7, "softcap": 3.0},
    "everything": {"scale": 1.3, "softcap": 5.0, "temperature": 0.6, "label_loss": True},
}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(torch.set_num_threads, 1).result()
        yield pool


def bent_head(
    dtype: torch.dtype, *, scale: float = 1.0, softcap: float | None = None, **_: Any
) -> Head:
    return Head(torch.empty((V, 0), dtype=dtype), scale=scale, softcap=softcap)


def random_block(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products, kept ids (some of them the greatest, the first and the last), and both shares."""
    random = torch.Generator().manual_seed(seed)
    products_CV = 6 * torch.randn(C, V, generator=random)
    ids_CK = torch.stack([torch.randperm(V - 2, generator=random)[:K] + 1 for _ in range(C)])
    ids_CK[:, 0], ids_CK[0, 1], ids_CK[1, 1] = products_CV.argmax(1), 0, V - 1
    return products_CV, ids_CK, *torch.randn(2, C, 1, generator=random)


def both_passes(
    passes: Any, products_CV: Tensor, ids_CK: Tensor, share_C1: Tensor, ce_share_C1: Tensor
) -> list[Tensor]:
    room_CV = passes.products_CV[: len(products_CV)].copy_(products_CV)
    tail = passes.reduce_tail_(room_CV, ids_CK)
    gradient_CV = passes.write_grad_(room_CV, TailGrad(tail.peak_C1, share_C1, ce_share_C1))
    return [*tail, gradient_CV.scatter(1, ids_CK, 0.0).contiguous()]


def in_interpreter_passes(
    head: Head, options: dict[str, Any], *blocks: tuple[Tensor, ...]
) -> list[list[Tensor]]:
    from stillhouse.losses.head_passes_triton import TritonPasses

    passes = TritonPasses(head, C, **options)
    return [both_passes(passes, *block) for block in blocks]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bend", BENDS)
def test_the_kernels_find_what_torch_finds(
    interpreter: ProcessPoolExecutor, bend: str, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "label_loss": False} | {
        name: BENDS[bend][name] for name in ("temperature", "label_loss") if name in BENDS[bend]
    }
    head = bent_head(dtype, **BENDS[bend])
    # the second has fewer tokens, in the same room
    blocks = [
        random_block(0),
        tuple(tensor[:2] for tensor in random_block(1)),
    ]
    found = interpreter.submit(in_interpreter_passes, head, options, *blocks).result()
    for ours, block in zip(found, blocks, strict=True):
        wanted = both_passes(TorchPasses(head, C, **options), *block)
        assert ours[3].dtype == dtype
        for tail, reference in zip(ours[:3], wanted[:3], strict=True):
            torch.testing.assert_close(tail, reference, rtol=2e-5, atol=1e-5)
        # a saturated soft-cap leaves no more than that of its slope's digits
        scale = wanted[3].abs().amax(1, keepdim=True)
        # the interpreter cuts off bits where a GPU rounds
        rounding = 2**-7 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(
            ours[3].float() / scale, wanted[3] / scale, rtol=rounding, atol=1e-5
        )


def test_a_row_of_which_all_is_kept_has_a_finite_tail(interpreter: ProcessPoolExecutor) -> None:
    products_CV, _, *shares = random_block()
    ids_CV = torch.arange(V).expand(C, V)
    ((peak_C1, sum_C1, _, gradient_CV),) = interpreter.submit(
        in_interpreter_passes,
        bent_head(torch.float32),
        {"temperature": 1.0, "label_loss": False},
        (products_CV, ids_CV, *shares),
    ).result()
    assert (peak_C1 + sum_C1.log()).isfinite().all()
    assert not gradient_CV.any()


def test_a_nan_among_the_logits_stays_one(interpreter: ProcessPoolExecutor) -> None:
    products_CV, ids_CK, *shares = random_block()
    products_CV[1, 4_100] = torch.nan
    ((_, sum_C1, _, _),) = interpreter.submit(
        in_interpreter_passes,
        bent_head(torch.float32),
        {"temperature": 1.0, "label_loss": False},
        (products_CV, ids_CK, *shares),
    ).result()
    assert sum_C1.isnan().tolist() == [[False], [True], [False]]


def loss_inputs(dtype: torch.dtype) -> tuple[Tensor, Head, CompressedLogits, Tensor]:
    random = torch.Generator().manual_seed(3)
    num_tokens, vocab_size, width = 5, 1_003, 16
    teacher_TV = (3 * torch.randn(num_tokens, vocab_size, generator=random)).log_softmax(1)
    logprobs_TV, ids_TV = teacher_TV.sort(dim=1, descending=True)
    target = CompressedLogits(
        ids_TV[:, :K].int(),
        logprobs_TV[:, :K],
        logprobs_TV[:, K:].logsumexp(1),
        ids_TV[:, [K, K, 900]].sort(1).values.int(),
        vocab_size=vocab_size,
        temperature=1.5,
    )
    weight_VH = torch.randn(vocab_size, width, generator=random).to(dtype)
    head = Head(
        weight_VH, torch.randn(vocab_size, generator=random).to(dtype), scale=0.8, softcap=9.0
    )
    # kept, drawn, neither, ...
    labels_T = torch.stack(
        [ids_TV[0, 0], ids_TV[1, K], ids_TV[2, 50], ids_TV[3, 1], ids_TV[4, 900]]
    )
    return torch.randn(num_tokens, width, generator=random).to(dtype), head, target, labels_T


def loss_and_gradients(dtype: torch.dtype, make_passes: Any) -> list[Tensor]:
    hidden_TH, head, target, labels_T = loss_inputs(dtype)
    assert head.bias_V is not None
    leaves = [tensor.requires_grad_() for tensor in (hidden_TH, head.weight_VH, head.bias_V)]
    objective = Objective(forward_kl, divergence_weight=0.7, ce_weight=0.4, z_loss_weight=0.1)
    sums = head_loss(
        hidden_TH,
        head,
        target=target,
        labels_T=labels_T,
        objective=objective,
        block_tokens=2,
        make_passes=make_passes,
    )
    return [*(each.detach() for each in sums), *torch.autograd.grad(sums.total, leaves)]


def in_interpreter_loss(dtype: torch.dtype) -> list[Tensor]:
    from stillhouse.losses.head_passes_triton import TritonPasses

    return loss_and_gradients(dtype, TritonPasses)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_loss_is_the_same_by_either_backend(
    interpreter: ProcessPoolExecutor, dtype: torch.dtype
) -> None:
    found, wanted = (
        interpreter.submit(in_interpreter_loss, dtype).result(),
        loss_and_gradients(dtype, passes_for),
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= (
            1e-2 if dtype == torch.bfloat16 else 1e-5
        ) * theirs.abs().max()


def in_interpreter_self_test() -> str | None:
    from stillhouse.losses.head_passes_triton import self_test_failure

    return self_test_failure(torch.device("cpu"))


def test_the_kernels_pass_the_check_that_they_are_put_to_before_use(
    interpreter: ProcessPoolExecutor,
) -> None:
    assert interpreter.submit(in_interpreter_self_test).result() is None


@pytest.mark.parametrize(
    ("failure", "num_tries"),
    [(torch.OutOfMemoryError("CUDA out of memory"), 3), (RuntimeError("no such instruction"), 1)],
)
def test_a_failure_that_may_pass_is_told_and_tried_again_and_one_that_lasts_is_a_reason(
    failure: Exception, num_tries: int
) -> None:
    from stillhouse.losses.head_passes_triton import self_test_failure

    tries = 0

    def make_passes(head: Head, num_tokens: int, **options: Any) -> TorchPasses:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise failure
        return TorchPasses(head, num_tokens, **options)

    if num_tries == 1:
        assert "fails on cpu: RuntimeError: ['no such instruction']" in str(
            self_test_failure(torch.device("cpu"), make_passes=make_passes)
        )
        assert self_test_failure(torch.device("cpu"), make_passes=make_passes) is not None
    else:
        with pytest.raises(torch.OutOfMemoryError):
            self_test_failure(torch.device("cpu"), make_passes=make_passes)
        assert self_test_failure(torch.device("cpu"), make_passes=make_passes) is None
    assert tries == num_tries  # a try is of two heads


def in_process_modules() -> set[str]:
    loss_and_gradients(torch.float32, passes_for)
    return set(sys.modules)


def test_triton_is_not_imported_on_the_cpu() -> None:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        assert "triton" not in pool.submit(in_process_modules).result()


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    floats = dict.fromkeys(("peaks", "sums", "ce_sums", "shares", "ce_shares"), "*fp32")
    types = (
        floats
        | {"products": "*bf16", "width": "i32", "vocab_size": "i32"}
        | dict.fromkeys(("scale", "softcap", "inverse"), "fp32")
    )
    constants = {"HAS_SOFTCAP": True, "HAS_CE": True, "TILE": 4096}
    kernels = [
        Kernel("stillhouse.losses.head_passes_triton", name, types, constants)
        for name in ("_reduce_tail", "_write_grad")
    ]
    assert all(code.stack_bytes == 0 for code in machine_code(kernels, cache=tmp_path))


def test_a_backend_is_chosen_for_a_reason() -> None:
    backend = backend_for(torch.empty(2, 2))
    assert (backend.name, backend.reason) == (
        "torch",
        "the kernels are for CUDA, the head is on cpu",
    )
