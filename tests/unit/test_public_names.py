"""The public names: which there are, their signatures, and that each works whatever was imported
before. tests/e2e/test_examples.py calls those that need a cluster."""

import ast
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import stillhouse
from helpers.world import TinyWorld, item_with_tokens
from stillhouse.cli.reference import signature_of
from stillhouse.store import Chunk

# A change here is a change for every user: it belongs into CHANGELOG.md.
SIGNATURES = {
    "ChunkStore": "(root: str | Blobs, recipe: Recipe)",
    "CompressedLogits": "(token_ids_TK: Tensor, logprobs_TK: Tensor, tail_logmass_T: Tensor, "
    "tail_ids_TN: Tensor, vocab_size: int, temperature: float = 1.0, *, "
    "draw_logprobs_TN: Tensor | None = None, label_logprob_T: Tensor | None = None, "
    "tail_entropy_T: Tensor | None = None)",
    "Divergence": "(of: Callable[[Tensor, Tensor], Tensor], forward_kl_share: float = 0.0, "
    "generator: Callable[[Tensor], Tensor] | None = None)",
    "Head": "(weight_VH: Tensor, bias_V: Tensor | None = None, scale: float = 1.0, "
    "softcap: float | None = None, float32_logits: bool = False)",
    "Recipe": "(*, corpus_digest: str, num_sequences: int, sequence_length: int, packing: str, "
    "chunk_sequences: int, tokenizer_digest: str, vocab_size: int, teacher_digest: str, "
    "teacher_dtype: str, k: int, num_draws: int = 0, temperature: float = 1.0, "
    "value_bits: int = 8, weighted: bool = False, label_logprob: bool = False, "
    "tail_entropy: bool = False, source_kind: str = 'corpus', teacher_kind: str = 'weights', "
    "format: int = 2)",
    "RunError": "",
    "StillhouseError": "",
    "TargetSpec": "(vocab_size: int, k: int, *, num_draws: int = 0, value_bits: int = 8, "
    "temperature: float = 1.0, weighted: bool = False, label_logprob: bool = False, "
    "tail_entropy: bool = False)",
    "UserError": "",
    "compress": "(logits_TV: Tensor, spec: TargetSpec, *, seeds_T: Tensor | None = None, "
    "labels_T: Tensor | None = None) -> CompressedLogits",
    "compress_hidden": "(hidden_TH: Tensor, head: Head, *, spec: TargetSpec, "
    "seeds_T: Tensor | None = None, labels_T: Tensor | None = None, block_tokens: int = 1024, "
    "overlap: bool = False) -> CompressedLogits",
    "decode": "(records_TB: Tensor, spec: TargetSpec) -> CompressedLogits",
    "densify": "(compressed: CompressedLogits) -> Tensor",
    "distillation_loss": "(hidden_TH: Tensor, head: Head, target: CompressedLogits | None = None, "
    "*, divergence: Divergence = forward_kl, labels_T: Tensor | None = None, "
    "divergence_weight: float = 1.0, ce_weight: float = 0.0, z_loss_weight: float = 0.0, "
    "block_tokens: int | None = None) -> LossTerms",
    "divergence_named": "(name: str, mix: float = 0.5) -> Divergence",
    "encode": "(compressed: CompressedLogits, spec: TargetSpec) -> Tensor",
    "evaluate": "(run: Plan | str | Path) -> dict[ModelName, Scores]",
    "export": "(run: Plan | str | Path, out: str | Path, *, best: bool = False, "
    "adapter: bool = False) -> int",
    "list_recipes": "(url: str) -> list[StoredRecipe]",
    "load_config": "(paths: str | Path | Iterable[str | Path], "
    "overrides: str | Iterable[str] = ()) -> Config",
    "plan": "(config: Config, *, run_dir: str | Path, cache_dir: str | Path | None = None) -> Plan",
    "produce": "(plan: Plan) -> None",
    "push": "(run: Plan | str | Path, name: str, *, private: bool = False) -> str",
    "run": "(plan: Plan) -> dict[ModelName, Scores]",
    "train": "(plan: Plan) -> dict[ModelName, Scores]",
}

LIGHT = """
import sys
import stillhouse

dir(stillhouse), stillhouse.load_config, stillhouse.plan, stillhouse.UserError
heavy = {"torch", "ray", "deepspeed", "transformers", "datasets", "wandb", "matplotlib", "obstore",
         "numpy", "typer"} & set(sys.modules)
sys.exit(f"loaded: {heavy}" if heavy else 0)
"""


@pytest.fixture(autouse=True, scope="module")
def everything_imported() -> None:
    """Every module of the package: none may take the place of a public name."""
    for module in pkgutil.walk_packages(stillhouse.__path__, "stillhouse."):
        if not module.name.endswith("__main__"):
            import_module(module.name)


