"""`stillhouse bench loss`: the student's head and loss, forward and backward, beside the usual ways
to write them.

Ours holds the logits of a block of tokens, the others those of all. The yardstick is the three bare
matrix products that every way needs: the logits, and the gradients of hidden states and weight.
Targets are synthetic: K ids from all over the vocabulary with probabilities that fall with their
rank, and a tail of a tenth.

Shapes: T tokens, K kept entries, K1 = K + 1 buckets with the tail last, V vocabulary, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from stillhouse.bench.cost import Timings, Work, extra_bytes, require_device, time_in_turn
from stillhouse.bench.output import figures_table, shown, terminal, write_record
from stillhouse.bench.provenance import Provenance
from stillhouse.errors import ConfigError
from stillhouse.logits import CompressedLogits, Head
from stillhouse.losses.distillation import distillation_loss
from stillhouse.losses.divergences import Divergence, divergence_named, forward_kl
from stillhouse.losses.head_passes import backend_for, block_tokens_for

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
PRODUCTS, OURS, NAIVE, COMPILED, DISTILLKIT, OUR_TEXT, LIGER = (
    "three matrix products", "stillhouse", "autograd", "autograd, compiled", "DistillKit",
    "stillhouse, text alone", "Liger, text alone",
)  # fmt: skip
_MIX = 0.5
_TAIL_MASS = 0.1


@dataclass(frozen=True, slots=True)
class Setting:
    """The sizes of a head and of its batch, and where they are measured."""

    num_tokens: int
    vocab_size: int
    hidden_size: int
    k: int
    dtype: str
    device: str

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def title(self) -> str:
        head = f"{self.vocab_size:,} x {self.hidden_size:,}"
        return f"{self.num_tokens:,} tokens, {head}, k = {self.k}, {self.dtype}, {self.device}"

    def check(self) -> None:
        """Raises ConfigError where this cannot be measured here."""
        if self.k > self.vocab_size:
            raise ConfigError(
                f"--k is {self.k}, above --vocab, which is {self.vocab_size}; keep no more "
                "entries than there are"
            )
        require_device(self.device)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A student's last hidden states and head, both wanting gradients, and what they are to
    learn."""

    hidden_TH: Tensor
    weight_VH: Tensor
    target: CompressedLogits
    labels_T: Tensor

    @classmethod
    def of(cls, setting: Setting, seed: int) -> "Inputs":
        dtype, device = getattr(torch, setting.dtype), setting.torch_device
        random = torch.Generator(device).manual_seed(seed)
        rand, randn, randint = (
            partial(draw, generator=random, device=device)
            for draw in (torch.rand, torch.randn, torch.randint)
        )

        # the target
        shape = (setting.num_tokens, setting.k)
        stretch = setting.vocab_size // setting.k  # one id from each, so that none comes twice
        ids_TK = randint(stretch, shape)
        ids_TK = ids_TK + stretch * rand(shape).argsort(dim=1)
        falling_K = (-1.5 * torch.arange(1, setting.k + 1).log()).log_softmax(0)
        ranked_K = falling_K + torch.tensor(1.0 - _TAIL_MASS).log()
        target = CompressedLogits(
            ids_TK.int(),
            ranked_K.expand(shape).contiguous().to(device),
            torch.full(shape[:1], _TAIL_MASS).log().to(device),
            torch.empty((shape[0], 0), dtype=torch.int32, device=device),
            vocab_size=setting.vocab_size,
        )

        # the student
        hidden_TH = randn(setting.num_tokens, setting.hidden_size)
        weight_VH = randn(setting.vocab_size, setting.hidden_size)
        weight_VH *= 2.0 / setting.hidden_size**0.5
        labels_T = randint(setting.vocab_size, shape[:1])
        return cls(
            hidden_TH.to(dtype).requires_grad_(),
            weight_VH.to(dtype).requires_grad_(),
            target,
            labels_T,
        )

    def with_gradients(self, total: Tensor) -> Sequence[Tensor]:
        return [total.detach(), *torch.autograd.grad(total, [self.hidden_TH, self.weight_VH])]


