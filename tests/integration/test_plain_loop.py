"""Two ranks under ZeRO 2 are a plain torch loop: sixty steps with every setting of loss and
optimiser off its default, and at work.

The loop shares no mathematics with the framework. It reads the store's records and the public order
of sequences; every document runs by itself through the model as Hugging Face made it, in float64;
loss, schedule and decay are written out here.

Shapes: D documents of a step, L positions, T target tokens, K kept entries, V vocabulary.
"""

import inspect
import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from helpers.models import make_model
from helpers.ranks import RankGroup
from helpers.training import refuse_outage, train_and_tell
from helpers.world import TinyWorld
from stillhouse.logits import decode
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.store import ChunkStore
from stillhouse.student.export import export
from stillhouse.student.job import TrainJob
from stillhouse.tracking import TrainEvent

STEPS, WARMUP, PEAK_RATE, LAST_RATE = 60, 7, 3e-3, 1e-3
BETAS, DECAY, CLIP = (0.8, 0.97), 0.4, 0.2
DIVERGENCE_WEIGHT, MIX, CE_WEIGHT, Z_WEIGHT, TEMPERATURE = 0.7, 0.3, 0.4, 0.01, 1.5
STUDENT = {
    "init": "weights",
    "zero_stage": 2,
    "num_workers": 2,
    # over two ranks of three at a time: five of twelve rows are padding
    "global_batch_sequences": 7,
    "micro_batch_sequences": 3,
    "max_steps": STEPS,
    "checkpoint_every_steps": STEPS,
    "learning_rate": PEAK_RATE,
    "min_learning_rate": LAST_RATE,
    "warmup_steps": WARMUP,
    "betas": BETAS,
    "weight_decay": DECAY,
    "gradient_clip": CLIP,
    "divergence": "jsd",
    "tail_as_bucket": True,
    "mix": MIX,
    "divergence_weight": DIVERGENCE_WEIGHT,
    "ce_weight": CE_WEIGHT,
    "z_loss_weight": Z_WEIGHT,
}


@dataclass(frozen=True)
class Sequence:
    """One packed sequence of the store, and what its records hold."""

    token_ids_L: Tensor
    starts: list[int]  # of its documents
    target_positions_T: Tensor
    kept_ids_TK: Tensor
    logp_TK1: Tensor  # the kept entries, then the tail