def on_one_line(signature: str) -> str:
    return re.sub(r",? \)", ")", " ".join(signature.split())).replace("( ", "(")


def test_the_public_names_and_signatures_are_these() -> None:
    assert sorted(SIGNATURES) == sorted(stillhouse.__all__)
    found = {
        name: on_one_line(signature_of(getattr(stillhouse, name))) for name in stillhouse.__all__
    }
    assert found == SIGNATURES


def test_every_name_is_listed_and_no_other_is_found() -> None:
    assert set(stillhouse.__all__) <= set(dir(stillhouse))
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        stillhouse.distil  # type: ignore[attr-defined] # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    command = [sys.executable, "-c", LIGHT]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_a_target_goes_through_every_form_and_teaches() -> None:
    random = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(5, 4, generator=random)
    head = stillhouse.Head(torch.randn(30, 4, generator=random))
    spec = stillhouse.TargetSpec(30, 3)
    target = stillhouse.compress(head.logits(hidden_TH), spec)
    from_hidden = stillhouse.compress_hidden(hidden_TH, head, spec=spec)
    assert isinstance(target, stillhouse.CompressedLogits)
    assert torch.equal(target.token_ids_TK, from_hidden.token_ids_TK)
    records_TB = stillhouse.encode(target, spec)
    assert records_TB.shape == (5, spec.bytes_per_token)
    decoded = stillhouse.densify(stillhouse.decode(records_TB, spec))
    torch.testing.assert_close(decoded.exp().sum(1), torch.ones(5))

    weight_VH = torch.zeros(30, 4, requires_grad=True)
    for divergence in (
        stillhouse.divergence_named("jsd", 0.5),
        stillhouse.Divergence(lambda logp_TK1, logq_TK1: (logp_TK1 - logq_TK1).square().sum(-1)),
    ):
        terms = stillhouse.distillation_loss(
            hidden_TH, stillhouse.Head(weight_VH), target, divergence=divergence
        )
        terms.total.backward()
        assert weight_VH.grad is not None
        assert weight_VH.grad.abs().sum() > 0


def test_a_run_is_planned_and_its_store_read(tiny_world: TinyWorld, tmp_path: Path) -> None:
    plan = stillhouse.plan(
        tiny_world.config(store={"url": str(tmp_path / "store")}),
        run_dir=tmp_path / "run",
        cache_dir=tiny_world.folder / "cache",
    )
    assert isinstance(plan.recipe, stillhouse.Recipe)
    assert stillhouse.list_recipes(str(tmp_path / "store")) == []
    store = stillhouse.ChunkStore.create(str(tmp_path / "store"), plan.recipe)
    sequences = item_with_tokens(plan, 0).sequences
    num_targets = int(sequences.loss_mask_SL.sum())
    spec = plan.recipe.spec
    assert isinstance(spec, stillhouse.TargetSpec)
    logits_TV = torch.randn(num_targets, plan.recipe.vocab_size)
    target = stillhouse.compress(logits_TV, spec, seeds_T=torch.arange(num_targets))
    store.publish(Chunk(0, sequences, stillhouse.encode(target, spec).numpy()))
    (stored,) = stillhouse.list_recipes(str(tmp_path / "store"))
    assert (stored.recipe, stored.num_chunks) == (plan.recipe, 1)
    assert stillhouse.ChunkStore(str(tmp_path / "store"), plan.recipe).published() == {0}


def test_what_cannot_be_used_raises_an_error_before_a_cluster_starts(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    with pytest.raises(stillhouse.UserError, match="no directory /nowhere/teacher"):
        stillhouse.plan(
            tiny_world.config(teacher={"model": "/nowhere/teacher"}), run_dir=tmp_path / "run"
        )
    in_memory = tiny_world.plan(tmp_path / "run", store={"url": "memory:///store"})
    for fill in (stillhouse.run, stillhouse.produce):
        with pytest.raises(stillhouse.UserError, match="cannot be shared between processes"):
            fill(in_memory)
    with pytest.raises(stillhouse.UserError, match="stillhouse produce"):
        stillhouse.train(tiny_world.plan(tmp_path / "run", store={"url": str(tmp_path / "empty")}))
    for use in (stillhouse.evaluate, lambda run: stillhouse.export(run, tmp_path / "out")):
        with pytest.raises(stillhouse.UserError, match="is not a run directory"):
            use(tmp_path / "absent")


def test_a_type_checker_sees_the_names_that_there_are() -> None:
    """Each name is imported from the same module for type checkers as it is at run time."""
    package = Path(stillhouse.__file__)
    assert (package.parent / "py.typed").exists()
    (block,) = (
        node
        for node in ast.parse(package.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.asname or alias.name: getattr(import_module(node.module), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    assert seen == {name: getattr(stillhouse, name) for name in stillhouse.__all__}
