"""vLLM's worker with our pooler: what vLLM itself makes, in the actor's process or, under tensor
parallelism, in processes of its own.

It ends with the process that owns the engine. And it loads its rows of the head together with the
model, so that what is left of the memory, which vLLM measures then, is what really is left.
"""

import os
import signal
import threading
from dataclasses import replace
from multiprocessing import connection, parent_process
from typing import Any

from stillhouse.engines import _vllm_compat
from stillhouse.engines.vllm_pooler import PoolerPlan, RecordsPooler
from stillhouse.models.head_files import read_head


def records_worker(**arguments: Any) -> Any:
    """A worker of this platform whose model's pooler makes records. vLLM calls this by its name, as
    it calls the class of its own workers; the plan is its `additional_config`."""
    end_with_owner()  # before anything is loaded, which takes minutes
    base = _vllm_compat.worker_class()

    class RecordsWorker(base):  # type: ignore[misc, valid-type]
        def load_model(self, *arguments: Any, **named: Any) -> None:
            super().load_model(*arguments, **named)
            plan: PoolerPlan = self.vllm_config.additional_config
            self.get_model().pooler = _pooler(plan, device=self.device)

        def forget(self) -> None:
            """Clear the cache of keys and values. A NaN in it would spread: attention multiplies
            what lies behind a document's end with 0."""
            _vllm_compat.clear_keys_and_values(self)

    return RecordsWorker(**arguments)


def _pooler(plan: PoolerPlan, *, device: Any) -> RecordsPooler:
    """The pooler of this rank, which has its share of the head's rows."""
    ranks = _vllm_compat.tensor_ranks()
    vocab_size = plan.head.vocab_size
    each = -(-vocab_size // ranks.world)
    first = min(ranks.rank * each, vocab_size)
    rows = slice(first, min(first + each, vocab_size))
    head = read_head(plan.section, plan.head, rows=rows, device=device)
    head = replace(head, float32_logits=plan.section.logits == "exact")
    return RecordsPooler(plan, head, first_id=first, group=ranks.group)


def end_with_owner() -> None:
    """End this process when the one that started it is gone, however that ended.

    A killed owner cannot tell its workers, and one that loads, or waits for the others, does not
    look: they would keep a GPU's memory. The parent's sentinel is a pipe that the kernel closes.
    An actor is no process of Python's multiprocessing: there nothing is done.
    """
    owner = parent_process()
    if owner is None:
        return

    def watch() -> None:
        connection.wait([owner.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()
