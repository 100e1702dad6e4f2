"""`stillhouse check`, its part on the corpus: its size, how its rows were read, and an example with
what is learnt of it."""

from collections.abc import Callable
from itertools import groupby

import numpy as np

from stillhouse.cli.findings import Findings, Piece, count_words
from stillhouse.pipeline import Plan
from stillhouse.sequence import Sequences
from stillhouse.tracking.samples import SampleAccount

_MOST_TOKENS = 200  # of an example
_BEFORE = 80  # of them in front of the first that is learnt, where there are more


def check_corpus(plan: Plan, found: Findings) -> None:
    """Describe the corpus."""
    section, parts = plan.config.corpus, plan.sources.parts
    corpus, heldout = plan.sources.train, plan.sources.heldout
    found.add(
        "corpus",
        f"{section.dataset if len(parts) < 2 else f'{len(parts)} data sets'}: "
        f"{corpus.num_sequences:,} sequences of "
        f"{corpus.sequence_length:,} tokens, {count_words(corpus.num_targets)} of them with a "
        f"target; {heldout.num_sequences:,} more are held out",
    )
    for part in parts:
        if len(parts) > 1:
            share = part.num_targets / corpus.num_targets
            found.add(
                "",
                f"{part.name}: {part.num_sequences:,} sequences, {share:.1%} of the targets",
            )
        found.add("", *part.account.lines(), *_of_samples(part.account.samples))
    if any(each.format != "text" for each in section.parts()) and section.source == "corpus":
        found.example = example_of(corpus.block(0), lambda ids: str(plan.tokenizer.decode(ids)))


def _of_samples(account: SampleAccount | None) -> list[str]:
    """What a model wrote, and the scores by grader; nothing where no model wrote the data set."""
    if account is None:
        return []
    lines = [
        f"of {account.num_samples:,} samples of {account.num_prompts:,} prompts "
        f"{account.num_ended:,} ended themselves, {account.num_cut:,} were cut, "
        f"{account.num_set_aside:,} were set aside; {account.num_kept:,} are kept"
    ]
    return lines + [
        f"grader {name}: mean score {each.mean_score:.3f}, {each.num_full / each.num_samples:.1%} "
        f"of score 1, of {each.num_samples:,} samples"
        for name, each in account.gradings.items()
    ]


def example_of(sequences: Sequences, decode: Callable[[list[int]], str]) -> list[Piece]:
    """A piece of a document in the sequence that has most targets: runs of tokens as text, and
    whether they are learnt."""
    # The document that holds the first of them.
    row = int(sequences.loss_mask_SL.sum(axis=1).argmax())
    ids_L, mask_L = sequences.token_ids_SL[row], sequences.loss_mask_SL[row]
    starts = [*np.flatnonzero(sequences.positions_SL[row] == 0).tolist(), len(ids_L)]
    first = int(np.flatnonzero(mask_L)[0])
    start = max(each for each in starts if each <= first)
    stop = min(each for each in starts if each > first)

    # As much of it as can be read at a glance, up to its last target's end.
    start = max(start, first - _BEFORE)
    last = start + int(np.flatnonzero(mask_L[start:stop])[-1])
    stop = min(stop, last + 2, start + _MOST_TOKENS)
    is_learnt = [False, *(mask_L[start : stop - 1] == 1).tolist()]
    pieces = []
    for learnt, run in groupby(range(start, stop), key=lambda at: is_learnt[at - start]):
        pieces.append(Piece(decode([int(ids_L[at]) for at in run]), learnt))
    return pieces
