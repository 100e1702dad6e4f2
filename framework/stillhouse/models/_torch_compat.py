"""Private names of torch: each that is relied on, behind a function whose docstring gives the
reason."""

from torch._dynamo.utils import counters


def graph_breaks() -> set[str]:
    """The reasons why torch.compile left out something in this process. No public name tells
    them after the fact; `torch.compile(fullgraph=True)` permits no graph break at all."""
    return set(counters["graph_break"])
