"""The fused head against the dense form in float64: the same loss and gradients, without the dense
form's memory."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.errors import StudentError
from stillhouse.logits import CompressedLogits, Head, TargetSpec, compress, token_seeds
from stillhouse.losses.distillation import LossTerms, distillation_loss
from stillhouse.losses.divergences import divergence_named
from stillhouse.losses.fused_head import add_product_
from stillhouse.losses.head_passes import block_tokens_for
from stillhouse.losses.reference import reference_loss
from stillhouse.losses.sparse_gradient import Objective

T, H, V, K = 13, 7, 37, 5
MIX = 0.3


@dataclass(frozen=True)
class Case:
    """Everything about a loss that is not a tensor."""

    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    k: int = K
    num_draws: int = 0
    ce_weight: float = 0.0
    divergence_weight: float = 1.0
    z_loss_weight: float = 0.0


@dataclass(frozen=True)
class Inputs:
    hidden_TH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    target: CompressedLogits
    labels_T: Tensor

    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.hidden_TH, self.weight_VH, self.bias_V) if leaf is not None]

    def to(self, dtype: torch.dtype) -> "Inputs":
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves()]
        return replace(
            self,
            hidden_TH=leaves[0],
            weight_VH=leaves[1],
            bias_V=leaves[2] if len(leaves) > 2 else None,
        )


CASES = {
    "plain": Case(),
    "bias": Case(bias=True),
    "softcap": Case(softcap=1.5),
    "scale": Case(scale=0.7),
    "temperature": Case(temperature=2.0),
    "text": Case(ce_weight=0.4, divergence_weight=0.6),
    "temperature and text": Case(temperature=2.0, ce_weight=0.4),
    "everything": Case(
        bias=True, scale=1.3, softcap=2.0, temperature=1.7, ce_weight=0.4, divergence_weight=0.3
    ),
    "all kept": Case(k=V, ce_weight=0.4, z_loss_weight=0.1),
    "none kept": Case(k=0, ce_weight=0.4, z_loss_weight=0.1),
    "draws": Case(num_draws=6),
    "z-loss": Case(z_loss_weight=0.1),
    "z-loss and text": Case(z_loss_weight=0.1, ce_weight=0.4),
    "z-loss and temperature": Case(z_loss_weight=0.1, temperature=2.0),
    "z-loss, temperature and text": Case(z_loss_weight=0.1, temperature=0.7, ce_weight=0.4),
    "z-loss, softcap and scale": Case(z_loss_weight=0.1, softcap=1.5, scale=0.7),
    "z-loss and draws": Case(z_loss_weight=0.1, num_draws=6, bias=True),
    "draws and everything": Case(
        bias=True,
        scale=1.3,
        softcap=2.0,
        temperature=1.7,
        num_draws=9,
        ce_weight=0.4,
        divergence_weight=0.3,
        z_loss_weight=0.2,
    ),
}
DRAWS_ALONE = Case(k=0, num_draws=7, temperature=1.7, ce_weight=0.4, z_loss_weight=0.1)


def make_target(
    logits_TV: Tensor, *, k: int, num_draws: int = 0, temperature: float = 1.0
) -> CompressedLogits:
    """The k likeliest, and any of the other ids as draws, with repeats."""
    logp_TV, ids_TV = (
        (logits_TV.double() / temperature)
        .log_softmax(-1)
        .sort(dim=-1, descending=True, stable=True)
    )
    places_TN = torch.randint(
        k,
        max(k + 1, logits_TV.shape[1]),
        (len(logits_TV), num_draws),
        generator=torch.Generator().manual_seed(k),
    )
    draws_TN = ids_TV.gather(1, places_TN)
    return CompressedLogits(
        ids_TV[:, :k].int(),
        logp_TV[:, :k].float(),
        logp_TV[:, k:].logsumexp(-1).float(),
        draws_TN.sort(dim=1).values.int(),
        vocab_size=logits_TV.shape[1],
        temperature=temperature,
    )


def make_inputs(case: Case, *, num_tokens: int = T, seed: int = 0) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(num_tokens, H, dtype=torch.float64, generator=random)
    weight_VH = torch.randn(V, H, dtype=torch.float64, generator=random)
    bias_V = torch.randn(V, dtype=torch.float64, generator=random) if case.bias else None
    target = make_target(
        3 * torch.randn(num_tokens, V, generator=random),
        k=case.k,
        num_draws=case.num_draws,
        temperature=case.temperature,
    )
    labels_T = torch.randint(V, (num_tokens,), generator=random)
    # some labels are kept, some are not
    labels_T[: num_tokens // 2] = target.token_ids_TK[: num_tokens // 2, 0] if case.k else 0
    return Inputs(hidden_TH, weight_VH, bias_V, target, labels_T).to(torch.float64)


def kl(a: Tensor, b: Tensor) -> Tensor:
    divergences: Tensor = (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)
    return divergences


DENSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: (
        MIX * kl(p, MIX * p + (1 - MIX) * q) + (1 - MIX) * kl(q, MIX * p + (1 - MIX) * q)
    ),
    "skew_forward_kl": lambda p, q: kl(p, MIX * p + (1 - MIX) * q),
    "skew_reverse_kl": lambda p, q: kl(q, (1 - MIX) * p + MIX * q),
    "tvd": lambda p, q: (p - q).abs().sum(-1) / 2,
}


def dense_total(inputs: Inputs, case: Case, name: str) -> Tensor:
    """The objective by its definition, with every probability of the student in memory."""
    logits_TV = inputs.hidden_TH @ inputs.weight_VH.T
    if inputs.bias_V is not None:
        logits_TV = logits_TV + inputs.bias_V
    logits_TV = logits_TV * case.scale
    if case.softcap is not None:
        logits_TV = case.softcap * torch.tanh(logits_TV / case.softcap)
    ids_TK = inputs.target.token_ids_TK.long()
    is_tail_TV = torch.ones_like(logits_TV, dtype=torch.bool).scatter(1, ids_TK, False)
    q_TV = (
        (logits_TV.float() if logits_TV.dtype == torch.bfloat16 else logits_TV)
        .div(case.temperature)
        .softmax(-1)
    )
    q_TK1, p_TK1 = q_TV.gather(1, ids_TK), inputs.target.logprobs_TK.to(q_TV.dtype).exp()
    if case.k < V:
        q_TK1 = torch.cat([q_TK1, (q_TV * is_tail_TV).sum(1, keepdim=True)], 1)
        p_TK1 = torch.cat([p_TK1, inputs.target.tail_logmass_T.to(q_TV.dtype).exp()[:, None]], 1)
    total = case.divergence_weight * case.temperature**2 * DENSE[name](p_TK1, q_TK1).sum()
    if case.num_draws and name == "forward_kl":
        tail_TV = (q_TV * is_tail_TV) / (q_TV * is_tail_TV).sum(1, keepdim=True)
        surprise_T = -tail_TV.gather(1, inputs.target.tail_ids_TN.long()).log().mean(1)
        total = (
            total + case.divergence_weight * case.temperature**2 * (p_TK1[:, -1] * surprise_T).sum()
        )
    if case.ce_weight:
        total = total + case.ce_weight * torch.nn.functional.cross_entropy(
            logits_TV.to(q_TV.dtype), inputs.labels_T, reduction="sum"
        )
    if case.z_loss_weight:
        total = total + case.z_loss_weight * logits_TV.to(q_TV.dtype).logsumexp(-1).square().sum()
    return total


def fused(
    inputs: Inputs, case: Case, name: str = "forward_kl", *, block_tokens: int | None = 4
) -> LossTerms:
    return distillation_loss(
        inputs.hidden_TH,
        Head(inputs.weight_VH, inputs.bias_V, case.scale, case.softcap),
        inputs.target,
        divergence=divergence_named(name, MIX),
        labels_T=inputs.labels_T,
        ce_weight=case.ce_weight,
        divergence_weight=case.divergence_weight,
        z_loss_weight=case.z_loss_weight,
        block_tokens=block_tokens,
    )


def plain(inputs: Inputs, case: Case, name: str) -> Tensor:
    return reference_loss(
        inputs.hidden_TH,
        Head(inputs.weight_VH, inputs.bias_V, case.scale, case.softcap),
        target=inputs.target if name == "forward_kl" else inputs.target.without_draws(),
        labels_T=inputs.labels_T,
        objective=Objective(
            divergence_named(name, MIX), case.divergence_weight, case.ce_weight, case.z_loss_weight
        ),
    )


def with_gradients(total: Tensor, inputs: Inputs) -> list[Tensor]:
    return [total.detach(), *torch.autograd.grad(total, inputs.leaves())]


def worst_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest error of any tensor, relative to the largest entry of that tensor."""
    pairs = zip(found, wanted, strict=True)
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-12)).item()
        for a, b in pairs
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", DENSE)
def test_loss_and_gradients_are_those_of_the_dense_form(name: str, case: Case) -> None:
    inputs = make_inputs(case)
    reference = with_gradients(dense_total(inputs, case, name), inputs)
    exact = with_gradients(fused(inputs, case, name).total, inputs)
    assert worst_error(exact, reference) < 1e-12
    assert worst_error(with_gradients(plain(inputs, case, name), inputs), reference) < 1e-12
    single = inputs.to(torch.float32)
    rounded = single.to(torch.float64)
    reference = with_gradients(dense_total(rounded, case, name), rounded)
    assert worst_error(with_gradients(fused(single, case, name).total, single), reference) < 5e-6


