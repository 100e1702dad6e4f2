"""A teacher's targets are those of its model's own logits, document by document, however the work
is cut; and replicas must agree.

Shapes: S sequences, L positions, T target tokens, V vocabulary.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.chunks import make_chunk, small_recipe
from helpers.models import make_model
from stillhouse.config import TeacherSection
from stillhouse.engines.base import draw_seeds, probe_item
from stillhouse.engines.probe import Probe, mean_kl, require_same_teacher
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.errors import ConfigError, ModelError, TeacherError
from stillhouse.logits import CompressedLogits, TargetSpec, backend_for, compress, concatenate
from stillhouse.models.sources import unusable
from stillhouse.sequence import WorkItem
from stillhouse.store import Recipe

RECIPE = small_recipe(num_sequences=5, sequence_length=24, chunk_sequences=5, temperature=1.5, k=6)
CAP = 2.0
ARCHITECTURES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": CAP, "sliding_window": 8, "query_pre_attn_scalar": 16},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def section(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TeacherSection:
    """A tied model whose head is 20 rows wider than the tokenizer; the weights are large enough for
    gemma's cap to bite."""
    folder = make_model(
        tmp_path_factory.mktemp(request.param),
        architecture=request.param,
        vocab_size=RECIPE.vocab_size + 20,
        tokenizer_vocab_size=RECIPE.vocab_size,
        weight_std=0.4,
        config=ARCHITECTURES[request.param],
    )
    return TeacherSection(model=str(folder), dtype="float32", batch_sequences=2, block_tokens=16)


def packed_item() -> WorkItem:
    chunk = make_chunk(RECIPE)
    assert (chunk.sequences.positions_SL[:, 1:] == 0).sum() > 5  # documents start within the rows
    return WorkItem(0, chunk.sequences)


def targets_of(section: TeacherSection, recipe: Recipe, item: WorkItem) -> CompressedLogits:
    return concatenate(TransformersEngine(section, recipe, device="cpu").targets(item))


@torch.inference_mode()
def each_document_alone(section: TeacherSection, item: WorkItem) -> CompressedLogits:
    """The model's own logits of one document after the other, each in a call of its own, at the
    masked-in positions."""
    model = AutoModelForCausalLM.from_pretrained(section.model, dtype=torch.float32).eval()
    parts = []
    for ids_L, positions_L, mask_L in zip(
        item.sequences.token_ids_SL,
        item.sequences.positions_SL,
        item.sequences.loss_mask_SL,
        strict=True,
    ):
        starts = [*np.flatnonzero(positions_L == 0), len(ids_L)]
        for start, stop in itertools.pairwise(starts):
            logits_LV = model(torch.from_numpy(ids_L[start:stop].astype(np.int64))[None]).logits[
                0, :, : RECIPE.vocab_size
            ]
            wanted = torch.from_numpy(mask_L[start:stop] == 1)
            parts.append(
                compress(
                    logits_LV[wanted],
                    TargetSpec(logits_LV.shape[1], RECIPE.k, temperature=RECIPE.temperature),
                )
            )
    return concatenate(parts)


def assert_same(found: CompressedLogits, wanted: CompressedLogits) -> None:
    assert found.num_tokens == wanted.num_tokens > 0
    assert torch.equal(found.token_ids_TK, wanted.token_ids_TK)
    torch.testing.assert_close(found.logprobs_TK, wanted.logprobs_TK, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.tail_logmass_T, wanted.tail_logmass_T, rtol=0, atol=2e-4)


def test_targets_are_those_of_each_document_alone(section: TeacherSection) -> None:
    item = packed_item()
    alone = each_document_alone(section, item)
    assert alone.num_tokens == item.sequences.num_targets
    found = targets_of(section, RECIPE, item)
    assert (found.vocab_size, found.temperature, found.k, found.num_draws) == (300, 1.5, 6, 0)
    assert_same(found, alone)


