"""From a config to its plan: revisions are resolved, tokenizers compared, the sources opened, and
the recipe is named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from stillhouse.checkpoint.choice import newest_manifest
from stillhouse.checkpoint.manifest import Commit
from stillhouse.cluster.machine import why_too_long
from stillhouse.cluster.placement import student_needs
from stillhouse.config import (
    Config,
    ModelSection,
    PoolSection,
    StudentSection,
    TargetSection,
    TeacherSection,
)
from stillhouse.engines.base import TeacherEngine
from stillhouse.engines.choice import engine_named, require_capable
from stillhouse.engines.rollouts import require_whole_samples
from stillhouse.errors import ConfigError, StoreError
from stillhouse.logits import TargetSpec
from stillhouse.losses.divergences import divergence_named
from stillhouse.models.files import require_whole_weights
from stillhouse.models.identity import ModelIdentity, model_identity
from stillhouse.models.tokenizers import (
    check_same_ids,
    load_tokenizer,
    tokenizer_digest,
    vocab_size_of,
)
from stillhouse.pipeline.plan import Plan, require_heldout
from stillhouse.pipeline.run_dir import config_of
from stillhouse.sequences.source import open_sources
from stillhouse.store import ChunkStore, Recipe, StoreForbidden, StoreUnavailable, parse_recipe
from stillhouse.store.object_store import Blobs
from stillhouse.store.url import absolute_url
from stillhouse.student.adapters import needs_outline, outline
from stillhouse.student.job import checkpoints_root_of
from stillhouse.student.memory import (
    USABLE_SHARE,
    lowest_stage,
    memory_of_process,
    size_of,
    state_bytes,
)
from stillhouse.terminal import one_line

_Section = TypeVar("_Section", bound=ModelSection)

_SHOW_EVERY_DOCUMENTS = 100


def make_plan(config: Config, *, run_dir: Path, cache_dir: Path) -> Plan:
    """The plan of a config. Raises ModelError, CorpusError, CacheError, StoreError or ConfigError
    for what cannot be used, weights that are not whole included, before anything heavy starts."""
    if (reason := why_too_long(run_dir)) is not None:
        raise ConfigError(f"--run-dir: {reason}; choose shorter names")
    if config.teacher.has_weights:
        require_whole_weights(config.teacher.model)
    if config.student.init != "config":
        require_whole_weights(config.student.model)
    if needs_outline(config.student):
        outline(config.student)
    plan = resolved(config, run_dir=run_dir, cache_dir=cache_dir)
    require_heldout(plan.sources.heldout)
    return plan


def resolved(config: Config, *, run_dir: Path, cache_dir: Path) -> Plan:
    """As `make_plan`, for a run that may be finished: the weights that its student began with need
    not be there any more. A corpus is tokenised once, into `cache_dir`."""
    config = _placed(config)

    # the models: what the engine can do, and the revisions that the run is pinned to
    engine = _capable_engine(config)
    identity = engine.identity(config.teacher, cache_dir=cache_dir)
    teacher = pinned(config.teacher, identity)
    student = pinned(config.student, model_identity(config.student, cache_dir=cache_dir))

    # one tokenizer for both, and a target and a divergence that fit it
    tokenizer = tokenizer_of(teacher)
    own = student.tokenizer
    check_same_ids(tokenizer, tokenizer_of(student) if own is None else load_tokenizer(own))
    digest, spec = tokenizer_digest(tokenizer), _spec(config.target, vocab_size_of(tokenizer))
    divergence_named(student.divergence, student.mix)  # a user's own is imported and tried

    # the sequences
    with tokenising(config.corpus.dataset) as on_progress:
        sources = open_sources(
            config.corpus,
            tokenizer,
            tokenizer_digest=digest,
            block_sequences=config.store.chunk_sequences,
            cache_dir=cache_dir,
            on_progress=on_progress,
        )

    # the recipe, and what else every worker sees
    corpus = sources.train.identity
    recipe = Recipe(
        source_kind=corpus.kind,
        corpus_digest=corpus.digest,
        num_sequences=sources.train.num_sequences,
        sequence_length=config.corpus.sequence_length,
        packing="packed" if config.corpus.packing else "padded",
        chunk_sequences=config.store.chunk_sequences,
        tokenizer_digest=digest,
        teacher_kind=identity.kind,
        teacher_digest=identity.digest,
        teacher_dtype=number_format(config.teacher),
        vocab_size=spec.vocab_size,
        k=spec.k,
        num_draws=spec.num_draws,
        temperature=spec.temperature,
        value_bits=spec.value_bits,
        weighted=spec.weighted,
        label_logprob=spec.label_logprob,
        tail_entropy=spec.tail_entropy,
    )
    recipe = _as_begun(recipe, run_dir=run_dir, url=config.store.url)
    stage, why = _zero_stage(student, run_dir=run_dir.absolute())
    sections = {
        "teacher": teacher,
        "student": student.model_copy(update={"zero_stage": stage}),
    }
    config = config.model_copy(update=sections)
    return Plan(config, run_dir.absolute(), cache_dir, tokenizer, sources, recipe, why)


def _capable_engine(config: Config) -> type[TeacherEngine]:
    """The engine, which can make the config's targets. Raises ConfigError where it cannot."""
    teacher, engine = config.teacher, engine_named(config.teacher.engine)
    require_capable(engine.describe(teacher), config.target, engine=teacher.engine)
    if teacher.rollouts is not None:
        require_whole_samples(teacher, sequence_length=config.corpus.sequence_length)
    return engine


