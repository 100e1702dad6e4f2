"""The account of a corpus that a model wrote: each sample is counted once, and the samples that are
shown are the same whoever reads them, in whatever order."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.models import make_tokenizer
from helpers.rollouts import make_shard, small_rollout_recipe
from stillhouse.config import CorpusSection
from stillhouse.models.tokenizers import vocabulary_digest
from stillhouse.sequences.packing import prepare_corpus
from stillhouse.store.grader_names import claim_name
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import CUT, ENDED, SET_ASIDE
from stillhouse.store.verdicts import grader_name, put_verdict, verdict_key
from stillhouse.tracking.samples import Grading, SampleAccount

GRADER = {"kind": "number"}
SCORES = [0.0, 0.35, 1.0]  # of the samples of each prompt


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.fixture
def store(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> RolloutStore:
    """Twenty prompts, of each of which the last sample of three has score 1, and one of the others
    is cut."""
    recipe = small_rollout_recipe(
        vocabulary_digest=vocabulary_digest(tokenizer), num_prompts=20, samples=3
    )
    store = RolloutStore.create(str(tmp_path / "store"), recipe)
    claim_name(store.blobs, recipe.fingerprint, name="number", grader=GRADER)
    for number in range(recipe.num_shards):
        shard = make_shard(recipe, number)
        shard.finish_S[shard.samples_S == 2] = ENDED
        shard.finish_S[shard.prompts_S == 3] = SET_ASIDE
        store.publish(shard)
        scores = SCORES * len(recipe.shard_rows(number))
        put_verdict(store.blobs, recipe.fingerprint, number=number, grader=GRADER, scores=scores)
    return store


def account_of(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, cache: Path, **settings: Any
) -> SampleAccount:
    values = {
        "dataset": f"rollouts://{store.recipe.fingerprint[:16]}",
        "sequence_length": 12,
        "heldout_sequences": 5,
        "packing": False,
    }
    section = CorpusSection.model_validate(values | settings).in_store(store.url)
    split = prepare_corpus(section, tokenizer, tokenizer_digest="digest", cache_dir=cache)
    assert split.account.samples is not None
    return split.account.samples


def test_each_sample_is_counted_once_by_how_it_ended_its_reason_and_its_score(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shards = [store.fetch(number) for number in range(store.recipe.num_shards)]
    accept = {"min_score": {"number": 0.5}}
    for _ in ("made", "found"):
        account = account_of(store, tokenizer, tmp_path / "cache", accept=accept)
        counts = [
            sum(int((shard.finish_S == finish).sum()) for shard in shards)
            for finish in (ENDED, CUT, SET_ASIDE)
        ]
        assert [account.num_ended, account.num_cut, account.num_set_aside] == counts
        assert (account.num_prompts, account.num_samples) == (20, 60)
        assert account.num_tokens == sum(shard.sequences.num_targets for shard in shards)
        assert account.num_kept == 19
        assert account.drops == {
            "samples: below the least score of number": 19,
            "samples: cut at the longest length": 19,
            "samples: set aside by its writer": 3,
        }
        tenths, found = (20, 0, 0, 20, 0, 0, 0, 0, 0, 20), account.gradings["number"]
        assert found == Grading(60, found.mean_score, 20, tenths)
        assert found.mean_score == pytest.approx(sum(SCORES) / 3)


def test_the_samples_that_are_shown_do_not_depend_on_the_order_in_which_they_are_read(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    accept = {"min_score": {"number": 0.5}}
    one, other = (
        account_of(store, tokenizer, tmp_path / "cache", accept=accept, seed=seed)
        for seed in (0, 1)
    )
    assert (one.kept, one.dropped) == (other.kept, other.dropped)

    # different prompts, whose other samples stand beside them, and each reason
    kept = [each.prompt_number for each in one.kept]
    assert len({*kept}) == 4
    assert {each.prompt_number for each in one.dropped if each.finish != "set aside"} <= {*kept}
    assert {each.reason for each in one.dropped} == {*one.drops}
    assert {each.reason for each in one.kept} == {None}


def test_a_sample_is_shown_as_its_prompt_and_its_text(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    account = account_of(store, tokenizer, tmp_path / "cache")
    shown = account.kept[0]
    shard = store.fetch(shown.prompt_number // store.recipe.shard_prompts)
    row = shown.prompt_number % store.recipe.shard_prompts * 3 + shown.sample_number
    ids, sampled = shard.ids(row).tolist(), shard.sampled_ids(row).tolist()
    assert shown.prompt + shown.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert shown.text == tokenizer.decode(sampled, skip_special_tokens=True)
    assert shown.prompt
    assert shown.scores == {"number": SCORES[shown.sample_number]}
    aside = next(each for each in account.dropped if each.finish == "set aside")
    assert (aside.prompt, aside.text) == ("", "")


def test_a_long_text_is_shown_with_its_beginning_and_its_end(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    recipe = small_rollout_recipe(
        vocabulary_digest=vocabulary_digest(tokenizer),
        num_prompts=2,
        sequence_length=3000,
        max_new_tokens=2900,
    )
    store = RolloutStore.create(str(tmp_path / "store"), recipe)
    store.publish(make_shard(recipe, 0))
    account = account_of(store, tokenizer, tmp_path, sequence_length=3000, heldout_sequences=1)
    text, shard = account.kept[0].text, store.fetch(0)
    ids = shard.sampled_ids(2 * account.kept[0].prompt_number).tolist()
    whole = str(tokenizer.decode(ids, skip_special_tokens=True))
    begin, _, rest = text.partition("\n[... ")
    left_out, _, end = rest.partition(" characters left out ...]\n")
    assert whole.startswith(begin)
    assert whole.endswith(end)
    assert len(begin) + int(left_out.replace(",", "")) + len(end) == len(whole)


def test_a_damaged_verdict_that_no_rule_needs_counts_as_absent(
    store: RolloutStore, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    key = verdict_key(store.recipe.fingerprint, grader_name(GRADER), 4)
    (Path(store.url) / key).write_bytes(b"{}")
    account = account_of(store, tokenizer, tmp_path / "cache")
    assert account.gradings["number"].num_samples == 54
    name = next((Path(store.url) / store.folder / "graders").iterdir())
    name.write_bytes(b"{}")
    assert account_of(store, tokenizer, tmp_path / "cache", seed=1).gradings == {}