def test_draws_alone_are_the_cross_entropy_to_them() -> None:
    inputs = make_inputs(DRAWS_ALONE)
    reference = with_gradients(dense_total(inputs, DRAWS_ALONE, "forward_kl"), inputs)
    assert worst_error(with_gradients(fused(inputs, DRAWS_ALONE).total, inputs), reference) < 1e-12
    logq_TV = (inputs.hidden_TH @ inputs.weight_VH.T / DRAWS_ALONE.temperature).log_softmax(-1)
    mean_T = -logq_TV.gather(1, inputs.target.tail_ids_TN.long()).mean(1)
    torch.testing.assert_close(fused(inputs, DRAWS_ALONE).divergence, mean_T.sum().detach())


@pytest.mark.parametrize(
    ("k", "num_draws", "temperature"), [(0, 6, 1.0), (3, 4, 1.0), (3, 1, 1.0), (5, 8, 1.7)]
)
def test_over_the_draws_the_mean_gradient_is_that_of_the_dense_forward_kl(
    k: int, num_draws: int, temperature: float
) -> None:
    """20,000 students of one teacher's token, with their logits for hidden states: each has draws
    of its own, in the teacher's real way."""
    num_seeds, vocab_size = 20_000, 24
    teacher_V, student_V = 2 * torch.randn(
        2, vocab_size, generator=torch.Generator().manual_seed(5)
    )
    seeds_T = token_seeds(11, torch.arange(num_seeds), torch.zeros(num_seeds))
    target = compress(
        teacher_V.expand(num_seeds, -1),
        TargetSpec(vocab_size, k, num_draws=num_draws, temperature=temperature),
        seeds_T=seeds_T,
    )
    hidden_TH = student_V.double().expand(num_seeds, -1).clone().requires_grad_()
    head = Head(torch.eye(vocab_size, dtype=torch.float64))
    terms = distillation_loss(
        hidden_TH, head, target, divergence=divergence_named("forward_kl", MIX)
    )
    (gradient_TV,) = torch.autograd.grad(terms.total, hidden_TH)

    p_V, q_V = ((x_V.double() / temperature).softmax(0) for x_V in (teacher_V, student_V))
    error_V = gradient_TV.mean(0) - temperature * (q_V - p_V)
    standard_error_V = gradient_TV.std(0) / num_seeds**0.5
    assert (error_V.abs() <= 4.5 * standard_error_V + 1e-6).all()
    assert (standard_error_V < 2e-2 * (q_V - p_V).abs().max()).all()  # or this test could not tell

    tail_V = p_V.clone()
    tail_V[target.token_ids_TK[0].long()] = 0
    entropy_of_the_tail = float(tail_V.sum() * torch.special.entr(tail_V / tail_V.sum()).sum())
    surprise_TN = -(q_V.log()[target.tail_ids_TN.long()])
    spread = float(tail_V.sum() * surprise_TN.mean(1).std()) / num_seeds**0.5
    assert terms.divergence.item() / num_seeds == pytest.approx(
        float(kl(p_V, q_V)) + entropy_of_the_tail, abs=4.5 * spread + 1e-6
    )