def _placed(config: Config) -> Config:
    """The config with its places as every worker sees them, and with rollouts of its store."""
    url, checkpoint_url = absolute_url(config.store.url), _absolute(config.student.checkpoint_url)
    corpus = config.corpus.in_store(url)
    rollouts = corpus.dataset if config.teacher.engine == "rollouts" else None
    sections = {
        "store": config.store.model_copy(update={"url": url}),
        "corpus": corpus,
        "teacher": config.teacher.model_copy(update={"rollouts": rollouts}),
        "student": config.student.model_copy(update={"checkpoint_url": checkpoint_url}),
    }
    return config.model_copy(update=sections)


def pinned(section: _Section, identity: ModelIdentity) -> _Section:
    """The section with its revision resolved, and a server's model named, and a local directory
    absolute: a worker's working directory is another one."""
    path = Path(section.model).expanduser()
    model = str(path.resolve()) if path.is_dir() else section.model
    values: dict[str, object] = {"model": model, "revision": identity.revision}
    if isinstance(section, PoolSection) and section.openai is not None:
        served = {"served_model": identity.served_model}
        values["openai"] = section.openai.model_copy(update=served)
    return section.model_copy(update=values)


def tokenizer_of(section: ModelSection) -> PreTrainedTokenizerFast:
    return load_tokenizer(
        section.model, revision=section.revision, trust_remote_code=section.trust_remote_code
    )


def _spec(section: TargetSection, vocab_size: int) -> TargetSpec:
    """The target that the config asks for. Raises ConfigError where the vocabulary has no such
    target."""
    try:
        return TargetSpec(
            vocab_size,
            section.k,
            num_draws=section.tail_draws,
            value_bits=section.value_bits,
            temperature=section.temperature,
            weighted=section.weighted_draws,
            label_logprob=section.label_logprob,
            tail_entropy=section.tail_entropy,
        )
    except ConfigError as error:
        raise ConfigError(f"[target] {error}") from None


def _as_begun(recipe: Recipe, *, run_dir: Path, url: str) -> Recipe:
    """The recipe, in format 1 where its run directory or its store was begun in format 1: the run
    then goes on with that store's chunks.

    Raises RecipeError for a damaged run directory, and StoreUnavailable or StoreForbidden where the
    store cannot be asked: begun anew, one of format 1 would have all its chunks made again.
    """
    earlier = recipe.in_format_1()
    if earlier is None:
        return recipe
    # a run keeps its format, wherever its store is now
    begun = run_dir / "recipe.json"
    if begun.exists():
        found = parse_recipe(begun.read_bytes(), where=str(begun))
        return earlier if found == earlier else recipe
    # a new run fills the store that is there
    stores = ChunkStore(url, recipe), ChunkStore(url, earlier)
    try:
        is_there = [store.blobs.stat(store.recipe_key) is not None for store in stores]
    except (StoreUnavailable, StoreForbidden):
        raise
    except StoreError:  # there is none, nor can there be: what uses it next says why
        return recipe
    return earlier if is_there == [False, True] else recipe


