"""From the config of `stillhouse generate` to its plan: the writer is pinned, the prompts are
rendered, and the recipe is named."""

from dataclasses import dataclass
from pathlib import Path

from stillhouse.cluster.machine import why_too_long
from stillhouse.config.generate import GenerateConfig
from stillhouse.errors import ConfigError
from stillhouse.models.files import require_whole_weights
from stillhouse.models.generation import context_length, end_ids
from stillhouse.models.token_bytes import bytes_by_id
from stillhouse.models.tokenizers import tokenizer_digest, vocab_size_of, vocabulary_digest
from stillhouse.pipeline.planning import number_format, pinned, tokenising, tokenizer_of
from stillhouse.sequences.prompts import Prompts, prepare_prompts
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.url import absolute_url
from stillhouse.writer.block import PromptBlock
from stillhouse.writer.choice import writer_named
from stillhouse.writer.engine import Prompt


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation, decided: `config` has its model's revision pinned."""

    config: GenerateConfig
    run_dir: Path
    cache_dir: Path
    prompts: Prompts
    recipe: RolloutRecipe

    @property
    def store(self) -> RolloutStore:
        """The rollouts of this recipe, where the config puts them. Made without touching the
        store."""
        return RolloutStore(self.config.store.url, self.recipe)

    def block(self, number: int) -> PromptBlock:
        """What a writer needs to make shard `number`."""
        rows, sources = self.recipe.shard_rows(number), self.prompts.sources
        prompts = [
            Prompt(each, self.prompts[each], sources[each] if sources else "") for each in rows
        ]
        return PromptBlock(number, prompts, frozenset(range(len(rows))))


def plan_generation(config: GenerateConfig, *, run_dir: Path, cache_dir: Path) -> Generation:
    """The plan of a config. Raises ModelError, CorpusError, CacheError, StoreError or ConfigError
    for what cannot be used, before anything heavy starts."""
    # the writer, and what it can do
    if (reason := why_too_long(run_dir)) is not None:
        raise ConfigError(f"--run-dir: {reason}; choose shorter names")
    is_served = config.writer.openai is not None
    if not is_served:
        require_whole_weights(config.writer.model)
    identity = writer_named(config.writer.engine).identity(config.writer, cache_dir=cache_dir)
    writer, sampling = pinned(config.writer, identity), config.sampling
    tokenizer = tokenizer_of(writer)
    if config.writer.openai and config.writer.openai.top_logprobs:
        bytes_by_id(tokenizer)  # which a server's tokens are compared with
    longest = None if is_served else context_length(writer)
    if longest is not None and sampling.sequence_length > longest:
        raise ConfigError(
            f"sampling.sequence_length is {sampling.sequence_length:,}, but {writer.model} is made "
            f"for {longest:,} tokens at most; lower it"
        )

    # the prompts
    with tokenising(config.prompts.dataset) as on_progress:
        prompts = prepare_prompts(
            config.prompts,
            tokenizer,
            tokenizer_digest=tokenizer_digest(tokenizer),
            most_tokens=sampling.sequence_length - sampling.max_new_tokens,
            with_sources=is_served,
            cache_dir=cache_dir,
            on_progress=on_progress,
        )

    # the recipe, and the URL as every worker sees it
    recipe = RolloutRecipe(
        prompts_digest=prompts.digest,
        num_prompts=len(prompts),
        shard_prompts=config.store.shard_prompts,
        samples=sampling.samples,
        sequence_length=sampling.sequence_length,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        end_ids=end_ids(writer, tokenizer),
        vocab_size=vocab_size_of(tokenizer),
        vocabulary_digest=vocabulary_digest(tokenizer),
        writer_kind=identity.kind,
        writer_digest=identity.digest,
        writer_numerics=number_format(config.writer),
        top_logprobs=config.writer.openai.top_logprobs if config.writer.openai else 0,
    )
    store = config.store.model_copy(update={"url": absolute_url(config.store.url)})
    config = config.model_copy(update={"writer": writer, "store": store})
    return Generation(config, run_dir.absolute(), cache_dir, prompts, recipe)