def test_a_tail_without_mass_gives_its_draws_no_weight() -> None:
    case = Case(k=3, num_draws=4)
    inputs = make_inputs(case)
    kept_TK = inputs.target.logprobs_TK - inputs.target.logprobs_TK.logsumexp(1, keepdim=True)
    target = replace(
        inputs.target, logprobs_TK=kept_TK, tail_logmass_T=torch.full((T,), -torch.inf)
    )
    drawn = with_gradients(fused(replace(inputs, target=target), case).total, inputs)
    bare = with_gradients(fused(replace(inputs, target=target.without_draws()), case).total, inputs)
    assert worst_error(drawn, bare) < 1e-13


@pytest.mark.parametrize("block_tokens", [1, 2, 5, T, 1000])
def test_blocks_of_any_size_give_the_same(block_tokens: int) -> None:
    for case, name in ((CASES["everything"], "jsd"), (CASES["draws and everything"], "forward_kl")):
        inputs = make_inputs(case)
        one_block = with_gradients(fused(inputs, case, name, block_tokens=T).total, inputs)
        blocks = with_gradients(fused(inputs, case, name, block_tokens=block_tokens).total, inputs)
        assert worst_error(blocks, one_block) < 1e-13


def test_a_teacher_entry_without_mass_adds_nothing_to_forward_kl() -> None:
    case = CASES["plain"]
    inputs = make_inputs(case)
    logprobs_TK = inputs.target.logprobs_TK.clone()
    logprobs_TK[:, -2:] = -torch.inf
    inputs = replace(inputs, target=replace(inputs.target, logprobs_TK=logprobs_TK))
    reference = with_gradients(dense_total(inputs, case, "forward_kl"), inputs)
    assert worst_error(with_gradients(fused(inputs, case).total, inputs), reference) < 1e-12


