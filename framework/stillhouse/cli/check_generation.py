"""`stillhouse check` of a config of `generate`: all that follows from its plan, and what would stop
`generate` and `grade`. No weights are loaded, no server is asked and nothing is written."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse.cli.check_cluster import (
    cluster_words,
    needs_words,
    replicas_words,
    resources_for,
    tell_shortages,
)
from stillhouse.cli.check_memory import WriterSize, check_writer
from stillhouse.cli.check_weights import format_words, quantisation_of, weight_bytes
from stillhouse.cli.findings import (
    Findings,
    bullets,
    count_words,
    print_findings,
    require_writable,
    size_words,
)
from stillhouse.cluster.machine import why_not_writable
from stillhouse.cluster.placement import shortages
from stillhouse.cluster.session import lacks, remarks
from stillhouse.config.generate import WriterSection
from stillhouse.errors import ConfigError, ModelError, RecipeError, StoreError
from stillhouse.models.load import load_model
from stillhouse.pipeline import Generation
from stillhouse.pipeline.generate import require_same
from stillhouse.pipeline.grading import missing_key, standings
from stillhouse.pipeline.planning import tokenizer_of
from stillhouse.pipeline.run_store import require_shareable
from stillhouse.store.rollout_maintenance import find_rollouts, is_begun
from stillhouse.store.rollout_recipe import rollout_differences
from stillhouse.store.rollouts import bytes_of_rollout
from stillhouse.writer.openai import most_usd

_MOST_OF_A_PROMPT = 200  # characters
_MOST_DIFFERENCES = 4  # differing fields up to which another recipe is a near one


def describe_generation(plan: Generation) -> None:
    """Print what `generate` makes and needs, and what is there. Raises ConfigError naming
    everything that would stop it, or `grade`."""
    found = Findings()
    _prompts(plan, found)
    size = _writer(plan, found)
    _samples(plan, found)
    present = _store(plan, found)
    _graders(plan, found, num_present=present)
    _cluster(plan, found, size)
    _run_directory(plan, found)
    print_findings(found)
    if found.obstacles:
        raise ConfigError("generate or grade would stop:\n" + bullets(found.obstacles))


def _prompts(plan: Generation, found: Findings) -> None:
    """Their number and lengths, how their rows were read, and the beginning of one."""
    lengths = np.diff(plan.prompts.starts_P1)
    found.add(
        "prompts",
        f"{plan.config.prompts.dataset}: {len(plan.prompts):,} prompts of {lengths.min():,} to "
        f"{lengths.max():,} tokens, {lengths.mean():,.0f} on average",
        *plan.prompts.account.lines(),
    )
    first = str(tokenizer_of(plan.config.writer).decode(plan.prompts[0].tolist()))
    found.add("", f"the first: {first[:_MOST_OF_A_PROMPT]}")
    references = plan.prompts.references
    if references:
        column = plan.config.prompts.reference_column
        found.add("", f"each with a reference, from column '{column}'")


def _writer(plan: Generation, found: Findings) -> WriterSize | None:
    """Its size; None where that is not known."""
    # the model, without memory for its weights
    section, recipe = plan.config.writer, plan.recipe
    name = section.model + (f" at {section.revision[:12]}" if section.revision else "")
    if section.openai is not None:
        found.add("writer", f"the server at {section.openai.base_url}; {name} has the tokenizer")
        if (problem := missing_key(section.openai)) is not None:
            found.obstacles.append(f"writer.openai: {problem}")
        return None
    if section.engine not in WriterSection.engines:
        found.add("writer", f"{name}, by {section.engine}, whose memory is not known")
        return None
    try:
        with torch.device("meta"):
            model = load_model(section, random_init_seed=0)
    except ModelError as error:
        found.obstacles.append(f"writer: {error}")
        found.add("writer", name)
        return None

    # its weights, and what it holds of the samples that it writes side by side
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype_bytes, quantised = getattr(torch, section.dtype).itemsize, quantisation_of(model)
    if section.vllm.quantization is not None:
        quantised = {"quant_method": section.vllm.quantization}  # while they are loaded
    a_token = _cache_bytes_of_token(model.config.get_text_config(), dtype_bytes=dtype_bytes)
    if section.engine == "vllm":  # which takes what is left of a device, and no more
        a_token = 0.0
    size = WriterSize(
        weight_bytes(model, quantised, dtype_bytes=dtype_bytes),
        min(section.batch_sequences, recipe.shard_prompts * recipe.samples),
        a_token * recipe.sequence_length,
    )

    # in words
    weights = f"{size_words(size.weight_bytes)} in {format_words(quantised, section.dtype)}"
    found.add("writer", f"{name}: {count_words(num_parameters)} parameters, {weights}")
    if size.bytes_of_sample:
        most = size_words(size.num_bytes - size.weight_bytes)
        words = f"keys and values of {size.side_by_side:,} samples side by side take up to {most}"
        found.add("", words)
    return size


def _cache_bytes_of_token(config: Any, *, dtype_bytes: int) -> float:
    """Of keys and values in all layers; 0 where the config does not name their sizes."""
    num_layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_attention_heads", None)
    num_heads = getattr(config, "num_key_value_heads", None) or heads
    hidden = getattr(config, "hidden_size", None)
    size = getattr(config, "head_dim", None) or (hidden // heads if hidden and heads else None)
    if not (num_layers and num_heads and size):
        return 0.0
    return float(2 * num_layers * num_heads * size * dtype_bytes)


def _samples(plan: Generation, found: Findings) -> None:
    recipe = plan.recipe
    num_samples = recipe.num_prompts * recipe.samples
    found.add(
        "samples",
        f"{recipe.samples:,} of each prompt, {num_samples:,} in all; temperature "
        f"{recipe.temperature:g}, top_p {recipe.top_p:g}",
        f"at most {count_words(num_samples * recipe.max_new_tokens)} tokens: up to "
        f"{recipe.max_new_tokens:,} each",
    )

    # what a server wants for them
    options = plan.config.writer.openai
    if options is None or not options.is_paid:
        return
    usd, limit = most_usd(options, recipe, plan.prompts.sources), options.max_cost_usd
    limited = "no limit (max_cost_usd)" if limit is None else f"max_cost_usd is {limit:g}"
    found.add("", f"they cost {usd:.4g} USD at most; {limited}")
    if limit is not None and usd > limit:
        found.notes.append(
            f"writer.openai.max_cost_usd is {limit:g}, and the samples may cost {usd:.4g} USD: "
            "where they come to more than the limit, generate ends before they are all written"
        )


def _store(plan: Generation, found: Findings) -> int:
    """What is there already, and a recipe that is nearly this one. Returns the shards that are
    there."""
    # what will be
    recipe, store = plan.recipe, plan.config.store
    a_sample = bytes_of_rollout(recipe.sequence_length, num_entries=recipe.top_logprobs)
    a_shard = recipe.shard_prompts * recipe.samples * a_sample
    present: set[int] = set()
    near: list[list[str]] = []

    # what is
    try:
        require_shareable(store.url)
        if is_begun(plan.store) and plan.store.has_recipe():
            present = plan.store.published()
        else:
            others = [each.recipe for each in find_rollouts(store.url)]
            near = [
                [f"of {each.fingerprint[:16]}", *rollout_differences(recipe, each)]
                for each in others
            ]
        directory = plan.store.blobs.directory
        reason = why_not_writable(directory) if directory is not None else None
        if reason is not None and len(present) < recipe.num_shards:
            found.obstacles.append(f"store.url: {reason}; name another place")
    except (StoreError, RecipeError) as error:
        found.obstacles.append(f"store.url: {error}")

    # in words
    found.add(
        "store",
        f"{store.url}/{plan.store.folder}" if not store.url.startswith("memory:") else store.url,
        f"{recipe.num_shards:,} shards of {recipe.shard_prompts:,} prompts, up to "
        f"{size_words(a_shard)} each; {len(present):,} are there already",
    )
    if len(present) == recipe.num_shards:
        found.add("", f'all are there: corpus.dataset = "rollouts://{recipe.fingerprint[:16]}"')
    nearest = min(near, key=len, default=[])
    if 0 < len(nearest) - 1 <= _MOST_DIFFERENCES:
        found.notes.append(
            f"the store has rollouts {nearest[0]}, which would serve but for these (this config's "
            "value first):\n" + bullets(nearest[1:], "    ")
        )
    return len(present)


def _graders(plan: Generation, found: Findings, *, num_present: int) -> None:
    """What each grader has graded, and whether it can be made on this machine."""
    label = "graders"
    if not plan.config.graders:
        found.add(label, "none: a run trains on the samples that end themselves")
    for each in standings(plan):
        found.add(label, f"{each.name}: has graded {each.num_graded:,} of {num_present:,} shards")
        label = ""
        if each.problem is not None:
            found.obstacles.append(f"grader {each.name}: {each.problem}")


def _cluster(plan: Generation, found: Findings, size: WriterSize | None) -> None:
    """The cluster, what writers need of it, and whether a writer fits on its device."""
    config, section = plan.config, plan.config.cluster
    found.obstacles += lacks(section)
    found.notes += remarks(section)

    # what there is, and what is missing
    writer = config.writer
    try:
        available = resources_for(section, writer)
        missing = shortages({"writers": (writer, writer.min_replicas)}, available)
        needs = needs_words(writer, available)
    except ConfigError as error:
        found.obstacles.append(str(error))
        return
    found.add(
        "cluster",
        cluster_words(section, available),
        f"writers: {replicas_words(writer)}, each with {needs}",
    )
    if size is not None:
        check_writer(writer, size, available, found, is_here=section.address is None)
    lower = "lower min_replicas, num_cpus or num_gpus (fractions share one)"
    tell_shortages(section, missing, found, lower=lower, store_url=config.store.url)


def _run_directory(plan: Generation, found: Findings) -> None:
    is_there = (plan.run_dir / "generate.json").exists()
    found.add("run", f"{plan.run_dir}: {'one to go on with' if is_there else 'new'}")
    try:
        require_writable(Path(plan.run_dir))
        require_same(plan)
    except (StoreError, RecipeError) as error:
        found.obstacles.append(f"--run-dir: {error}")