def number_format(section: PoolSection) -> str:
    """A model's number format, that of its logits where it is another, and what else moves its
    distribution by more than rounding: weights quantised as they are loaded, a narrow cache. That
    of a server is not known, and the text has none."""
    if section.openai is not None or (
        isinstance(section, TeacherSection) and section.rollouts is not None
    ):
        return "as served"
    if isinstance(section, TeacherSection) and section.scored_by is None:
        return "one-hot"
    parts: list[str] = [section.dtype]
    is_exact = isinstance(section, TeacherSection) and section.logits == "exact"
    if is_exact and section.dtype != "float32":
        parts.append("float32")
    if section.vllm.quantization is not None:
        parts.append(f"{section.vllm.quantization} weights")
    if section.vllm.kv_cache_dtype != "auto":
        parts.append(f"{section.vllm.kv_cache_dtype} cache")
    return "+".join(parts)


def _zero_stage(section: StudentSection, *, run_dir: Path) -> tuple[int, str]:
    """The student's ZeRO stage, and why it is that. "auto" is that of the run, or of the
    checkpoints, that it goes on from; and in a new run the lowest that the memory of its GPUs has
    room for."""
    if section.zero_stage != "auto":
        return section.zero_stage, "as zero_stage says"
    # as it was begun
    if (run_dir / "config.json").exists():
        return config_of(run_dir).student.chosen_stage, "as the run was begun"
    newest = _newest_manifest(f"{checkpoints_root_of(section, run_dir)}/student")
    if newest is not None:
        return newest.origin.zero_stage, "as its checkpoints were begun"
    # by arithmetic, for the fewest ranks that train
    if section.gpu_memory_gb is None:
        return section.chosen_stage, "the lowest, for gpu_memory_gb is not set"
    [(_, num_ranks)] = student_needs(section).values()
    memory_bytes = memory_of_process(section, section.gpu_memory_gb * 1e9)
    size, budget_bytes = size_of(outline(section)), USABLE_SHARE * memory_bytes
    stage = lowest_stage(size, section, num_ranks=num_ranks, budget_bytes=budget_bytes)
    a_rank = state_bytes(size, section, stage=stage, num_ranks=num_ranks)
    kind = "the lowest that fits" if a_rank <= budget_bytes else "the highest, and none fits"
    return stage, f"{kind} into {USABLE_SHARE:.0%} of {memory_bytes / 1e9:.3g} GB"


def _newest_manifest(url: str) -> Commit | None:
    """The newest commit there. Raises StoreUnavailable or StoreForbidden where the store cannot be
    asked."""
    try:
        return newest_manifest(url)
    except (StoreUnavailable, StoreForbidden):
        raise
    except StoreError:  # there is none, nor can there be: what uses it next says why
        return None


def _absolute(checkpoint_url: str | None) -> str | None:
    """The same location from a worker's working directory. Raises ConfigError where only one
    process would see it."""
    if checkpoint_url is None:
        return None
    if checkpoint_url.startswith("memory:"):
        raise ConfigError(
            "student.checkpoint_url is in memory, which is lost with its process; set it to a "
            "directory or a bucket"
        )
    return Blobs(checkpoint_url).url


@contextmanager
def tokenising(dataset: str) -> Iterator[Callable[[int, int], None]]:
    """Show on the terminal how far tokenising is; nothing is shown for a corpus that is cached."""
    with Console(stderr=True).status(Text(one_line(f"reading {dataset}"))) as status:

        def on_progress(num_documents: int, num_tokens: int) -> None:
            if num_documents % _SHOW_EVERY_DOCUMENTS == 0:
                counts = f"{num_documents:,} documents, {num_tokens:,} tokens"
                status.update(Text(one_line(f"tokenising {dataset}: {counts}")))

        yield on_progress
