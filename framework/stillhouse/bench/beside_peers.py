"""`stillhouse bench targets --peers`: four sizes of our targets beside those of other projects, in
the same lessons, between the text alone and the teacher's whole distribution."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

from matplotlib.figure import Figure

from stillhouse.bench.classroom import Form
from stillhouse.bench.figures import Spread
from stillhouse.bench.peers import REAL_VOCAB, Peer
from stillhouse.bench.targets import BUDGETS, SHARES, Comparison, in_words, splits_of
from stillhouse.config import TargetSection
from stillhouse.logits import TargetSpec
from stillhouse.losses.score import Scores

_BEST_SPLIT = 1 + SHARES.index(0.25)  # of `splits_of`; the default target has this share too
_MARKERS = "os^vD<>PX*"  # of a project's targets
_TICKS = (32, 64, 128, 256, 512)  # bytes


def beside(peers_at: Callable[[int], Sequence[Peer]]) -> Comparison:
    """The comparison with the peers at a vocabulary."""
    return Comparison(lambda vocab_size: forms_beside(vocab_size, peers_at(vocab_size)), figure)


def forms_beside(vocab_size: int, peers: Sequence[Peer]) -> list[Form]:
    """The two bounds, ours from the least bytes to the most, and each peer's."""
    whole = TargetSpec(vocab_size, vocab_size)
    default = TargetSection()
    ours = [
        TargetSpec(vocab_size, default.k, num_draws=default.tail_draws),
        *(splits_of(budget, vocab_size)[_BEST_SPLIT] for budget in BUDGETS),
    ]
    return [
        Form("text", "text", whole),
        Form("everything", "everything", whole),
        *(
            Form(f"{spec.k}+{spec.num_draws}", "stored", spec)
            for spec in sorted(ours, key=lambda spec: spec.bytes_per_token)
        ),
        *(Form(peer.name, "peer", whole, peer=peer) for peer in peers),
    ]


def figure(forms: Sequence[Form], rounds: Sequence[Mapping[str, Scores]]) -> Figure:
    """KL from the teacher over the bytes of a target at `REAL_VOCAB` ids: ours as a line, each of
    a peer's as a point, and the two bounds."""
    drawn = Figure(figsize=(9, 4), layout="constrained")
    axes = drawn.subplots()

    def spread(form: Form) -> Spread:
        return Spread.of(one[form.name].kl for one in rounds)

    # the two bounds
    text, everything, *others = forms
    for form, style in ((text, ":"), (everything, "--")):
        label = in_words(form)
        axes.axhline(spread(form).median, color="0.5", linestyle=style, linewidth=1, label=label)

    # ours, then each project's in a colour of its own
    ours = [form for form in others if form.peer is None]
    projects = list(dict.fromkeys(form.peer.project for form in others if form.peer is not None))
    lines = [("Stillhouse: entries + draws", "C0", "o-", ours)]
    for number, project in enumerate(projects):
        of_project = [form for form in others if form.peer and form.peer.project == project]
        for form, marker in zip(of_project, cycle(_MARKERS), strict=False):
            lines.append((in_words(form), f"C{number + 1}", marker, [form]))
    for label, color, style, within in lines:
        kls = [spread(form) for form in within]
        axes.errorbar(
            [form.bytes_at(REAL_VOCAB) or 0 for form in within],
            [kl.median for kl in kls],
            yerr=[[kl.median - kl.least for kl in kls], [kl.most - kl.median for kl in kls]],
            fmt=style,
            color=color,
            label=label,
        )
    axes.set_xscale("log")
    axes.set_xticks(_TICKS, [str(tick) for tick in _TICKS], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"bytes a token at a vocabulary of {REAL_VOCAB:,}")
    axes.set_ylabel("held-out KL from the teacher, nats")
    drawn.legend(frameon=False, fontsize=8, loc="outside right center")
    return drawn