def bench_loss(
    setting: Setting, *, repeats: int, with_compile: bool, command: str, out: Path | None
) -> None:
    """Measure, print the tables, and write all that was measured to `out`. Raises ConfigError where
    the setting cannot be measured."""
    setting.check()
    torch.set_num_threads(1)
    provenance = Provenance.of(command)
    missing = {way: why for way, why in _missing(setting, with_compile=with_compile).items() if why}
    ways = [way for way in _WAYS if way not in missing]
    device = setting.torch_device

    # the measurements
    timings = time_in_turn(partial(_works, setting, ways), repeats=repeats, device=device)
    memory = extra_bytes(work_of, setting, [way for way in ways if way != PRODUCTS], device=device)
    singles = time_in_turn(partial(_works_of_divergences, setting), repeats=repeats, device=device)
    backend = backend_for(Inputs.of(setting, 0).weight_VH)
    write_record(
        out,
        "loss",
        provenance,
        setting=asdict(setting),
        allocator=timings.allocator,
        path={"name": backend.name, "why": backend.reason},
        block_tokens=block_tokens_for(device, setting.vocab_size),
        seconds={way: asdict(timings.of(way)) for way in ways},
        over_products={way: asdict(timings.ratio(way, PRODUCTS)) for way in ways},
        extra_bytes=memory,
        left_out=missing,
        divergences={way: asdict(singles.of(way)) for way in singles.seconds},
    )

    # the same in words
    console = terminal()
    console.print(table(setting, timings, memory))
    console.print(divergences_table(singles))
    console.print(
        f"Backend: {backend.name}, since {backend.reason}. Load average at the start: "
        f"{provenance.load_average}."
    )
    console.print(f"While it was timed, {timings.allocator}.")
    for way, why in missing.items():
        console.print(f"Left out: {way}; {why}.")


def table(setting: Setting, timings: Timings, memory: dict[str, int]) -> Table:
    """Whole operations, forward and backward; medians (least to most)."""
    title = f"Head and loss, forward and backward\n{setting.title}"
    found = figures_table(title, ["", "ms", "over the\nproducts", "extra MB"])
    for way in timings.seconds:
        milliseconds = shown(timings.of(way), ".1f", unit=1e-3)
        extra = f"{memory[way] / 1e6:,.0f}" if way in memory else ""
        found.add_row(way, milliseconds, shown(timings.ratio(way, PRODUCTS), ".2f"), extra)
    return found


def divergences_table(timings: Timings) -> Table:
    """Each divergence, forward and backward; medians (least to most)."""
    headings = ["", "its buckets\nalone", OURS, NAIVE, f"{NAIVE} over\n{OURS}"]
    found = figures_table("Each divergence, ms", headings)
    for name in DIVERGENCES:
        buckets, ours, naive = (f"{name}: {way}" for way in ("buckets", OURS, NAIVE))
        cells = [shown(timings.of(way), ".1f", unit=1e-3) for way in (buckets, ours, naive)]
        found.add_row(name, *cells, shown(timings.ratio(naive, ours), ".2f"))
    return found


def products(inputs: Inputs) -> Sequence[Tensor]:
    """The three matrix products that every way computes; the logits stand for their gradient."""
    hidden_TH, weight_VH = inputs.hidden_TH.detach(), inputs.weight_VH.detach()
    logits_TV = hidden_TH @ weight_VH.T
    return [logits_TV @ weight_VH, logits_TV.T @ hidden_TH]


def ours(inputs: Inputs, divergence: Divergence = forward_kl) -> Sequence[Tensor]:
    head = Head(inputs.weight_VH)
    terms = distillation_loss(inputs.hidden_TH, head, inputs.target, divergence=divergence)
    return inputs.with_gradients(terms.total)


def our_text(inputs: Inputs) -> Sequence[Tensor]:
    head, labels_T = Head(inputs.weight_VH), inputs.labels_T
    terms = distillation_loss(
        inputs.hidden_TH,
        head,
        None,
        divergence=forward_kl,
        labels_T=labels_T,
        ce_weight=1.0,
        divergence_weight=0.0,
    )
    return inputs.with_gradients(terms.total)


def autograd_loss(
    hidden_TH: Tensor, weight_VH: Tensor, target: CompressedLogits, divergence: Divergence
) -> Tensor:
    """The same loss in its usual first version: all the logits, their log-softmax, and 1 minus the
    kept mass for the tail."""
    logq_TV = (hidden_TH @ weight_VH.T).float().log_softmax(dim=1)
    kept_TK = logq_TV.gather(1, target.token_ids_TK.long())
    tail_T1 = torch.log1p(-kept_TK.exp().sum(dim=1, keepdim=True).clamp(max=1.0 - 1e-6))
    logp_TK1 = torch.cat([target.logprobs_TK, target.tail_logmass_T[:, None]], dim=1)
    return divergence.of(logp_TK1, torch.cat([kept_TK, tail_T1], dim=1)).sum()


