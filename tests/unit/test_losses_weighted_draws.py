"""Weighted draws: every divergence has the value and the gradient of the whole vocabulary in
expectation, and no noise where the student has the teacher's probabilities."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from stillhouse.logits import CompressedLogits, Head, token_seeds
from stillhouse.logits.topk.draws import draw
from stillhouse.logits.weights import draw_log_weights
from stillhouse.losses.distillation import LossTerms, distillation_loss
from stillhouse.losses.divergences import Divergence, divergence_named, forward_kl
from stillhouse.losses.reference import reference_loss
from stillhouse.losses.sparse_gradient import Objective
from stillhouse.losses.weighted_draws import tail_rest

NAMES = ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]
MIX = 0.3
T, H, V, K, N = 12, 7, 37, 4, 6

# g of r = q / p, each with another linear part than the one under test
GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "forward_kl": lambda r: -r.log(),
    "reverse_kl": lambda r: r * r.log(),
    "jsd": lambda r: (
        -MIX * (MIX + (1 - MIX) * r).log() + (1 - MIX) * r * (r / (MIX + (1 - MIX) * r)).log()
    ),
    "skew_forward_kl": lambda r: -(MIX + (1 - MIX) * r).log(),
    "skew_reverse_kl": lambda r: r * (r / (MIX * r + 1 - MIX)).log(),
    "tvd": lambda r: 0.5 * (r - 1).abs(),
}


def by_form_a(
    logp_TV: Tensor, *, k: int, num_draws: int, temperature: float = 1.0
) -> CompressedLogits:
    """The k likeliest and draws from half the tail, half uniform; a seed for each token."""
    num_tokens, vocab_size = logp_TV.shape
    kept = logp_TV.topk(k, dim=1)
    tail_TV = logp_TV.scatter(1, kept.indices, -torch.inf)
    logmass_T = tail_TV.logsumexp(dim=1)
    uniform_TV = torch.full_like(tail_TV, -math.log(vocab_size - k))
    mixed_TV = (tail_TV - logmass_T[:, None]).logaddexp(
        uniform_TV.scatter(1, kept.indices, -torch.inf)
    )
    seeds_T = token_seeds(3, torch.arange(num_tokens), torch.zeros(num_tokens))
    draws_TN = draw(mixed_TV, seeds_T, num_draws=num_draws)
    return CompressedLogits(
        kept.indices.int(),
        kept.values,
        logmass_T,
        draws_TN,
        vocab_size=vocab_size,
        temperature=temperature,
        draw_logprobs_TN=logp_TV.gather(1, draws_TN.long()),
    )


@dataclass(frozen=True)
class Case:
    temperature: float = 1.0
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    ce_weight: float = 0.0
    z_loss_weight: float = 0.0
    k: int = K


CASES = {
    "plain": Case(),
    "no entries": Case(k=0),
    "temperature, text and z-loss": Case(1.7, ce_weight=0.4, z_loss_weight=0.1),
    "everything": Case(0.7, bias=True, scale=1.3, softcap=2.0, ce_weight=0.4, z_loss_weight=0.1),
}


def dense_total(
    name: str, case: Case, head: Head, hidden_TH: Tensor, target: CompressedLogits, labels_T: Tensor
) -> Tensor:
    """The objective by its definition, in ratios."""
    logits_TV = head.logits(hidden_TH)
    q_TV = (logits_TV / case.temperature).softmax(dim=1)
    ids_TK, draws_TN = target.token_ids_TK.long(), target.tail_ids_TN.long()
    q_tail_T1 = q_TV.scatter(1, ids_TK, 0.0).sum(dim=1, keepdim=True)
    q_TK1 = torch.cat([q_TV.gather(1, ids_TK), q_tail_T1], dim=1)
    p_TK1 = torch.cat([target.logprobs_TK, target.tail_logmass_T[:, None]], dim=1).exp()
    assert target.draw_logprobs_TN is not None
    g, r0_T1 = GENERATORS[name], q_tail_T1 / p_TK1[:, -1:]
    (slope_T1,) = torch.autograd.grad(g(r0_T1).sum(), r0_T1, create_graph=True)
    r_TN = q_TV.gather(1, draws_TN) / target.draw_logprobs_TN.exp()
    rest_TN = g(r_TN) - g(r0_T1) - slope_T1 * (r_TN - r0_T1)
    loss_T = (p_TK1 * g(q_TK1 / p_TK1)).sum(dim=1)
    loss_T = loss_T + (draw_log_weights(target).exp() * rest_TN).sum(dim=1)
    total = 0.8 * case.temperature**2 * loss_T.sum()
    total = total + case.ce_weight * torch.nn.functional.cross_entropy(
        logits_TV, labels_T, reduction="sum"
    )
    return total + case.z_loss_weight * logits_TV.logsumexp(dim=1).square().sum()


def assert_alike(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize(
    ("name", "case"),
    # without entries the tail is all mass and its ratio 1, where TVD has no slope of its own
    [(n, c) for n in NAMES for c in CASES if (n, c) != ("tvd", "no entries")],
)
def test_loss_and_gradients_are_those_of_the_definition(name: str, case: str) -> None:
    settings = CASES[case]
    random = torch.Generator().manual_seed(0)
    hidden_TH, weight_VH, teacher_TV = (
        torch.randn(shape, dtype=torch.float64, generator=random)
        for shape in ((T, H), (V, H), (T, V))
    )
    logp_TV = (2 * teacher_TV / settings.temperature).log_softmax(dim=1)
    target = by_form_a(logp_TV, k=settings.k, num_draws=N, temperature=settings.temperature)
    assert (target.tail_ids_TN.diff(dim=1) == 0).any(), "no draw is there twice"
    labels_T = torch.randint(V, (T,), generator=random)
    labels_T[: T // 2] = target.tail_ids_TN[: T // 2, 1]
    bias_V = weight_VH[:, 0].clone() if settings.bias else None
    leaves = [x.requires_grad_() for x in (hidden_TH, weight_VH, bias_V) if x is not None]
    head = Head(weight_VH, bias_V, settings.scale, settings.softcap)
    divergence = divergence_named(name, MIX)

    wanted = dense_total(name, settings, head, hidden_TH, target, labels_T)
    plain = reference_loss(
        hidden_TH,
        head,
        target=target,
        labels_T=labels_T,
        objective=Objective(divergence, 0.8, settings.ce_weight, settings.z_loss_weight),
    )
    fused = distillation_loss(
        hidden_TH,
        head,
        target,
        divergence=divergence,
        labels_T=labels_T,
        divergence_weight=0.8,
        ce_weight=settings.ce_weight,
        z_loss_weight=settings.z_loss_weight,
        block_tokens=5,
    ).total
    found, of_plain, of_wanted = (
        [total.detach(), *torch.autograd.grad(total, leaves)] for total in (fused, plain, wanted)
    )
    assert_alike(of_plain, of_wanted, 1e-11)
    assert_alike(found, of_wanted, 1e-11)


def loss_of(logits_TV: Tensor, target: CompressedLogits, divergence: Divergence) -> LossTerms:
    """Of students whose logits are their hidden states."""
    head = Head(torch.eye(target.vocab_size, dtype=logits_TV.dtype))
    return distillation_loss(logits_TV, head, target, divergence=divergence, block_tokens=50_000)


@pytest.fixture(scope="module")
def records() -> tuple[Tensor, Tensor, CompressedLogits]:
    """100,000 records of one teacher, a quarter for each of four students: near, far, with next to
    no mass in the tail, and with none there. The teacher's log-probabilities, the students'
    logits."""
    random = torch.Generator().manual_seed(5)
    teacher_V, far_V = 2 * torch.randn(2, 20, dtype=torch.float64, generator=random)
    logp_V = teacher_V.log_softmax(dim=0)
    is_kept_V = torch.zeros(20, dtype=torch.bool).scatter(0, logp_V.topk(3).indices, True)
    near_V = logp_V + 0.3 * far_V
    students_SV = torch.stack(
        [near_V, far_V, far_V + 30.0 * is_kept_V, far_V.masked_fill(is_kept_V, 2e3)]
    )
    target = by_form_a(logp_V.expand(100_000, -1), k=3, num_draws=5)
    return logp_V, students_SV, target


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_records_is_the_divergence_of_the_whole_vocabulary(
    name: str, records: tuple[Tensor, Tensor, CompressedLogits]
) -> None:
    logp_V, students_SV, target = records
    divergence, num_each = divergence_named(name, MIX), 100_000 // len(students_SV)
    logits_TV = students_SV.repeat_interleave(num_each, dim=0).requires_grad_()
    values_T = values_of(logits_TV.detach(), target, divergence)
    fused = loss_of(logits_TV, target, divergence).total
    (gradient_TV,) = torch.autograd.grad(fused, logits_TV)
    torch.testing.assert_close(fused.detach(), values_T.sum(), rtol=1e-9, atol=1e-6)

    students_SV = students_SV.clone().requires_grad_()
    wanted_S = divergence.of(logp_V.expand_as(students_SV), students_SV.log_softmax(dim=1))
    (wanted_SV,) = torch.autograd.grad(wanted_S.sum(), students_SV)
    found_SE = torch.cat([values_T[:, None], gradient_TV], dim=1).view(
        len(students_SV), num_each, -1
    )
    wanted_SX = torch.cat([wanted_S.detach()[:, None], wanted_SV], dim=1)
    error_SX, spread_SX = found_SE.mean(dim=1) - wanted_SX, found_SE.std(dim=1) / num_each**0.5
    for part in (slice(0, 1), slice(1, None)):  # the value, then the gradient as one vector
        error_S, spread_S = (x[:, part].norm(dim=1) for x in (error_SX, spread_SX))
        assert (error_S <= 3.0 * spread_S + 1e-7 * (1 + wanted_SX[:, part].norm(dim=1))).all()
    assert (spread_SX[:2, 0] > 1e-5).all()  # or there was no noise to average
    assert (spread_SX[0] < 0.1).all()  # or this test could not tell


def values_of(logits_TV: Tensor, target: CompressedLogits, divergence: Divergence) -> Tensor:
    """[T]: the loss of each record."""
    logq_TV, ids_TK = logits_TV.log_softmax(dim=1), target.token_ids_TK.long()
    tail_T1 = logq_TV.scatter(1, ids_TK, -torch.inf).logsumexp(dim=1, keepdim=True)
    logq_TK1 = torch.cat([logq_TV.gather(1, ids_TK), tail_T1], dim=1)
    logp_TK1 = torch.cat([target.logprobs_TK, target.tail_logmass_T[:, None]], dim=1)
    within_TN = logq_TV.gather(1, target.tail_ids_TN.long()) - tail_T1
    assert divergence.generator is not None
    rest_T = tail_rest(target, within_TN, tail_T1, generator=divergence.generator)
    return divergence.of(logp_TK1, logq_TK1) + rest_T


@pytest.mark.parametrize("name", NAMES)
def test_a_student_with_the_stored_probabilities_has_no_loss_and_no_gradient(name: str) -> None:
    """Whatever the probabilities of all other ids are."""
    random = torch.Generator().manual_seed(2)
    logp_TV = (2 * torch.randn(T, V, dtype=torch.float64, generator=random)).log_softmax(dim=1)
    exact = by_form_a(logp_TV, k=K, num_draws=N)
    assert exact.draw_logprobs_TN is not None
    # as decoded: rounded, and the tail is what the entries leave
    kept_TK, drawn_TN = ((8 * x).floor() / 8 for x in (exact.logprobs_TK, exact.draw_logprobs_TN))
    target = replace(
        exact,
        logprobs_TK=kept_TK,
        draw_logprobs_TN=drawn_TN,
        tail_logmass_T=(-kept_TK.exp().sum(dim=1)).log1p(),
    )
    named_TX = torch.cat([target.token_ids_TK, target.tail_ids_TN], dim=1).long()
    q_TV = torch.rand(T, V, dtype=torch.float64, generator=random).scatter(1, named_TX, 0.0)
    values_TX = torch.cat([kept_TK, drawn_TN], dim=1).exp()
    named_TV = torch.zeros_like(q_TV).scatter(1, named_TX, values_TX)
    rest_T1 = 1.0 - named_TV.sum(dim=1, keepdim=True)
    q_TV = named_TV + q_TV * rest_T1 / q_TV.sum(dim=1, keepdim=True)
    logits_TV = q_TV.log().requires_grad_()

    terms = loss_of(logits_TV, target, divergence_named(name, MIX))
    (gradient_TV,) = torch.autograd.grad(terms.total, logits_TV)
    assert abs(terms.divergence.item()) < 1e-13
    if name != "tvd":  # its gradient is a sign, even of a rounding error
        assert gradient_TV.abs().max() < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_generators_are_flat_and_0_where_the_ratio_is_1_and_nowhere_below(name: str) -> None:
    generator = divergence_named(name, MIX).generator
    assert generator is not None
    logratio = torch.tensor([-1e4, -30.0, -1e-3, 0.0, 1e-3, 2.0, 60.0]).requires_grad_()
    values = generator(logratio)
    (slope,) = torch.autograd.grad(values.sum(), logratio)
    assert values[3] == 0.0
    assert slope[3] == 0.0
    assert (values >= 0.0).all()
    assert values.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_no_mass_anywhere_becomes_nan_or_infinite(name: str) -> None:
    """In float32: draws, tails and students without mass, in all combinations."""
    none, least = -torch.inf, -103.0
    tails = torch.tensor([-0.5, -70.0, least, none])
    draws = torch.tensor([-3.0, -65.0, least, none])
    students = torch.tensor([0.0, -90.0, -1e4, 1e4])
    grid = torch.meshgrid(tails, draws, students, indexing="ij")
    tail_T, drawn_T, student_T = (x.flatten() for x in grid)
    logits_TV = torch.stack([torch.zeros_like(student_T), student_T, student_T - 1], dim=1)
    target = CompressedLogits(
        torch.zeros(len(tail_T), 1, dtype=torch.int32),
        (-tail_T.exp()).log1p()[:, None],
        tail_T,
        torch.tensor([[1, 2]], dtype=torch.int32).expand(len(tail_T), -1),
        vocab_size=3,
        draw_logprobs_TN=torch.stack([drawn_T, tail_T], dim=1),
    )
    logits_TV.requires_grad_()
    terms = loss_of(logits_TV, target, divergence_named(name, MIX))
    (gradient_TV,) = torch.autograd.grad(terms.total, logits_TV)
    assert all(term.isfinite() for term in terms)
    assert gradient_TV.isfinite().all()
    with torch.inference_mode():
        again = loss_of(logits_TV.detach(), target, divergence_named(name, MIX))
    assert again.total == terms.total.detach()


def test_the_extremes_are_the_largest_ratio_and_the_largest_weighted_ratio() -> None:
    random = torch.Generator().manual_seed(4)
    logp_TV, logits_TV = torch.randn(2, T, V, dtype=torch.float64, generator=random).log_softmax(-1)
    target = by_form_a(logp_TV, k=K, num_draws=N)
    head = Head(torch.eye(V, dtype=torch.float64))
    terms = distillation_loss(logits_TV, head, target, block_tokens=5)
    assert target.draw_logprobs_TN is not None
    logratio_TN = logits_TV.gather(1, target.tail_ids_TN.long()) - target.draw_logprobs_TN
    torch.testing.assert_close(terms.max_logratio, logratio_TN.max())
    mass_TN = (draw_log_weights(target) + logratio_TN).exp()
    torch.testing.assert_close(terms.max_draw_mass, mass_TN.max())
    blind = distillation_loss(logits_TV, head, replace(target, draw_logprobs_TN=None))
    assert blind.max_logratio == blind.max_draw_mass == 0.0


def test_without_a_generator_only_the_share_of_forward_kl_uses_them() -> None:
    random = torch.Generator().manual_seed(4)
    logp_TV, logits_TV = torch.randn(2, T, V, dtype=torch.float64, generator=random).log_softmax(-1)
    target = by_form_a(logp_TV, k=K, num_draws=N)
    whole = loss_of(logits_TV, target, forward_kl).total
    half = Divergence(lambda p, q: 0.5 * forward_kl.of(p, q), forward_kl_share=0.5)
    torch.testing.assert_close(loss_of(logits_TV, target, half).total, 0.5 * whole)
    bucket = Divergence(forward_kl.of)
    wanted = loss_of(logits_TV, target.without_draws(), forward_kl).total
    torch.testing.assert_close(loss_of(logits_TV, target, bucket).total, wanted)


def test_the_entropy_of_the_tail_takes_the_constant_off_forward_kl_with_blind_draws() -> None:
    """A tail of equal probabilities, each id of it drawn once: the draws have no noise."""
    logp_TV = torch.zeros(2, 7, dtype=torch.float64)
    logp_TV[:, 0] = torch.tensor([2.0, 3.0])
    logp_TV = logp_TV.log_softmax(dim=1)
    kept_T1, tail_T = logp_TV[:, :1], logp_TV[:, 1:].logsumexp(dim=1)
    bare = CompressedLogits(
        torch.zeros(2, 1, dtype=torch.int32),
        kept_T1,
        tail_T,
        torch.arange(1, 7, dtype=torch.int32).expand(2, -1),
        vocab_size=7,
    )
    target = replace(bare, tail_entropy_T=torch.full((2,), math.log(6), dtype=torch.float64))
    assert abs(loss_of(logp_TV, target, forward_kl).total) < 1e-14

    logits_TV = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits_TV.requires_grad_()
    found, constant = (loss_of(logits_TV, each, forward_kl).total for each in (target, bare))
    torch.testing.assert_close(found, forward_kl.of(logp_TV, logits_TV.log_softmax(dim=1)).sum())
    of_found, of_bare = (torch.autograd.grad(total, logits_TV)[0] for total in (found, constant))
    assert torch.equal(of_found, of_bare)
    objective = Objective(forward_kl, 1.0, 0.0, 0.0)
    plain = reference_loss(
        logits_TV, Head(torch.eye(7).double()), target=target, labels_T=None, objective=objective
    )
    torch.testing.assert_close(plain, found)
