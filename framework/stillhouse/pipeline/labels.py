"""The label that a run leaves in the store which it fills: who made these chunks, for people."""

import logging
import os

from stillhouse.errors import StoreError
from stillhouse.pipeline.plan import Plan
from stillhouse.redaction import scrub
from stillhouse.store.labels import Label, moment, put_label
from stillhouse.store.names import name_like
from stillhouse.tracking import StartEvent, read_journal

_log = logging.getLogger(__name__)


def leave_label(plan: Plan) -> None:
    """Label the plan's recipe in its store, once a run, by a run directory whose journal has begun.

    A store that refuses it is no fault of the run: the log has a line.
    """
    events = read_journal(plan.run_dir / "journal.jsonl")
    first = next(event for event in events if isinstance(event, StartEvent))
    try:
        put_label(plan.store, label_of(plan, first))
    except StoreError as error:
        _log.warning("the store has no label of this run, for `stillhouse store ls`: %s", error)


def label_of(plan: Plan, first: StartEvent) -> Label:
    """The label of a run whose journal begins with `first`: the same after every resume.

    The digits behind the directory's name are those of the run's id at W&B.
    """
    config = plan.config
    tokenizer = config.student.tokenizer or config.teacher.model
    names = {
        "teacher": config.teacher.scored_by or "the text itself",
        "student": config.student.model,
        "tokenizer": tokenizer,
        "dataset": ", ".join(_for_all_to_read(part.dataset) for part in config.corpus.parts()),
        "stillhouse": first.versions.get("stillhouse", ""),
    }
    return Label(
        run=f"{name_like(plan.run_dir.name)}-{round(first.time * 1000):x}",
        created=moment(first.time),
        names={name: _for_all_to_read(text) for name, text in names.items()},
    )


def _for_all_to_read(text: str) -> str:
    """Without secrets, and without the name of this machine's user in a path."""
    home = os.path.expanduser("~")
    in_home = home != "/" and text.startswith(f"{home}/")
    return str(scrub(f"~{text.removeprefix(home)}" if in_home else text))
