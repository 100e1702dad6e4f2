"""The teachers of a run: a pool of Ray actors that make targets, and the server that some ask."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from stillhouse.cluster.processes import local_secrets
from stillhouse.config import TeacherSection
from stillhouse.engines.openai import OpenAIEngine
from stillhouse.errors import ChangedWeightsError
from stillhouse.models.identity import forget_identity
from stillhouse.pipeline.console import say
from stillhouse.pipeline.plan import Targets
from stillhouse.pipeline.session import Session
from stillhouse.pipeline.shared_dirs import require_shared_rollouts
from stillhouse.pool.actor_backend import ActorBackend, interpreters_of
from stillhouse.pool.dispatcher import Dispatcher
from stillhouse.pool.retention import Retention
from stillhouse.sequences.stored import Work
from stillhouse.servers.client import BEFORE_A_RUN
from stillhouse.teacher.actor import Ready, TeacherJob, spawn
from stillhouse.teacher.pool import comparison, limits_of


@contextmanager
def answering(targets: Targets) -> Iterator[None]:
    """Ask a teacher behind a server for a probe, where there are targets to make, before anything
    starts; say what they came to at the end. Raises ServerError where it cannot be used."""
    section, store = targets.teacher, targets.store
    if section.openai is None or store.published().issuperset(targets.chunks):
        yield
        return
    engine = OpenAIEngine(
        section, store.recipe, device="cpu", store_url=store.url, patience=BEFORE_A_RUN
    )
    engine.prove()
    yield
    engine.tidy()
    limit = section.openai.max_cost_usd
    if limit is not None:
        say(f"the teacher's server: {engine.granted_usd():.4g} of {limit:g} USD spent or reserved")


@contextmanager
def teacher_pool(
    targets: Targets, session: Session, *, consumers: Retention | None = None
) -> Iterator[Dispatcher[Work, Ready]]:
    """A pool of teachers that makes the targets, to be run. `consumers` of the store keep it within
    the window ahead of them; without them nothing holds it back. Raises ConfigError where a machine
    of teachers does not see the rollouts that they read."""
    # the actors
    section, store, cluster = targets.teacher, targets.store, session.cluster
    where = session.place_of(section)
    require_shared_rollouts(targets.reads, where, besides=store.url)
    start_actor = partial(
        spawn,
        TeacherJob(section, store.recipe, store.url, cluster.threads, cluster.notices),
        where=where,
        secrets=local_secrets(*_variables_of(section)),
        coordinator=session.coordinator,
    )
    backend: ActorBackend[Work, Ready] = ActorBackend(
        start_actor, interpreters=interpreters_of(section, where)
    )

    # and what they are given
    try:
        yield Dispatcher(
            backend,
            limits_of(section),
            compare=comparison(store.recipe),
            store=store,
            order=targets.chunks,
            item_of=targets.item_of,
            window_chunks=targets.window_chunks,
            journal=session.journal,
            retention=consumers,
        )
    except ChangedWeightsError:  # the next plan looks at the weights themselves
        forget_identity(section, cache_dir=targets.cache_dir)
        raise


def _variables_of(section: TeacherSection) -> list[str]:
    """The environment variables with keys that teachers need."""
    return [] if section.openai is None else [section.openai.api_key_env]
