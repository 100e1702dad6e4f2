"""A loss of your own: squared Hellinger distance, used alone and in a run.

    python own_loss.py

trains a small softmax layer on compressed targets and prints how the distance falls. In a run, name
it in the config, with the directory of this file in PYTHONPATH on every machine:

    [student]
    divergence = "own_loss:squared_hellinger"

Shapes: T tokens, H hidden, V vocabulary, K1 = K kept entries and one bucket for the tail.
"""

import torch
from torch import Tensor

import stillhouse


def _squared_hellinger(logp_TK1: Tensor, logq_TK1: Tensor) -> Tensor:
    """1 - sum of sqrt(p q), for each token: 0 where student and teacher agree, 1 at most."""
    return 1.0 - (0.5 * (logp_TK1 + logq_TK1)).exp().sum(dim=-1)


def _generator(logratio: Tensor) -> Tensor:
    """g of the f-divergence, a function of log(q / p): the distance is the sum of p g."""
    return 0.5 * torch.expm1(0.5 * logratio).square()


# With its generator, weighted draws complete it: target.weighted_draws = true, target.tail_draws =
# 25. It holds no forward KL, so plain draws cannot.
squared_hellinger = stillhouse.Divergence(_squared_hellinger, generator=_generator)


def main() -> None:
    num_tokens, hidden_size, vocab_size = 256, 32, 500
    random = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(num_tokens, hidden_size, generator=random)
    teacher_VH = torch.randn(vocab_size, hidden_size, generator=random)
    spec = stillhouse.TargetSpec(vocab_size, k=64)
    target = stillhouse.compress(hidden_TH @ teacher_VH.T, spec)

    student_VH = torch.zeros(vocab_size, hidden_size, requires_grad=True)
    optimiser = torch.optim.Adam([student_VH], lr=0.05)
    for step in range(40):
        terms = stillhouse.distillation_loss(
            hidden_TH, stillhouse.Head(student_VH), target, divergence=squared_hellinger
        )
        (terms.total / terms.num_tokens).backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 10 == 9:
            distance = float(terms.divergence / terms.num_tokens)
            print(f"step {step}: squared Hellinger distance {distance:.3f}")


if __name__ == "__main__":
    main()
