"""Targets and losses of other projects, taught beside ours where they are installed: DistillKit's
compressed entries with its sparse KL, and TRL's entries of a served teacher with their tail.

Each compresses, decompresses and computes its loss by its own code, at temperature 1 and with the
settings that it documents.

Shapes: T tokens, H hidden, V vocabulary, K entries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from stillhouse.errors import ConfigError
from stillhouse.logits import Head

REAL_VOCAB = 151_936  # at which the bytes of all targets are told
PeerLoss = Callable[[Tensor, Tensor, Head, Tensor], Tensor]
"""(teacher's logits [T, V], student's hidden states [T, H], student's head, labels [T]) -> the sum
over the tokens, nats."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A target of another project, and the loss that it trains with."""

    name: str
    project: str
    num_bytes: Callable[[int], int]  # a token, at a vocabulary
    loss: PeerLoss


def installed_projects() -> list[str]:
    return [name for name in ("distillkit", "trl") if find_spec(name)]


def require_a_peer(projects: Sequence[str]) -> None:
    """Raises ConfigError where no other project is installed."""
    if not projects:
        raise ConfigError(
            "neither DistillKit nor TRL is installed here; install one of them beside Stillhouse, "
            "or leave --peers out"
        )


def installed_peers(vocab_size: int) -> list[Peer]:
    """The targets of every other project that is installed here, at the students' vocabulary."""
    projects, peers = installed_projects(), list[Peer]()
    if "distillkit" in projects:
        peers += _distillkit(vocab_size)
    if "trl" in projects:
        peers += [_trl(k) for k in _TRL_KS]
    return peers


# DistillKit's README: its recommended configuration, its budget pick, and the one of its quick
# start, in which half of the loss is cross-entropy.
_Settings = Mapping[str, object]
_RECOMMENDED: dict[str, object] = {
    "k": 128,
    "exact_k": 16,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}
_BUDGET = _RECOMMENDED | {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]}
_QUICK_START = _RECOMMENDED | {
    "exact_k": 32,
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, 2],
    "delta_encoding": True,
}
_SETTINGS: dict[str, _Settings] = {
    "recommended": _RECOMMENDED,
    # the same terms over [0, 1] instead of [0, 112): there the fit in float32 is ill-conditioned
    "recommended, normalize_t": _RECOMMENDED | {"normalize_t": True},
    "budget": _BUDGET,
}
_Entries = Callable[[Tensor], tuple[Tensor, Tensor]]


def _distillkit(vocab_size: int) -> Iterator[Peer]:
    for name, settings in _SETTINGS.items():
        entries = _entries_of(settings, vocab_size)
        for missing in ("zero", "symmetric_uniform"):
            loss = _sparse_kl(entries, missing=missing)
            yield Peer(
                f"DistillKit {name}, {missing}", "DistillKit", partial(_num_bytes, settings), loss
            )
    loss = _sparse_kl(_entries_of(_QUICK_START, vocab_size), missing="zero", text_weight=0.5)
    num_bytes = partial(_num_bytes, _QUICK_START)
    yield Peer("DistillKit quick start, half text, zero", "DistillKit", num_bytes, loss)


def _num_bytes(settings: _Settings, vocab_size: int) -> int:
    from distillkit.compression import DistributionQuantizationConfig

    return int(DistributionQuantizationConfig(d=vocab_size, **settings).total_bits()) // 8


def _entries_of(settings: _Settings, vocab_size: int) -> _Entries:
    """From a teacher's logits to the ids and log-probabilities that are decompressed, [1, T, K].
    The students of a step ask for the same in turn, so the last answer is kept."""
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    compressor = LogprobCompressor(DistributionQuantizationConfig(d=vocab_size, **settings))

    @lru_cache(maxsize=1)
    def entries(teacher_TV: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            record = compressor.compress(teacher_TV.log_softmax(dim=-1)[None])
            ids_1TK, logprobs_1TK = compressor.decompress_to_sparse(record)
        return ids_1TK, logprobs_1TK

    return entries


def _sparse_kl(entries: _Entries, *, missing: str, text_weight: float = 0.0) -> PeerLoss:
    """`missing`: what is made of the mass that is not kept."""
    from distillkit.lossfuncs.kl import MissingProbabilityHandling, sparse_kl_div

    handling = MissingProbabilityHandling(missing)

    def loss(teacher_TV: Tensor, hidden_TH: Tensor, head: Head, labels_T: Tensor) -> Tensor:
        ids_1TK, logprobs_1TK = entries(teacher_TV)
        logits_TV = head.logits(hidden_TH)
        kl: Tensor = sparse_kl_div(logits_TV[None], ids_1TK, logprobs_1TK, missing=handling)
        if text_weight == 0.0:
            return kl
        text = functional.cross_entropy(logits_TV, labels_T, reduction="sum")
        return (1.0 - text_weight) * kl + text_weight * text

    return loss


_TRL_KS = (8, 64)  # its default, and the end of the range that its documentation calls reasonable
_TRL_ENTRY_BYTES = 8  # an int32 id and a float32 log-probability: TRL has no stored form


def _trl(k: int) -> Peer:
    """Forward KL (beta = 0) of the asynchronous trainer, on k entries and a bucket."""
    from trl.experimental.async_distillation.async_distillation_trainer import _jsd_loss_chunk

    def loss(teacher_TV: Tensor, hidden_TH: Tensor, head: Head, labels_T: Tensor) -> Tensor:
        del labels_T
        logprobs_TK, ids_TK = teacher_TV.log_softmax(dim=-1).topk(k, dim=1)
        total: Tensor = _jsd_loss_chunk(
            hidden_chunk=hidden_TH,
            lm_head_weight=head.weight_VH,
            lm_head_bias=head.bias_V,
            logit_scale=head.scale,
            final_logit_softcapping=head.softcap,
            target_ids_chunk=ids_TK,
            teacher_logps_chunk=logprobs_TK,
            candidate_mask_chunk=torch.ones_like(ids_TK, dtype=torch.bool),
            beta=0.0,
            temperature=1.0,
            add_tail_bucket=True,
            teacher_id_idx_chunk=None,
            num_teachers=1,
        )[0]
        return total

    return Peer(f"TRL {k} + tail", "TRL", lambda _vocab_size: k * _TRL_ENTRY_BYTES, loss)
