"""The report's section on rollouts: what a model wrote, what of it is trained on, the scores that
graders gave, and samples that are kept and dropped, side by side.

Invariant: the text of a sample is hostile. It passes `_shown`, which escapes HTML and makes visible
what steers a terminal or the direction of text.
"""

from collections.abc import Mapping, Sequence

from stillhouse.report.markup import escape, note, table
from stillhouse.report.summary import Summary
from stillhouse.report.words import counted, large, percent, short_name
from stillhouse.terminal import printable
from stillhouse.tracking.samples import FILE_NAME, Grading, SampleAccount, ShownSample

_ROLLOUTS = "rollouts://"  # a data set with this scheme is what a model wrote


def samples_section(summary: Summary, accounts: Mapping[str, SampleAccount]) -> str:
    """The section, with a part for each data set; empty where no data set is of rollouts."""
    found = "".join(
        _of_data_set(name, account, is_one_of_many=len(accounts) > 1)
        for name, account in accounts.items()
    )
    if not found and any(name.startswith(_ROLLOUTS) for name in summary.start.corpus_targets):
        found = note(
            f"The run directory has no {FILE_NAME} that can be read. The next command in this run "
            "directory writes it, unless a version without it has prepared the corpus."
        )
    return f"<h2>What a model wrote to be trained on</h2>\n{found}" if found else ""


def _of_data_set(name: str, account: SampleAccount, *, is_one_of_many: bool) -> str:
    heading = f"<h3>{_shown(short_name(name))}</h3>" if is_one_of_many else ""
    words = (
        f"{counted(account.num_samples, 'sample')} of {counted(account.num_prompts, 'prompt')}, "
        f"{large(account.num_tokens)} sampled tokens: {account.num_ended:,} ended themselves, "
        f"{account.num_cut:,} were cut, and {account.num_set_aside:,} were set aside. "
        f"{account.num_kept:,} are kept, held-out ones included."
    )
    return (
        f"{heading}<p>{escape(words)}</p>{_drops_table(account)}{_gradings_table(account.gradings)}"
        f"{_side_by_side(account)}"
    )


def _drops_table(account: SampleAccount) -> str:
    """What is kept, and each reason for which samples are dropped."""
    drops = [(_reason(reason), num) for reason, num in account.drops.items()]
    rows = [("Kept", account.num_kept), *drops]
    total = max(account.num_samples, 1)
    body = "".join(
        f"<tr><th>{_shown(reason)}</th><td>{num:,}</td>"
        f'<td class="bar"><i style="width:{100 * num / total:.1f}%"></i></td>'
        f"<td>{percent(num / total)}</td></tr>"
        for reason, num in rows
    )
    words = "A sample is counted by the first reason for which it is dropped."
    names = ("What becomes of them", "Samples", "", "Share")
    return table("drops", names, body) + (note(words) if account.drops else "")


def _gradings_table(gradings: Mapping[str, Grading]) -> str:
    """A line for each grader; empty where none has graded anything."""
    if not gradings:
        return ""
    body = "".join(
        f"<tr><th>{_shown(name)}</th><td>{each.num_samples:,}</td><td>{each.mean_score:.3f}</td>"
        f"<td>{percent(each.num_full / max(each.num_samples, 1))}</td>"
        f'<td class="tenths">{_tenths(each.by_tenth)}</td></tr>'
        for name, each in gradings.items()
    )
    words = "As the verdicts were when the samples were read. A sample without a score counts as 0."
    names = ("Grader", "Samples", "Mean score", "Of score 1", "From 0 to 1")
    return table("gradings", names, body) + note(words)


def _tenths(counts: Sequence[int]) -> str:
    """A bar for each tenth of the scores, as high as its part of the highest."""
    highest = max(max(counts, default=0), 1)
    return "".join(
        f'<i style="height:{32 * count / highest:.0f}px" title="{count:,}"></i>' for count in counts
    )


def _side_by_side(account: SampleAccount) -> str:
    """Two columns of samples, the same for every page of the same rollouts."""
    columns = "".join(
        f'<div><h3 class="{css_class}">{title}</h3>{cards}</div>'
        for css_class, title, cards in (
            ("kept", "Kept", "".join(map(_card, account.kept))),
            ("dropped", "Dropped", "".join(map(_card, account.dropped))),
        )
        if cards
    )
    words = (
        "Prompts are chosen by a hash of their numbers, and the reasons of the dropped take turns. "
        "Special tokens are left out."
    )
    return f'<div class="samples">{columns}</div>{note(words)}' if columns else ""


def _card(sample: ShownSample) -> str:
    """One sample: its number, how it ended and why it is dropped, its scores, prompt and text."""
    scores = "".join(
        f'<span class="score">{_shown(name)} <b>{score:.2f}</b></span>'
        for name, score in sample.scores.items()
    )
    reason = f'<p class="reason">{_shown(_reason(sample.reason))}</p>' if sample.reason else ""
    about = f"Prompt {sample.prompt_number:,}, sample {sample.sample_number:,}: {sample.finish}"
    return (
        f'<article class="sample"><p class="about">{_shown(about)}{scores}</p>{reason}'
        f'<pre class="asked">{_text(sample.prompt)}</pre>'
        f'<pre class="wrote">{_text(sample.text)}</pre></article>'
    )


def _text(text: str) -> str:
    return _shown(text) if text.strip() else "<i>no text</i>"


def _reason(reason: str) -> str:
    """Without the word that makes it a part of a sentence elsewhere."""
    return reason.removeprefix("samples: ")


def _shown(text: str) -> str:
    return escape(printable(text))