def test_the_soft_cap_of_gemma_bites(section: TeacherSection) -> None:
    """Or the tests here would not see it forgotten. Logits that differ by 2 CAP at most leave no
    token a large probability."""
    found = targets_of(section, RECIPE, packed_item())
    capped = (
        float(found.logprobs_TK.max()) <= -np.log(RECIPE.vocab_size) + 2 * CAP / RECIPE.temperature
    )
    assert capped == ("gemma2" in section.model)


def test_a_bfloat16_teachers_exact_logits_are_not_rounded_and_its_fast_ones_are(
    section: TeacherSection,
) -> None:
    def distinct_values(logits: str) -> int:
        narrow = section.model_copy(update={"dtype": "bfloat16", "logits": logits})
        drops = targets_of(narrow, RECIPE, packed_item()).logprobs_TK.diff(dim=1)
        return len(drops.unique())

    assert distinct_values("exact") > 2 * distinct_values("fast")


@pytest.mark.parametrize(("batch_sequences", "block_tokens"), [(1, 1), (3, 7), (8, 1024)])
def test_batches_and_blocks_change_nothing(
    section: TeacherSection, batch_sequences: int, block_tokens: int
) -> None:
    cut = section.model_copy(
        update={"batch_sequences": batch_sequences, "block_tokens": block_tokens}
    )
    whole = section.model_copy(update={"batch_sequences": 5, "block_tokens": 4096})
    item = packed_item()
    assert_same(targets_of(cut, RECIPE, item), targets_of(whole, RECIPE, item))


DRAWN = replace(RECIPE, num_draws=9)


def test_draws_belong_to_the_place_in_the_corpus_whatever_the_batches_and_blocks(
    section: TeacherSection,
) -> None:
    item = packed_item()
    teacher = TransformersEngine(section, DRAWN, device="cpu")
    found = concatenate(teacher.targets(item))
    assert (found.k, found.num_draws, found.num_tokens) == (6, 9, item.sequences.num_targets)
    assert torch.equal(concatenate(teacher.targets(item)).tail_ids_TN, found.tail_ids_TN)
    cut = section.model_copy(update={"batch_sequences": 3, "block_tokens": 7})
    again = targets_of(cut, DRAWN, item)
    assert (
        again.tail_ids_TN != found.tail_ids_TN
    ).float().mean() < 0.01  # a rounding of the logits may move a draw by an id
    assert_same(found, targets_of(section, RECIPE, item))
    assert teacher.probe().answer.num_draws == 0


def test_no_two_places_of_a_corpus_and_no_two_recipes_share_their_draws(
    section: TeacherSection,
) -> None:
    item = packed_item()
    found = targets_of(section, DRAWN, item).tail_ids_TN
    for number, recipe in ((1, DRAWN), (0, replace(DRAWN, corpus_digest="sha256:another"))):
        other = targets_of(section, recipe, replace(item, number=number)).tail_ids_TN
        assert (other != found).float().mean() > 0.5
    seeds = [
        draw_seeds(replace(item, number=number), replace(DRAWN, num_sequences=10))
        for number in (0, 1)
    ]
    assert torch.cat(seeds).unique().numel() == 10 * 24
    longer = replace(DRAWN, chunk_sequences=10, num_sequences=10)
    assert not torch.equal(draw_seeds(item, longer), seeds[0])  # another recipe


def test_each_forward_pass_gives_its_own_targets_before_the_next_one_begins(
    section: TeacherSection,
) -> None:
    item = packed_item()
    parts = TransformersEngine(section, RECIPE, device="cpu").targets(item)
    # ids that no forward pass survives
    item.sequences.token_ids_SL[2:] = RECIPE.vocab_size + 1_000_000
    assert next(parts).num_tokens == item.sequences.loss_mask_SL[:2].sum()
    with pytest.raises(IndexError):
        next(parts)


def test_an_item_without_a_target_has_no_targets(section: TeacherSection) -> None:
    item = packed_item().without(range(5))
    assert targets_of(section, RECIPE, item).num_tokens == 0