def test_the_gradient_follows_what_comes_from_above() -> None:
    case = CASES["everything"]
    inputs = make_inputs(case)
    once = with_gradients(fused(inputs, case).total, inputs)
    scaled = with_gradients(-2.5 * fused(inputs, case).total, inputs)
    torch.testing.assert_close(scaled, [-2.5 * tensor for tensor in once])


def test_a_second_backward_is_refused_as_the_first_one_took_the_gradients_with_it() -> None:
    inputs = make_inputs(CASES["plain"])
    total = fused(inputs, CASES["plain"]).total
    total.backward(retain_graph=True)
    with pytest.raises(
        StudentError, match="handed out by its first backward; compute the loss again"
    ):
        total.backward()


def test_no_tokens_give_zero_loss_and_zero_gradients() -> None:
    case = CASES["everything"]
    inputs = make_inputs(case, num_tokens=0)
    terms = fused(inputs, case)
    assert [term.item() for term in terms] == [0] * 7
    for leaf, gradient in zip(
        inputs.leaves(), torch.autograd.grad(terms.total, inputs.leaves()), strict=True
    ):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


def test_the_z_loss_is_the_square_of_the_log_sum_exp() -> None:
    case = CASES["z-loss, temperature and text"]
    inputs = make_inputs(case)
    terms, without = fused(inputs, case), fused(inputs, replace(case, z_loss_weight=0.0))
    lse_T = (inputs.hidden_TH @ inputs.weight_VH.T).logsumexp(-1).detach()
    torch.testing.assert_close(terms.z_loss, lse_T.square().sum())
    torch.testing.assert_close(terms.total, without.total + case.z_loss_weight * terms.z_loss)
    assert without.z_loss.item() == 0.0


def test_the_block_is_chosen_for_the_device_and_bounded_where_the_vocabulary_is_large() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    assert [block_tokens_for(cpu, vocab) for vocab in (100, 32_000, 262_144, 1 << 24, 1 << 30)] == [
        256,
        256,
        256,
        4,
        1,
    ]
    assert [block_tokens_for(cuda, vocab) for vocab in (32_000, 151_936, 262_144, 1 << 20)] == [
        4096,
        4096,
        4096,
        1024,
    ]
    inputs = make_inputs(CASES["plain"], num_tokens=300)
    with watched() as spy:
        fused(inputs, CASES["plain"], block_tokens=None)
    # two blocks alike, of at most 256
    assert {shape[0] for shape in spy.shapes if shape[1:] == (V,)} - {H} == {150}


