"""The divergences against their textbook definitions, and the sums that training is told."""

import math
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.errors import ConfigError, ModelError
from stillhouse.logits import CompressedLogits, Head, TargetSpec, compress, token_seeds
from stillhouse.losses.distillation import LossTerms, distillation_loss
from stillhouse.losses.divergences import (
    Divergence,
    divergence_named,
    forward_kl,
    is_unbiased_with_draws,
    jsd,
    reverse_kl,
    tvd,
)

NAMES = ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]
MIX = 0.3


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


DEFINITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: (
        MIX * kl(p, MIX * p + (1 - MIX) * q) + (1 - MIX) * kl(q, MIX * p + (1 - MIX) * q)
    ),
    "skew_forward_kl": lambda p, q: kl(p, MIX * p + (1 - MIX) * q),
    "skew_reverse_kl": lambda p, q: kl(q, (1 - MIX) * p + MIX * q),
    "tvd": lambda p, q: (p - q).abs().sum(-1) / 2,
}


def distributions(*, seed: int = 0, size: int = 9) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(
        2, 20, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    p, q = logits.softmax(-1)
    return p, q


def loss(
    hidden_TH: Tensor, head: Head, target: CompressedLogits | None, **options: Any
) -> LossTerms:
    return distillation_loss(hidden_TH, head, target, **({"divergence": forward_kl} | options))


@pytest.fixture
def head() -> Head:
    return Head(torch.randn(30, 6, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(11, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def target() -> CompressedLogits:
    return compress(
        2 * torch.randn(11, 30, generator=torch.Generator().manual_seed(3)), TargetSpec(30, 5)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_is_what_its_paper_says(name: str) -> None:
    p, q = distributions()
    torch.testing.assert_close(
        divergence_named(name, MIX).of(p.log(), q.log()),
        DEFINITIONS[name](p, q),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_is_zero_only_between_equals(name: str) -> None:
    p, q = distributions()
    divergence = divergence_named(name, MIX).of
    assert (divergence(p.log(), q.log()) > 1e-4).all()
    assert divergence(p.log(), p.log()).abs().max() < 1e-15


@pytest.mark.parametrize("name", NAMES)
def test_merging_entries_into_a_tail_never_raises_a_divergence(name: str) -> None:
    p, q = distributions(size=40)
    merged_p, merged_q = (torch.cat([x[:, :6], x[:, 6:].sum(-1, keepdim=True)], -1) for x in (p, q))
    divergence = divergence_named(name, MIX).of
    assert (
        divergence(merged_p.log(), merged_q.log()) <= divergence(p.log(), q.log()) + 1e-14
    ).all()


def test_the_jensen_shannon_divergence_turns_into_both_kls_at_its_ends() -> None:
    p, q = distributions()
    torch.testing.assert_close(
        jsd(1e-7).of(p.log(), q.log()) / 1e-7, forward_kl.of(p.log(), q.log()), rtol=1e-2, atol=0
    )
    torch.testing.assert_close(
        jsd(1 - 1e-7).of(p.log(), q.log()) / 1e-7,
        reverse_kl.of(p.log(), q.log()),
        rtol=1e-2,
        atol=0,
    )


@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("mix", [0.0, 1.0, -0.1, math.nan])
def test_a_mix_at_an_end_is_refused(name: str, mix: float) -> None:
    with pytest.raises(ConfigError, match=f"mix is {mix}.*{name}"):
        divergence_named(name, mix)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "tvd"])
def test_mix_is_unused_by_the_plain_divergences(name: str) -> None:
    p, q = distributions()
    assert torch.equal(
        divergence_named(name, 0.0).of(p.log(), q.log()),
        divergence_named(name, 1.0).of(p.log(), q.log()),
    )


def test_an_unknown_divergence_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"no divergence 'kld'; known: forward_kl, .*tvd"):
        divergence_named("kld", 0.5)


def test_terms_are_sums_over_tokens(hidden: Tensor, head: Head, target: CompressedLogits) -> None:
    whole = loss(hidden, head, target)
    parts = [
        loss(hidden[t : t + 1], head, target.map(itemgetter(slice(t, t + 1)))) for t in range(11)
    ]
    torch.testing.assert_close(
        whole.divergence, torch.stack([part.divergence for part in parts]).sum()
    )
    assert whole.num_tokens.item() == 11
    assert sum(part.num_tokens.item() for part in parts) == 11
    assert all(term.ndim == 0 for term in whole)


def test_the_total_weighs_the_divergence_by_the_square_of_its_temperature(
    hidden: Tensor, head: Head
) -> None:
    target = compress(
        torch.randn(11, 30, generator=torch.Generator().manual_seed(3)),
        TargetSpec(30, 5, temperature=3.0),
    )
    labels_T = torch.arange(11)
    terms = loss(hidden, head, target, labels_T=labels_T, ce_weight=0.25, divergence_weight=0.5)
    torch.testing.assert_close(
        terms.total, 0.5 * 9.0 * terms.divergence + 0.25 * terms.cross_entropy
    )
    reference = torch.nn.functional.cross_entropy(head.logits(hidden), labels_T, reduction="sum")
    torch.testing.assert_close(terms.cross_entropy, reference)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(hidden: Tensor, head: Head) -> None:
    hidden.requires_grad_()
    target = compress(head.logits(hidden.detach()), TargetSpec(30, 5))
    for name in NAMES:
        terms = loss(hidden, head, target, divergence=divergence_named(name, MIX))
        (gradient,) = torch.autograd.grad(terms.total, hidden)
        assert abs(terms.divergence.item()) < 1e-4
        if name != "tvd":  # its gradient is a sign, even of a rounding error
            assert gradient.abs().max() < 1e-4


def test_the_text_alone_needs_no_target(hidden: Tensor, head: Head) -> None:
    labels_T = torch.arange(11)
    terms = loss(hidden, head, None, labels_T=labels_T, ce_weight=1.0, divergence_weight=0.0)
    reference = torch.nn.functional.cross_entropy(head.logits(hidden), labels_T, reduction="sum")
    torch.testing.assert_close(terms.total, reference)
    assert terms.divergence.item() == 0.0


def test_an_unused_target_is_not_touched(
    hidden: Tensor, head: Head, target: CompressedLogits
) -> None:
    broken = target.map(lambda tensor: tensor[:0])
    terms = loss(
        hidden, head, broken, labels_T=torch.arange(11), ce_weight=1.0, divergence_weight=0.0
    )
    assert math.isfinite(terms.total.item())


def test_without_weight_the_text_is_not_measured(
    hidden: Tensor, head: Head, target: CompressedLogits
) -> None:
    assert loss(hidden, head, target, labels_T=torch.arange(11)).cross_entropy.item() == 0.0


def test_only_the_total_carries_a_gradient(
    hidden: Tensor, head: Head, target: CompressedLogits
) -> None:
    terms = loss(hidden.requires_grad_(), head, target, labels_T=torch.arange(11), ce_weight=1.0)
    assert [term.requires_grad for term in terms] == [True, *[False] * 6]


def test_missing_inputs_are_refused(hidden: Tensor, head: Head, target: CompressedLogits) -> None:
    with pytest.raises(ConfigError, match=r"ce_weight is 0\.5, but there are no labels"):
        loss(hidden, head, target, ce_weight=0.5)
    with pytest.raises(ConfigError, match=r"divergence_weight is 1\.0, but there is no target"):
        loss(hidden, head, None)


def test_a_target_of_another_vocabulary_is_refused(
    hidden: Tensor, target: CompressedLogits
) -> None:
    with pytest.raises(ModelError, match="over 30 tokens, the student's head over 32"):
        loss(hidden, Head(torch.zeros(32, 6)), target)


def drawn_target(k: int) -> CompressedLogits:
    logits_TV = 2 * torch.randn(11, 30, generator=torch.Generator().manual_seed(3))
    return compress(
        logits_TV,
        TargetSpec(logits_TV.shape[1], k, num_draws=4),
        seeds_T=token_seeds(1, torch.arange(11), torch.zeros(11)),
    )


@pytest.mark.parametrize("name", NAMES)
def test_draws_serve_forward_kl_alone(
    name: str, hidden: Tensor, head: Head, target: CompressedLogits
) -> None:
    bare = loss(hidden, head, target, divergence=divergence_named(name, MIX))
    drawn = loss(hidden, head, drawn_target(5), divergence=divergence_named(name, MIX))
    if name == "forward_kl":
        assert drawn.divergence > bare.divergence  # by the cross-entropy within the tail
    else:
        assert torch.equal(drawn.total, bare.total)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "forward_kl"])
def test_draws_alone_are_refused_by_a_divergence_that_cannot_use_them(
    name: str, hidden: Tensor, head: Head
) -> None:
    with pytest.raises(
        ConfigError, match="4 draws and no exact entries, which only forward_kl can learn from"
    ):
        loss(hidden, head, drawn_target(0), divergence=divergence_named(name, MIX))
    labels_T = torch.arange(11)
    text = loss(
        hidden,
        head,
        drawn_target(0),
        divergence=divergence_named(name, MIX),
        labels_T=labels_T,
        ce_weight=1,
        divergence_weight=0,
    )
    assert text.divergence.item() == 0.0


def jeffreys(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
    """Both KLs together."""
    return ((logp_TK1.exp() - logq_TK1.exp()) * (logp_TK1 - logq_TK1)).sum(-1)


def test_a_divergence_is_any_function_on_buckets(
    hidden: Tensor, head: Head, target: CompressedLogits
) -> None:
    both = [
        loss(hidden, head, target, divergence=divergence).total
        for divergence in (forward_kl, reverse_kl)
    ]
    torch.testing.assert_close(
        loss(hidden, head, target, divergence=Divergence(jeffreys)).total, sum(both)
    )


def test_a_bare_function_is_refused_and_told_how_to_say_its_share_of_forward_kl(
    hidden: Tensor, head: Head
) -> None:
    message = (
        r"divergence is jeffreys, a bare function.*Divergence\(jeffreys, forward_kl_share=1\.0\)"
    )
    with pytest.raises(ConfigError, match=message):
        loss(hidden, head, drawn_target(5), divergence=jeffreys)


WRAPPED = {
    "a lambda": lambda logp_TK1, logq_TK1: forward_kl.of(logp_TK1, logq_TK1),
    "a partial": partial(
        lambda scale, logp_TK1, logq_TK1: scale * forward_kl.of(logp_TK1, logq_TK1), 1.0
    ),
}


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED.keys())
def test_forward_kl_in_a_wrapping_learns_from_its_draws_alike(
    wrapped: Callable[[Tensor, Tensor], Tensor], k: int, hidden: Tensor, head: Head
) -> None:
    hidden.requires_grad_()
    totals = [
        loss(hidden, head, drawn_target(k), divergence=each).total
        for each in (forward_kl, Divergence(wrapped, 1.0))
    ]
    assert torch.equal(*totals)
    assert torch.equal(*(torch.autograd.grad(total, hidden)[0] for total in totals))


@pytest.mark.parametrize("k", [0, 5])
def test_half_of_forward_kl_is_half_of_its_loss_with_draws(
    k: int, hidden: Tensor, head: Head
) -> None:
    half, whole = (
        loss(hidden, head, drawn_target(k), divergence=each).total
        for each in (Divergence(half_forward_kl, 0.5), forward_kl)
    )
    torch.testing.assert_close(half, 0.5 * whole)


@pytest.mark.parametrize(
    "divergence",
    [Divergence(jeffreys, forward_kl_share=1.0), Divergence(forward_kl.of, forward_kl_share=0.5)],
)
def test_draws_alone_are_refused_where_a_part_of_the_divergence_would_learn_nothing(
    divergence: Divergence, hidden: Tensor, head: Head
) -> None:
    with pytest.raises(
        ConfigError, match="4 draws and no exact entries, which only forward_kl can learn from"
    ):
        loss(hidden, head, drawn_target(0), divergence=divergence)


def half_forward_kl(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
    return 0.5 * forward_kl.of(logp_TK1, logq_TK1)


def forward_kl_and_tvd(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
    return forward_kl.of(logp_TK1, logq_TK1) + tvd.of(logp_TK1, logq_TK1)


def expected_gradient(
    divergence: Divergence, teacher_V: Tensor, student_V: Tensor, *, k: int, temperature: float
) -> Tensor:
    """[V], in the student's logits: the exact expectation over one draw, from a token for each id
    of the tail."""
    vocab_size = len(teacher_V)
    logp_V = (teacher_V / temperature).log_softmax(0)
    kept_K, tail_N = logp_V.argsort(descending=True).split([k, vocab_size - k])
    num_tokens, tail_mass = len(tail_N), logp_V[tail_N].logsumexp(0)
    target = CompressedLogits(
        kept_K.int().expand(num_tokens, -1),
        logp_V[kept_K].expand(num_tokens, -1),
        tail_mass.expand(num_tokens),
        tail_N.int()[:, None],
        vocab_size=vocab_size,
        temperature=temperature,
    )
    hidden_TV = student_V.expand(num_tokens, -1).clone().requires_grad_()
    total = loss(
        hidden_TV, Head(torch.eye(vocab_size, dtype=torch.float64)), target, divergence=divergence
    ).total
    (gradient_TV,) = torch.autograd.grad(total, hidden_TV)
    return (logp_V[tail_N] - tail_mass).exp() @ gradient_TV


@pytest.mark.parametrize(
    ("divergence", "dense_share", "bucketed_share"),
    [
        (Divergence(half_forward_kl, forward_kl_share=0.5), 0.5, 0.0),
        (Divergence(forward_kl_and_tvd, forward_kl_share=1.0), 1.0, 1.0),
        (forward_kl, 1.0, 0.0),
        (tvd, 0.0, 1.0),
    ],
    ids=["half forward KL", "forward KL and TVD", "forward KL", "TVD"],
)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_over_draws_the_share_of_forward_kl_has_the_dense_gradient_and_the_rest_its_buckets(
    divergence: Divergence, dense_share: float, bucketed_share: float, temperature: float
) -> None:
    k, vocab_size = 3, 12
    random = torch.Generator().manual_seed(7)
    teacher_V, student_V = 2 * torch.randn(2, vocab_size, generator=random, dtype=torch.float64)
    found_V = expected_gradient(divergence, teacher_V, student_V, k=k, temperature=temperature)

    student_V.requires_grad_()
    p_V, q_V = ((x_V / temperature).softmax(0) for x_V in (teacher_V, student_V))
    kept_K, tail_N = p_V.argsort(descending=True).split([k, vocab_size - k])
    p_K1, q_K1 = (torch.cat([x_V[kept_K], x_V[tail_N].sum(0, keepdim=True)]) for x_V in (p_V, q_V))
    wanted = dense_share * DEFINITIONS["forward_kl"](p_V, q_V) + bucketed_share * DEFINITIONS[
        "tvd"
    ](p_K1, q_K1)
    (wanted_V,) = torch.autograd.grad(temperature**2 * wanted, student_V)
    torch.testing.assert_close(found_V, wanted_V, rtol=1e-10, atol=1e-12)


def test_only_forward_kl_and_its_multiples_are_unbiased_with_draws() -> None:
    found = {name: is_unbiased_with_draws(divergence_named(name, MIX)) for name in NAMES}
    assert [name for name, unbiased in found.items() if unbiased] == ["forward_kl"]
    assert is_unbiased_with_draws(Divergence(half_forward_kl, forward_kl_share=0.5))
    assert not is_unbiased_with_draws(Divergence(half_forward_kl, forward_kl_share=1.0))
    assert not is_unbiased_with_draws(Divergence(forward_kl_and_tvd, forward_kl_share=1.0))