def test_a_head_with_too_few_rows_is_refused_before_any_work(section: TeacherSection) -> None:
    with pytest.raises(ModelError, match="320 rows, fewer than the tokenizer's 400 ids"):
        TransformersEngine(section, replace(RECIPE, vocab_size=400), device="cpu")


SEVERAL = r'in \[teacher\] write engine = "vllm" and num_gpus = {}, .*; or pipeline = true and '


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_gpus": 4}, "num_gpus is 4, .* computes on one GPU: .*" + SEVERAL.format(4)),
        ({"num_gpus": 1.5}, "num_gpus is 1.5, .*" + SEVERAL.format(2)),
        ({"pipeline": True}, "teacher.pipeline is true, but num_gpus is 1; set num_gpus to the"),
        ({"num_gpus": 2, "pipeline": True, "compile": True}, "leave one of them out"),
    ],
)
def test_gpus_that_it_would_not_use_are_refused_from_the_config_alone(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        TransformersEngine.describe(TeacherSection(model="absent", **settings))
    for possible in ({"num_gpus": 4, "pipeline": True}, {"num_gpus": 1}, {"num_gpus": 0.5}, {}):
        TransformersEngine.describe(TeacherSection.model_validate({"model": "absent"} | possible))


def test_a_teacher_that_fits_on_no_gpu_is_told_what_to_write_for_several() -> None:
    error = unusable("model", "a-lab/large", torch.OutOfMemoryError("out of memory"))
    assert re.search("narrower dtype; or " + SEVERAL.format(2), str(error))


@pytest.mark.parametrize("length", [2, 24, 500])
def test_the_probe_is_the_same_for_every_replica_and_fits_the_recipe(length: int) -> None:
    recipe = replace(RECIPE, sequence_length=length)
    item, again = probe_item(recipe), probe_item(recipe)
    assert item.sequences.token_ids_SL.shape == (1, min(length, 64))
    assert item.sequences.num_targets == min(length, 64) - 1
    assert (
        0
        <= item.sequences.token_ids_SL.min()
        <= item.sequences.token_ids_SL.max()
        < recipe.vocab_size
    )
    for field in ("token_ids_SL", "positions_SL", "loss_mask_SL"):
        assert np.array_equal(getattr(item.sequences, field), getattr(again.sequences, field))


BF16: dict[str, Any] = {"dtype": "bfloat16"}


def probe_of(section: TeacherSection, recipe: Recipe = RECIPE, **changes: Any) -> Probe:
    return TransformersEngine(section.model_copy(update=changes), recipe, device="cpu").probe()


def with_weights(
    section: TeacherSection, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> TeacherSection:
    """The same model with other weights."""
    AutoModelForCausalLM.from_pretrained(section.model, dtype=torch.float32).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: change(name, weight) for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return section.model_copy(update={"model": str(folder)})


def scaled(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight * 1.01 if name == "model.layers.1.mlp.down_proj.weight" else weight


def of_another_seed(name: str, weight: torch.Tensor) -> torch.Tensor:
    return (
        weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
        if weight.ndim == 2
        else weight
    )


class SumsInAnotherOrder(torch.overrides.TorchFunctionMode):
    """Matrix products as another GPU's kernels may make them: the second half of the inner
    dimension first, each half rounded."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not torch.nn.functional.linear:
            return function(*args, **(kwargs or {}))
        given, weight, *bias = args
        half = weight.shape[1] // 2
        late, early = (
            torch.matmul(given[..., part], weight[:, part].T)
            for part in (slice(half, None), slice(half))
        )
        return sum([late + early, *(each for each in bias if each is not None)])


def test_replicas_of_the_same_weights_agree(section: TeacherSection) -> None:
    first = probe_of(section)
    require_same_teacher(first, probe_of(section), replica=1)
    require_same_teacher(first, probe_of(section, block_tokens=5), replica=1)


def test_replicas_whose_bfloat16_products_sum_in_another_order_agree(
    section: TeacherSection,
) -> None:
    """Also where that alone moves their answers by more than any difference of weights that
    matters."""
    first = probe_of(section, **BF16)
    with SumsInAnotherOrder():
        other = probe_of(section, **BF16)
    assert mean_kl(first.answer, other.answer) > 1e-5  # the order did something
    require_same_teacher(first, other, replica=1)
    assert mean_kl(first.answer, other.answer) <= 2 * first.rounding_kl


def test_the_rounding_that_a_replica_measures_covers_all_that_its_number_format_does(
    section: TeacherSection,
) -> None:
    narrow, wide = probe_of(section, **BF16), probe_of(section)
    assert mean_kl(wide.answer, narrow.answer) <= 2 * narrow.rounding_kl
    assert abs(wide.rounding_kl) < 1e-7
    # nor does it excuse anything: models of other weights are 1.7 and 3.4 nats apart
    assert narrow.rounding_kl < 0.03


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", [scaled, of_another_seed])
def test_a_replica_of_other_weights_is_named_with_a_parameter_in_every_number_format(
    section: TeacherSection,
    tmp_path: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    dtype: str,
) -> None:
    other = probe_of(with_weights(section, tmp_path, change), dtype=dtype)
    name = (
        r"1 of \d+ parameters differ, the first of them model.layers.1.mlp.down_proj.weight"
        if change is scaled
        else "parameters differ"
    )
    with pytest.raises(
        TeacherError, match=f"teacher replica 7 has other weights than the first: .*{name}"
    ):
        require_same_teacher(probe_of(section, dtype=dtype), other, replica=7)


def test_a_parameter_that_only_one_replica_has_is_not_compared(section: TeacherSection) -> None:
    first = probe_of(section)
    names = list(first.weight_hashes)
    require_same_teacher(
        first,
        replace(first, weight_hashes={name: first.weight_hashes[name] for name in names[1:]}),
        replica=1,
    )


@pytest.mark.parametrize("k", [1, 6, 300])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", "1e-04"), ("bfloat16", r"\de-0\d")])
def test_a_replica_that_computes_otherwise_is_named_whatever_the_recipe_keeps(
    section: TeacherSection, tmp_path: Path, k: int, dtype: str, limit: str
) -> None:
    recipe = replace(RECIPE, k=k)
    first, other = (
        probe_of(section, recipe, dtype=dtype),
        probe_of(with_weights(section, tmp_path, of_another_seed), recipe, dtype=dtype),
    )
    miscalculating = replace(first, answer=other.answer)
    with pytest.raises(
        TeacherError,
        match=r"teacher replica 7 disagrees with the first .* mean KL \d\.\d\de[-+]\d\d nats, "
        rf"wanted at most {limit},",
    ):
        require_same_teacher(first, miscalculating, replica=7)


def test_a_replica_that_answers_with_not_a_number_is_refused(section: TeacherSection) -> None:
    first = probe_of(section)
    nan = {
        name: getattr(first.answer, name) * torch.nan for name in ("tail_logmass_T", "logprobs_TK")
    }
    broken = replace(first, answer=replace(first.answer, **nan), rounding_kl=torch.nan)
    for one, other in ((first, broken), (broken, first), (broken, broken)):
        with pytest.raises(TeacherError, match="teacher replica 2 disagrees"):
            require_same_teacher(one, other, replica=2)


def test_a_probe_leaves_the_model_as_it_was(section: TeacherSection) -> None:
    teacher, item = TransformersEngine(section, RECIPE, device="cpu"), packed_item()
    before = concatenate(teacher.targets(item))
    teacher.probe()
    assert torch.equal(concatenate(teacher.targets(item)).logprobs_TK, before.logprobs_TK)


def test_a_teacher_names_the_path_of_its_logits(section: TeacherSection) -> None:
    assert TransformersEngine(section, RECIPE, device="cpu").backend() == backend_for(
        torch.zeros(1, RECIPE.vocab_size), k=RECIPE.k
    )
