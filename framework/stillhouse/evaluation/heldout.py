"""What students are scored with while they learn: made of the teacher once, and published."""

import torch

from stillhouse.cluster.processes import prepare_process
from stillhouse.evaluation.scores import EvaluationJob, outage_teller, scorer_of
from stillhouse.models.batch import TokenBatch
from stillhouse.retry import DEFAULT_PATIENCE, insist
from stillhouse.sequence import Sequences
from stillhouse.store.object_store import Blobs
from stillhouse.student.heldout import HeldoutTeacher, write_heldout
from stillhouse.tracking import Tracker
from stillhouse.tracking.log import process_log


def publish_heldout(
    job: EvaluationJob, heldout: Sequences, root: str, key: str, tracker: Tracker
) -> None:
    """Write the teacher's final hidden states on these sequences, and its head, to a key under the
    URL `root`. Computed in the calling process. An outage of the store is waited for and
    journalled."""
    prepare_process(job.device, job.threads)
    job.secrets.adopt()
    with process_log("heldout", job.log):
        found = heldout_teacher(job, heldout)
        insist(
            lambda: write_heldout(Blobs(root), key, found),
            patience=DEFAULT_PATIENCE,
            tell=outage_teller(tracker),
        )


def heldout_teacher(job: EvaluationJob, heldout: Sequences) -> HeldoutTeacher:
    """The job's teacher on these sequences, without the teacher."""
    assert job.teacher is not None, "the config wants its weights with every_steps"
    scorer, size = scorer_of(job.teacher, job), job.section.batch_sequences
    with torch.inference_mode():
        hidden = [
            scorer.hidden(TokenBatch.of(heldout.select(slice(first, first + size)))).cpu()
            for first in range(0, len(heldout), size)
        ]
    return HeldoutTeacher(heldout, torch.cat(hidden), scorer.head)