def naive(inputs: Inputs, divergence: Divergence = forward_kl) -> Sequence[Tensor]:
    total = autograd_loss(inputs.hidden_TH, inputs.weight_VH, inputs.target, divergence)
    return inputs.with_gradients(total)


def compiled(inputs: Inputs) -> Sequence[Tensor]:
    total = _compiled_loss()(inputs.hidden_TH, inputs.weight_VH, inputs.target, forward_kl)
    return inputs.with_gradients(total)


def distillkit(inputs: Inputs) -> Sequence[Tensor]:
    from distillkit.lossfuncs.kl import MissingProbabilityHandling, sparse_kl_div

    logits_1TV = (inputs.hidden_TH @ inputs.weight_VH.T)[None]
    ids_1TK, logprobs_1TK = inputs.target.token_ids_TK.long()[None], inputs.target.logprobs_TK[None]
    uniform = MissingProbabilityHandling.SYMMETRIC_UNIFORM
    return inputs.with_gradients(sparse_kl_div(logits_1TV, ids_1TK, logprobs_1TK, missing=uniform))


def liger(inputs: Inputs) -> Sequence[Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return inputs.with_gradients(loss(inputs.weight_VH, inputs.hidden_TH, inputs.labels_T))


_WAYS: dict[str, Callable[[Inputs], Sequence[Tensor]]] = {
    PRODUCTS: products,
    OURS: ours,
    NAIVE: naive,
    COMPILED: compiled,
    DISTILLKIT: distillkit,
    OUR_TEXT: our_text,
    LIGER: liger,
}


def work_of(setting: Setting, way: str) -> Work:
    """One way on inputs of its own; can be pickled for another process."""
    return partial(_WAYS[way], Inputs.of(setting, 0))


def _works(setting: Setting, ways: Sequence[str], repeat: int) -> dict[str, Work]:
    inputs = Inputs.of(setting, repeat)
    return {way: partial(_WAYS[way], inputs) for way in ways}


def _works_of_divergences(setting: Setting, repeat: int) -> dict[str, Work]:
    inputs = Inputs.of(setting, repeat)
    logq_TK1 = (
        torch.randn(setting.num_tokens, setting.k + 1, device=setting.torch_device)
        .log_softmax(dim=1)
        .requires_grad_()
    )
    logp_TK1 = torch.cat([inputs.target.logprobs_TK, inputs.target.tail_logmass_T[:, None]], dim=1)
    works: dict[str, Work] = {}
    for name in DIVERGENCES:
        divergence = divergence_named(name, _MIX)
        works[f"{name}: buckets"] = partial(_on_buckets, divergence, logp_TK1, logq_TK1)
        works[f"{name}: {OURS}"] = partial(ours, inputs, divergence)
        works[f"{name}: {NAIVE}"] = partial(naive, inputs, divergence)
    return works


def _on_buckets(divergence: Divergence, logp_TK1: Tensor, logq_TK1: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(divergence.of(logp_TK1, logq_TK1).sum(), logq_TK1)


@cache
def _compiled_loss() -> Callable[..., Tensor]:
    return torch.compile(autograd_loss, dynamic=False)


def _missing(setting: Setting, *, with_compile: bool) -> dict[str, str | None]:
    """For each way that may not be possible here, why it is not, or None."""
    no_liger = None if find_spec("liger_kernel") else "liger-kernel is not installed"
    return {
        COMPILED: _compile_failure(setting) if with_compile else "it was not asked for",
        DISTILLKIT: None if find_spec("distillkit") else "distillkit is not installed",
        LIGER: no_liger if setting.device == "cuda" else "it needs CUDA",
    }


def _compile_failure(setting: Setting) -> str | None:
    """Why the loss cannot be compiled here, whatever the compiler raises; None where it can be."""
    try:
        compiled(Inputs.of(setting, 0))
    except Exception as failure:
        return f"torch.compile fails: {type(failure).__name__}"
    return None
