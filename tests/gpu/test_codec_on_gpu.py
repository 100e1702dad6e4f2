"""Records that a GPU writes are those of the CPU, byte for byte, and what it reads back is the same
target to the last bits of float32."""

import pytest
import torch

from stillhouse.errors import ChunkError
from stillhouse.logits import TargetSpec, compress, decode, encode, token_seeds

T = 300


@pytest.mark.parametrize(
    ("vocab_size", "k", "num_draws", "bits"),
    [(151_936, 64, 0, 8), (151_936, 12, 12, 6), (151_936, 0, 50, 8), (262_144, 128, 3, 6)],
)
def test_a_gpus_records_are_the_cpus(
    gpu: torch.device, vocab_size: int, k: int, num_draws: int, bits: int
) -> None:
    logits = 4 * torch.randn(T, vocab_size, generator=torch.Generator().manual_seed(0))
    seeds = token_seeds(0, torch.zeros(T), torch.arange(T))
    target = compress(logits, TargetSpec(logits.shape[1], k, num_draws=num_draws), seeds_T=seeds)
    spec = TargetSpec(vocab_size, k, num_draws=num_draws, value_bits=bits)
    records = encode(target, spec)
    on_gpu = encode(target.map(lambda tensor: tensor.to(gpu)), spec)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), records)
    found, wanted = decode(on_gpu, spec), decode(records, spec)
    assert found.token_ids_TK.is_cuda
    assert torch.equal(found.token_ids_TK.cpu(), wanted.token_ids_TK)
    assert torch.equal(found.tail_ids_TN.cpu(), wanted.tail_ids_TN)
    torch.testing.assert_close(found.logprobs_TK.cpu(), wanted.logprobs_TK, rtol=1e-6, atol=1e-6)


def test_a_damaged_record_is_refused_by_its_row(gpu: torch.device) -> None:
    spec = TargetSpec(30_000, 16)
    records = encode(compress(4 * torch.randn(T, 30_000), spec), spec)
    records[77, 4] ^= 255
    records[77, -20:] = 255
    with pytest.raises(ChunkError, match="row 77 "):
        decode(records.to(gpu), spec)