def test_rows_that_pad_a_vocabulary_get_no_gradient() -> None:
    inputs = make_inputs(CASES["plain"])
    padded = torch.cat(
        [inputs.weight_VH.detach(), torch.ones(3, H, dtype=torch.float64)]
    ).requires_grad_()
    total = fused(replace(inputs, weight_VH=padded[:V]), CASES["plain"]).total
    (gradient,) = torch.autograd.grad(total, padded)
    assert not gradient[V:].any()
    assert (
        worst_error([gradient[:V]], with_gradients(fused(inputs, CASES["plain"]).total, inputs)[2:])
        < 1e-14
    )


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_tail_below_float32_still_pulls(name: str) -> None:
    """The student gives the tail e^-120 of its mass: 1 minus the kept mass would be 0, and so would
    exp(logit - highest logit)."""
    case = Case(k=2)
    weight_VH = torch.randn(V, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden_TH = torch.zeros(1, H, dtype=torch.float64)
    bias_V = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    bias_V[[3, 8]] = 120.0
    target = CompressedLogits(
        torch.tensor([[3, 8]], dtype=torch.int32),
        torch.tensor([[0.3, 0.2]]).log(),
        torch.tensor([0.5]).log(),
        torch.zeros(1, 0),
        V,
    )
    exact = Inputs(hidden_TH, weight_VH, bias_V, target, torch.tensor([3])).to(torch.float64)
    single = exact.to(torch.float32)
    rounded = single.to(torch.float64)
    reference = with_gradients(dense_total(rounded, case, name), rounded)
    assert worst_error(with_gradients(fused(single, case, name).total, single), reference) < 1e-4


@pytest.mark.parametrize("case", [CASES["bias"], CASES["everything"]], ids=["bias", "everything"])
def test_bfloat16_weights_lose_no_more_than_autograd_does(case: Case) -> None:
    half = make_inputs(case, num_tokens=64).to(torch.bfloat16)
    exact = half.to(torch.float64)
    reference = with_gradients(dense_total(exact, case, "jsd"), exact)
    found = with_gradients(fused(half, case, "jsd").total, half)
    assert [tensor.dtype for tensor in found] == [torch.float32] + [torch.bfloat16] * 3
    for ours, autograd, wanted in zip(
        found, with_gradients(dense_total(half, case, "jsd"), half), reference, strict=True
    ):
        assert worst_error([ours], [wanted]) <= worst_error([autograd], [wanted]) + 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_gradient_is_summed_in_float32_whatever_the_weights_dtype(
    dtype: torch.dtype,
) -> None:
    """64 blocks that nearly cancel out: a product that was rounded to its operands' dtype would
    leave its rounding behind."""
    random = torch.Generator().manual_seed(0)
    gradients_NCV = (
        torch.randn(64, 8, V, generator=random)
        * torch.tensor([1.0, -1.0]).repeat(32)[:, None, None]
        + 1.0
    ).to(dtype)
    hidden_NCH = torch.ones(64, 8, H, dtype=dtype)
    wanted_VH = (gradients_NCV.double().transpose(1, 2) @ hidden_NCH.double()).sum(0)
    sum_VH = torch.full((V, H), torch.nan)
    for number, (gradient_CV, hidden_CH) in enumerate(zip(gradients_NCV, hidden_NCH, strict=True)):
        add_product_(sum_VH, gradient_CV, hidden_CH, first=number == 0)
    assert worst_error([sum_VH], [wanted_VH]) < 1e-6


def test_the_weights_gradient_in_bfloat16_is_as_exact_as_autograd_of_all_tokens_at_once() -> None:
    case = CASES["text"]
    half = make_inputs(case, num_tokens=512).to(torch.bfloat16)
    exact = half.to(torch.float64)
    wanted_VH = with_gradients(dense_total(exact, case, "forward_kl"), exact)[2]
    ours_VH, autograd_VH = (
        with_gradients(total, half)[2].double()
        for total in (
            fused(half, case, block_tokens=4).total,
            dense_total(half, case, "forward_kl"),
        )
    )
    assert (ours_VH - wanted_VH).norm() <= (
        autograd_VH - wanted_VH
    ).norm() + 1e-4 * wanted_VH.norm()


class Spy(TorchDispatchMode):
    """Notes the shape of every tensor that an operation returns, and the name of every
    operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[tuple[int, ...]] = set()
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.operations.append(str(operation))
        self.shapes.update(
            tuple(each.shape)
            for each in (result if isinstance(result, tuple) else (result,))
            if isinstance(each, Tensor)
        )
        return result


@contextmanager
def watched() -> Iterator[Spy]:
    with Spy() as spy:
        yield spy


def test_the_logits_of_all_tokens_never_exist() -> None:
    case = CASES["everything"]
    inputs = make_inputs(case)
    with watched() as spy:
        fused(inputs, case, block_tokens=3).total.backward()
    widths = {shape[0] for shape in spy.shapes if len(shape) == 2 and shape[1] == V}
    assert widths == {3, T % 3, H}  # blocks, the last block, and the transposed weight


def test_a_frozen_weight_costs_no_gradient() -> None:
    inputs = make_inputs(CASES["bias"])
    wanted = with_gradients(fused(inputs, CASES["bias"]).total, inputs)
    assert inputs.bias_V is not None
    frozen = replace(inputs, weight_VH=inputs.weight_VH.detach(), bias_V=inputs.bias_V.detach())
    with watched() as spy:
        total = fused(frozen, CASES["bias"]).total
        (gradient,) = torch.autograd.grad(total, frozen.hidden_TH)
    torch.testing.assert_close(gradient, wanted[1], rtol=0, atol=0)
    assert (V, H) not in spy.shapes


def test_without_grad_only_the_logits_are_multiplied() -> None:
    inputs = make_inputs(CASES["text"])
    with torch.no_grad(), watched() as spy:
        terms = fused(inputs, CASES["text"], block_tokens=T)
    assert not terms.total.requires_grad
    assert sum("mm" in operation for operation in spy.operations) == 1
    assert terms.total == fused(inputs, CASES["text"], block_tokens=T).total.detach()
    with torch.inference_mode():
        assert fused(inputs, CASES["text"], block_tokens=T).total == terms.total


def test_large_logits_at_a_low_temperature_cost_no_digits() -> None:
    """Divided by the temperature first, these two equal students of one teacher lost 0.002 nats to
    float32."""
    student_VH = torch.tensor([0.0, 0.0, 0.0, 1e4, 1e4, 0.0])[:, None]
    target = make_target(
        torch.tensor([[-math.inf, 0.0, -math.inf, 1e4, 1e4, 0.0]]), k=1, temperature=0.1
    )
    terms = distillation_loss(
        torch.ones(1, 1), Head(student_VH), target, divergence=divergence_named("reverse_kl", 0.5)
    )
    assert abs(terms.divergence) < 1e-6


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    name=st.sampled_from(sorted(DENSE)),
    k=st.integers(0, 6),
    temperature=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_nothing_becomes_nan_or_infinite(
    data: st.DataObject, name: str, k: int, temperature: float
) -> None:
    extreme = st.one_of(st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, -1e4, 1e4]))
    student_VH = torch.tensor(data.draw(st.lists(extreme, min_size=6, max_size=6)))[
        :, None
    ].requires_grad_()
    teacher_TV = torch.tensor(
        [
            [
                *data.draw(
                    st.lists(st.one_of(extreme, st.just(-torch.inf)), min_size=5, max_size=5)
                ),
                0.0,
            ]
        ]
    )
    num_draws = (
        data.draw(st.integers(0, 3)) if 0 < k < 6 or (k == 0 and name == "forward_kl") else 0
    )
    target = make_target(teacher_TV, k=k, num_draws=num_draws, temperature=temperature)
    hidden_TH = torch.ones(1, 1, requires_grad=True)
    terms = distillation_loss(
        hidden_TH,
        Head(student_VH),
        target,
        divergence=divergence_named(name, data.draw(st.sampled_from([1e-3, 0.5, 0.999]))),
        labels_T=torch.tensor([2]),
        ce_weight=1.0,
    )
    tensors = [*terms, *torch.autograd.grad(terms.total, [hidden_TH, student_VH])]
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert terms.divergence >= -1e-3
