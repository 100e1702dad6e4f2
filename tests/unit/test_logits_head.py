"""A `Head` is its formula, term by term: softcap * tanh(scale * (hidden @ weight^T + bias) /
softcap)."""

import pytest
import torch

from stillhouse.logits import Head

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(5, 8, generator=GENERATOR, dtype=torch.float64)
WEIGHT = 3.0 * torch.randn(30, 8, generator=GENERATOR, dtype=torch.float64)
BIAS = torch.randn(30, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("scale", [1.0, 0.0625, 4.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_follow_the_formula(
    bias: torch.Tensor | None, scale: float, softcap: float | None
) -> None:
    wanted = torch.einsum("th,vh->tv", HIDDEN, WEIGHT)
    wanted = scale * (wanted if bias is None else wanted + bias)
    wanted = wanted if softcap is None else softcap * (wanted / softcap).tanh()
    torch.testing.assert_close(
        Head(WEIGHT, bias, scale=scale, softcap=softcap).logits(HIDDEN), wanted
    )


def test_the_cap_bites_and_is_never_passed() -> None:
    capped = Head(100.0 * WEIGHT, softcap=3.0).logits(HIDDEN)
    assert capped.abs().max() <= 3.0
    assert capped.abs().median() > 2.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hidden_states_of_another_dtype_are_met_in_that_of_the_weight(dtype: torch.dtype) -> None:
    head = Head(WEIGHT.to(dtype), softcap=30.0)
    logits = head.logits(HIDDEN.float())
    assert logits.dtype == dtype
    assert torch.equal(logits, head.logits(HIDDEN.float().to(dtype)))


def test_a_padded_weight_is_sliced_without_a_copy() -> None:
    head = Head(WEIGHT[:23], BIAS[:23])
    assert head.vocab_size == 23
    assert head.weight_VH.data_ptr() == WEIGHT.data_ptr()
    torch.testing.assert_close(head.logits(HIDDEN), Head(WEIGHT, BIAS).logits(HIDDEN)[:, :23])


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_logits_of_narrow_weights_are_not_rounded(
    dtype: torch.dtype, bias: torch.Tensor | None
) -> None:
    narrow_bias = None if bias is None else bias.to(dtype)
    rounded, exact = (
        Head(WEIGHT.to(dtype), narrow_bias, scale=2.0, softcap=9.0, float32_logits=exact)
        for exact in (False, True)
    )
    hidden = HIDDEN.to(dtype)
    wanted = Head(
        WEIGHT.to(dtype).double(),
        None if narrow_bias is None else narrow_bias.double(),
        scale=2.0,
        softcap=9.0,
    ).logits(hidden)
    assert exact.logits(hidden).dtype == torch.float32
    torch.testing.assert_close(exact.logits(hidden).double(), wanted, rtol=1e-5, atol=1e-5)
    assert rounded.logits(hidden).dtype == dtype
    assert (rounded.logits(hidden).double() - wanted).abs().max() > 1e-3


def test_float32_logits_of_many_ids_are_made_some_at_a_time() -> None:
    weight = torch.randn(40_000, 4, generator=GENERATOR).bfloat16()
    hidden = torch.randn(3, 4, generator=GENERATOR).bfloat16()
    torch.testing.assert_close(
        Head(weight, float32_logits=True).logits(hidden),
        hidden.float() @ weight.float().T,
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("float32_logits", [False, True])
def test_products_in_rows_of_whole_cache_lines_are_the_products(
    bias: torch.Tensor | None, float32_logits: bool
) -> None:
    narrow_bias = None if bias is None else bias.bfloat16()
    head = Head(WEIGHT.bfloat16(), narrow_bias, scale=2.0, float32_logits=float32_logits)
    rows = head.product_rows(9)
    assert (rows.shape, rows.stride()) == ((9, 30), (64, 1))
    products = head.products(HIDDEN, out_TV=rows[:5])
    assert products.data_ptr() == rows.data_ptr()
    assert torch.equal(products, head.products(HIDDEN))
    assert torch.equal(head.curve.logits(products), head.logits(HIDDEN))
