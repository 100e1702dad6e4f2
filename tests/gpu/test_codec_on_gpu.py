"""Records that a GPU's kernels write are those of the CPU, byte for byte, and what they read from
them is the same target to the last bits of float32."""

import pytest
import torch

from stillhouse.errors import ChunkError
from stillhouse.logits import (
    CompressedLogits,
    TargetSpec,
    codec,
    codec_numpy,
    compress,
    decode,
    encode,
    token_seeds,
)

T = 300
SPECS = [
    TargetSpec(151_669, 8, num_draws=40),
    TargetSpec(151_669, 8, num_draws=25, weighted=True, label_logprob=True, tail_entropy=True),
    TargetSpec(151_936, 64),
    TargetSpec(151_936, 12, num_draws=12, value_bits=6),
    TargetSpec(151_936, 0, num_draws=50, label_logprob=True),
    TargetSpec(262_144, 128, num_draws=3, value_bits=6),
    TargetSpec(262_144, 512),
    TargetSpec(2**31 - 1, 3, tail_entropy=True),
    TargetSpec(3, 1, num_draws=2),
    TargetSpec(3, 3),
]


def random_target(spec: TargetSpec) -> CompressedLogits:
    """Targets of `spec` without logits: distinct ids, draws with repeats, some mass in the tail."""
    random = torch.Generator().manual_seed(0)
    first_K1 = torch.arange(spec.k + 1) * spec.vocab_size // max(1, spec.k)
    shares_TK = torch.rand((T, spec.k), generator=random).double()
    ids_TK = first_K1[:-1] + (shares_TK * first_K1.diff()).long()
    draws_TN = torch.randint(spec.vocab_size, (T, spec.num_draws), generator=random)
    draws_TN = draws_TN.sort(dim=1).values.int()
    tail_T = -4 * torch.rand(T, generator=random) - 0.01
    return CompressedLogits(
        ids_TK.int(),
        -30 * torch.rand((T, spec.k), generator=random),
        torch.full((T,), -torch.inf) if spec.k == spec.vocab_size else tail_T,
        draws_TN,
        vocab_size=spec.vocab_size,
        draw_logprobs_TN=-(draws_TN % 61).float() if spec.weighted else None,
        label_logprob_T=4 * tail_T if spec.label_logprob else None,
        tail_entropy_T=-2 * tail_T if spec.tail_entropy else None,
    )


def assert_same(found: CompressedLogits, wanted: CompressedLogits) -> None:
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, theirs in wanted.tensors.items():
        assert found.tensors[name].is_cuda
        ours = found.tensors[name].cpu()
        if name in ("logprobs_TK", "draw_logprobs_TN"):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_gpus_records_are_the_cpus(gpu: torch.device, spec: TargetSpec) -> None:
    backend = codec.backend_for(spec, gpu)
    assert backend.name == "triton", backend.reason
    target = random_target(spec)
    records = codec_numpy.encode(target, spec)
    on_gpu = encode(target.map(lambda tensor: tensor.to(gpu)), spec)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), records)
    assert_same(decode(on_gpu, spec), codec_numpy.decode(records, spec))


def test_values_on_the_edge_between_two_codes_fall_on_the_cpus_side(gpu: torch.device) -> None:
    """Where a division, a square root or a sum that is not rounded to nearest would show."""
    spec = TargetSpec(1000, 64)
    ranges = torch.linspace(1, 40, 500).half().double()[:, None]
    halves = torch.randint(255, (500, 62), generator=torch.Generator().manual_seed(0)) + 0.5
    edges = (1 + ((1 + ranges).sqrt() - 1) * (halves / 255)) ** 2 - 1
    drops = torch.cat([torch.zeros_like(ranges), edges, ranges], dim=1)
    target = CompressedLogits(
        torch.arange(64, dtype=torch.int32).repeat(500, 1),
        -drops.float(),
        torch.full((500,), -2.0),
        torch.empty((500, 0), dtype=torch.int32),
        vocab_size=1000,
    )
    on_gpu = encode(target.map(lambda tensor: tensor.to(gpu)), spec)
    assert torch.equal(on_gpu.cpu(), codec_numpy.encode(target, spec))


def test_records_straight_from_a_gpus_logits_hold_its_targets(gpu: torch.device) -> None:
    logits = 4 * torch.randn(T, 151_669, generator=torch.Generator().manual_seed(0))
    spec = TargetSpec(151_669, 8, num_draws=40)
    seeds = token_seeds(0, torch.zeros(T), torch.arange(T)).to(gpu)
    target = compress(logits.to(gpu), spec, seeds_T=seeds)
    found = decode(encode(target, spec), spec)
    assert torch.equal(found.tail_ids_TN, target.tail_ids_TN)
    assert torch.equal(
        found.token_ids_TK.sort(dim=1).values, target.token_ids_TK.sort(dim=1).values
    )


def test_a_damaged_record_is_refused_by_its_row(gpu: torch.device) -> None:
    spec = TargetSpec(30_000, 16)
    records = encode(compress(4 * torch.randn(T, 30_000), spec), spec)
    records[77, 4] ^= 255
    records[77, -20:] = 255
    with pytest.raises(ChunkError, match="row 77 "):
        decode(records.to(gpu), spec)


def test_a_target_that_cannot_be_written_is_refused_by_its_row(gpu: torch.device) -> None:
    spec = TargetSpec(30_000, 16, num_draws=3)
    target = random_target(spec)
    target.tail_ids_TN[201, 2] = 30_000
    with pytest.raises(ChunkError, match=r"row 201 has ids outside 0\.\.29999"):
        encode(target.map(lambda tensor: tensor.to(gpu)), spec)