@pytest.fixture(scope="module")
def job(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """Documents of one line each, so that several are packed into a sequence; a student with gains,
    biases and a head of its own."""
    folder = tmp_path_factory.mktemp("plain")
    lines = [line for line in inspect.getsource(textwrap).splitlines() if len(line) > 8]
    (folder / "lines.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in lines)
    )
    student = make_model(
        folder / "student",
        vocab_size=300,
        hidden_size=16,
        tied=False,
        seed=5,
        weight_std=0.1,
        config={"mlp_bias": True},
    )
    plan = tiny_world.plan(
        folder / "run",
        corpus={"dataset": str(folder / "lines.jsonl"), "sequence_length": 48},
        target={"k": 8, "tail_draws": 0, "temperature": TEMPERATURE},
        student=STUDENT | {"model": str(student)},
    )
    tiny_world.fill_store(plan)
    return plan.jobs[0]


def stored_sequences(job: TrainJob) -> dict[int, Sequence]:
    store, found = ChunkStore(job.store_url, job.recipe), {}
    for number in sorted(store.published()):
        chunk = store.fetch(number)
        target = decode(torch.from_numpy(chunk.targets_NB), job.recipe.spec)
        logp_NK1 = torch.cat([target.logprobs_TK, target.tail_logmass_T[:, None]], dim=1)
        before = 0
        for row, sequence in enumerate(job.recipe.chunk_rows(number)):
            positions_T = np.flatnonzero(chunk.sequences.loss_mask_SL[row])
            records = slice(before, before := before + len(positions_T))
            found[sequence] = Sequence(
                torch.from_numpy(chunk.sequences.token_ids_SL[row].astype(np.int64)),
                np.flatnonzero(chunk.sequences.positions_SL[row] == 0).tolist(),
                torch.from_numpy(positions_T),
                target.token_ids_TK[records].long(),
                logp_NK1[records],
            )
    return found


def loss_of_documents(lm: torch.nn.Module, batch: list[Sequence]) -> Tensor:
    """The mean over the target tokens of the step, each document read by itself."""
    documents = [
        document for each in batch for document in each.token_ids_L.tensor_split(each.starts[1:])
    ]
    # on the right, where no token looks
    ids_DL = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    logits_DLV = lm(input_ids=ids_DL, use_cache=False).logits
    logits_TV = torch.cat([logits_DLV[d, : len(document)] for d, document in enumerate(documents)])
    length = len(batch[0].token_ids_L)
    logits_TV = logits_TV[
        torch.cat([each.target_positions_T + i * length for i, each in enumerate(batch)])
    ]
    labels_T = torch.cat([each.token_ids_L[each.target_positions_T + 1] for each in batch])
    kept_ids_TK, logp_TK1 = (
        torch.cat([each.kept_ids_TK for each in batch]),
        torch.cat([each.logp_TK1 for each in batch]),
    )

    logq_TV = (logits_TV / TEMPERATURE).log_softmax(1)
    kept_TV = torch.zeros_like(logq_TV, dtype=torch.bool).scatter(1, kept_ids_TK, True)
    logq_tail_T = logq_TV.masked_fill(kept_TV, -torch.inf).logsumexp(1)
    p_TK1 = logp_TK1.exp()
    q_TK1 = torch.cat([logq_TV.gather(1, kept_ids_TK), logq_tail_T[:, None]], dim=1).exp()
    m_TK1 = MIX * p_TK1 + (1 - MIX) * q_TK1
    jsd_T = (MIX * p_TK1 * (p_TK1 / m_TK1).log() + (1 - MIX) * q_TK1 * (q_TK1 / m_TK1).log()).sum(1)
    text_T = (
        CE_WEIGHT * cross_entropy(logits_TV, labels_T, reduction="none")
        + Z_WEIGHT * logits_TV.logsumexp(1).square()
    )
    return (DIVERGENCE_WEIGHT * TEMPERATURE**2 * jsd_T + text_T).mean()


def rate_of(step: int) -> float:
    """Steps count from 0: a line up to the peak, then half a cosine that would reach the last rate
    at the step after the end."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    return (
        LAST_RATE
        + (PEAK_RATE - LAST_RATE) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
    )


def plain_training(job: TrainJob, lm: torch.nn.Module) -> Iterator[tuple[float, float]]:
    """Train the model in place; the loss of each step, and its gradient's norm before clipping."""
    sequences = stored_sequences(job)
    matrices, vectors = (
        [p for p in lm.parameters() if (p.ndim == 2) == two] for two in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=BETAS, eps=1e-8)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = rate_of(step)
        loss = loss_of_documents(
            lm, [sequences[int(number)] for number in job.order.sequences(step)]
        )
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), CLIP)
        optimiser.step()
        yield loss.item(), norm.item()


def test_two_ranks_train_as_a_plain_torch_loop_with_every_setting_at_work(
    job: TrainJob, rank_groups: dict[int, RankGroup], tmp_path: Path
) -> None:
    sequences = stored_sequences(job)
    assert sum(len(each.starts) > 1 for each in sequences.values()) > len(sequences) / 2  # packed
    # an epoch's last step is short
    assert len(job.order.sequences(job.order.steps_per_epoch - 1)) < 7

    rows: list[TrainEvent] = rank_groups[2].call(train_and_tell, job)[0]
    lm = AutoModelForCausalLM.from_pretrained(job.section.model, dtype=torch.float64).train()
    wanted = list(plain_training(job, lm))
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    assert {row.world_size for row in rows} == {2}
    # Adam would not feel a clipping of every step alike
    assert 0.25 < sum(norm > 1.2 * CLIP for _, norm in wanted) / STEPS < 0.75
    for row, (loss, norm) in zip(rows, wanted, strict=True):
        assert row.loss == pytest.approx(loss, rel=1e-6)
        assert row.grad_norm == pytest.approx(norm, rel=1e-5)

    out = tmp_path / "export"
    export(
        job.checkpoints,
        out,
        section=job.section,
        tokenizer=load_tokenizer(job.section.model),
        card=lambda _: "",
        tell=refuse_outage,
    )
    trained = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).state_dict()
    gaps = {
        name: (trained[name] - weight).abs().max().item()
        for name, weight in lm.state_dict().items()
    }
    assert max(gaps.values()) <= 1e-6, gaps
