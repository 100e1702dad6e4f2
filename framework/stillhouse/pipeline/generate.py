"""The command `generate` as a function of its plan: writers fill a store with rollouts.

Its run directory has the recipe, the journal, the logs and the lock of a run's; see `run_dir.py`.
It can be stopped at any moment and given again.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from time import monotonic, time

from stillhouse import atomic
from stillhouse.cluster.processes import local_secrets
from stillhouse.config.generate import WriterSection
from stillhouse.errors import ChangedWeightsError, RecipeError, StoreError
from stillhouse.models.identity import forget_identity
from stillhouse.pipeline.attempt import Outcome, failure_journalled, shown
from stillhouse.pipeline.console import patient, say
from stillhouse.pipeline.generation import Generation
from stillhouse.pipeline.holder import Holder
from stillhouse.pipeline.ownership import locked
from stillhouse.pipeline.run_store import require_shareable
from stillhouse.pipeline.session import Session, at_work, on_ray
from stillhouse.pipeline.shared_dirs import require_shared
from stillhouse.pool.actor_backend import ActorBackend, interpreters_of
from stillhouse.pool.dispatcher import Dispatcher
from stillhouse.servers.client import BEFORE_A_RUN
from stillhouse.store.explain import explain
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.tracking import (
    CostEvent,
    EndEvent,
    GenerationEvent,
    Journal,
    JournalReader,
    ProgressView,
)
from stillhouse.tracking.log import driver_log
from stillhouse.writer.actor import Ready, WriterJob, spawn
from stillhouse.writer.block import PromptBlock
from stillhouse.writer.openai import OpenAIWriter
from stillhouse.writer.pool import comparison, limits_of

_VERSIONED = ("stillhouse", "torch", "ray", "transformers", "datasets")


def generate(plan: Generation, *, command: str = "stillhouse generate") -> None:
    """Fill the store with every shard of the plan. What is there already stays as it is."""
    config = plan.config
    needs = {"writers": (config.writer, config.writer.min_replicas)}
    with (
        _attempt(plan, command) as journal,
        _answering(plan, journal),
        on_ray(config.cluster, journal),
        at_work(config.cluster, journal, needs) as (session, machines),
    ):
        where = session.place_of(config.writer)
        require_shared(config.store.url, [where], what="rollouts", setting="store.url")

        def finished() -> bool:
            machines.require_driver()
            return True

        with _writers(plan, session) as pool:
            pool.run(readers=(), coordinator=session.coordinator, finished=finished)


@contextmanager
def _answering(plan: Generation, journal: Journal) -> Iterator[None]:
    """Ask a writer behind a server for one token, where there is something to write, before
    anything starts; say and journal what all came to at the end.

    Raises ServerError where the server cannot be used.
    """
    section, store, recipe = plan.config.writer, plan.store, plan.recipe
    num_missing = recipe.num_shards - len(store.published())
    if section.openai is None or not num_missing:
        yield
        return
    writer = OpenAIWriter(section, recipe, device="cpu", store_url=store.url, patience=BEFORE_A_RUN)
    writer.prove(plan.block(0).prompts[0])
    yield
    writer.tidy()
    limit = section.openai.max_cost_usd
    if limit is not None:
        granted = writer.granted_usd()
        patient(journal).record(CostEvent(granted, limit))
        say(f"the writer's server: {granted:.4g} of {limit:g} USD spent or reserved")


@contextmanager
def _writers(plan: Generation, session: Session) -> Iterator[Dispatcher[PromptBlock, Ready]]:
    """A pool of writers that makes every shard, to be run."""
    # the actors
    section, recipe, cluster = plan.config.writer, plan.recipe, session.cluster
    where = session.place_of(section)
    start_actor = partial(
        spawn,
        WriterJob(section, recipe, plan.store.url, cluster.threads, cluster.notices),
        where=where,
        secrets=local_secrets(*_variables_of(section)),
        coordinator=session.coordinator,
    )
    backend: ActorBackend[PromptBlock, Ready] = ActorBackend(
        start_actor, interpreters=interpreters_of(section, where)
    )

    # and what they are given
    try:
        yield Dispatcher(
            backend,
            limits_of(section),
            compare=comparison(recipe),
            store=plan.store,
            order=range(recipe.num_shards),
            item_of=plan.block,
            window_chunks=recipe.num_shards,
            journal=session.journal,
        )
    except ChangedWeightsError:  # the next plan looks at the weights themselves
        forget_identity(section, cache_dir=plan.cache_dir)
        raise


def _variables_of(section: WriterSection) -> list[str]:
    """The environment variables with keys that writers need."""
    return [] if section.openai is None else [section.openai.api_key_env]


@contextmanager
def _attempt(plan: Generation, command: str) -> Iterator[Journal]:
    """Use the run directory: lock it, write down what is asked, journal start and end, and show the
    journal.

    Raises RecipeError where the directory belongs to something else, and ConfigError where another
    command is using it.
    """
    run_dir = plan.run_dir
    with locked(Holder.here(command, run_dir, now=time())):
        # what is asked, unless something refuses it
        require_same(plan)
        require_shareable(plan.store.url)
        RolloutStore.create(plan.store.url, plan.recipe)
        _claim(plan)

        # the event that it begins
        began, journal = monotonic(), Journal(run_dir / "journal.jsonl")
        reader = JournalReader(journal.path)
        start = _start_event(plan, command, reader)
        with driver_log(run_dir, attempt=start.attempt):
            waiting = patient(journal)
            waiting.record(start)

            # and the one that it ends, whether views, the command or the machine fail
            def end(outcome: Outcome, message: str = "") -> None:
                event = EndEvent(outcome, monotonic() - began, message)
                if outcome == "done":
                    waiting.record(event)
                    return
                with suppress(StoreError):  # a full disk neither hides nor delays another outcome
                    journal.record(event)

            with shown(JournalReader(journal.path), ProgressView()):
                with failure_journalled(end):
                    yield journal
                end("done")


def _start_event(plan: Generation, command: str, earlier: JournalReader) -> GenerationEvent:
    attempts = sum(isinstance(event, GenerationEvent) for event in earlier.new_events())
    return GenerationEvent(
        attempt=attempts + 1,
        command=command,
        versions={name: version(name) for name in _VERSIONED},
        writer=plan.config.writer.model,
        recipe_fingerprint=plan.recipe.fingerprint,
        num_shards=plan.recipe.num_shards,
        num_prompts=plan.recipe.num_prompts,
        samples=plan.recipe.samples,
        num_writers=plan.config.writer.max_replicas,
        bad_rows=len(plan.prompts.account.bad_rows),
    )


def require_same(plan: Generation) -> None:
    """Raise RecipeError where the run directory belongs to something else. Nothing is written."""
    path = plan.run_dir / "recipe.json"
    if path.exists() and path.read_bytes() != plan.recipe.canonical_json():
        raise RecipeError(
            f"{plan.run_dir} belongs to a run, or to prompts, a writer or sampling of other "
            "settings; set them back to go on with it, or name another --run-dir"
        )


def _claim(plan: Generation) -> None:
    """Write recipe.json and generate.json. Raises StoreError where they cannot be written."""
    files = {
        "recipe.json": plan.recipe.canonical_json(),
        "generate.json": (plan.config.model_dump_json(indent=2) + "\n").encode(),
    }
    try:
        for name, data in files.items():
            atomic.replace(plan.run_dir / name, data)
    except OSError as error:
        raise explain(
            error, doing="write recipe.json and generate.json", url=str(plan.run_dir)
        ) from error
