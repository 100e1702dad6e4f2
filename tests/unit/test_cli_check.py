"""`check` says what a run makes and needs, and what would stop it; it loads no weights and writes
nothing."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.checkpoints import make as make_checkpoints
from helpers.command import Outcome, as_toml, stillhouse
from helpers.damage import read_only
from helpers.models import make_model
from helpers.world import TinyWorld, merged
from stillhouse.cli.check import describe
from stillhouse.config import TeacherSection
from stillhouse.errors import StoreError
from stillhouse.pipeline import Plan, train
from stillhouse.store import ChunkStore


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


Check = Callable[..., Outcome]


@pytest.fixture(scope="module")
def filled(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan whose chunks are all in its store."""
    plan = tiny_world.plan(
        Path("run"), store={"url": str(tmp_path_factory.mktemp("filled") / "store")}
    )
    tiny_world.fill_store(plan)
    return plan


@pytest.fixture
def check(tiny_world: TinyWorld, tmp_path: Path, cache: Path) -> Check:
    """Runs `stillhouse check` on the tiny world, with changes, in a run directory and a store that
    do not exist."""

    def run(**changes: dict[str, Any]) -> Outcome:
        config = tmp_path / "config.toml"
        values = merged(tiny_world.values, {"store": {"url": str(tmp_path / "store")}})
        config.write_text(as_toml(merged(values, changes)))
        return stillhouse("check", config, "--run-dir", tmp_path / "run", cache=cache)

    return run


def rows_of(outcome: Outcome) -> dict[str, str]:
    """What stands beside each label; lines without one belong to the label before."""
    rows: dict[str, str] = {}
    label = ""
    for line in outcome.out.splitlines():
        label = line[:11].strip() or label
        rows[label] = f"{rows.get(label, '')} {line[11:].strip()}".strip()
    return rows


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"lora": {"rank": 4}}, r"from its weights, 2,944 parameters are trained; .* at least"),
        ({"init": {"layers": [1]}}, "from some of its layers; .* at least"),
        ({"zero_stage": 2, "offload": "cpu"}, "from its weights; .* at least"),
    ],
)
def test_what_of_a_student_is_kept_and_trained_is_told_and_counted(
    check: Check, student: dict[str, Any], words: str
) -> None:
    def num_bytes(outcome: Outcome) -> float:
        return float(re.findall(r"at least ([\d.]+) kB a rank", outcome.out)[0])

    whole, part = check(), check(student=student)
    assert re.search(words, part.out)
    assert num_bytes(part) < 0.8 * num_bytes(whole)


def test_what_does_not_fit_on_a_gpu_is_told_with_what_it_would_take(check: Check) -> None:
    on_gpu = {"device": "cuda", "num_gpus": 1.0, "num_cpus": 0.25, "gpu_memory_gb": 1e-4}
    student = on_gpu | {"num_workers": 8, "zero_stage": 1}
    outcome = check(teacher=on_gpu, student=student, cluster={"num_cpus": 3})
    assert "a teacher's weights take" in rows_of(outcome)["memory"]
    notes = outcome.out.partition("note: a student rank's weights")[2]
    assert "zero_stage = 2" in notes
    assert "num_gpus = 2" in outcome.out
    roomy = rows_of(check(teacher=on_gpu, student=on_gpu | {"gpu_memory_gb": 24}))
    assert "of 24.0 GB (gpu_memory_gb): fits" in roomy["memory"]
    assert "ZeRO stage 1: the lowest that fits into 80% of 24 GB" in roomy["student"]


def test_a_teacher_on_vllm_is_divided_among_its_gpus(check: Check) -> None:
    on_gpu = {"device": "cuda", "num_gpus": 4.0, "num_cpus": 0.25, "engine": "vllm"}
    small = check(teacher=on_gpu | {"gpu_memory_gb": 24})
    row = rows_of(small)["memory"]
    assert "a teacher's weights, divided among 4 GPUs, take" in row
    assert "of 24.0 GB (gpu_memory_gb): fits" in row
    assert "are left for its cache" in row
    assert "has not been run on a GPU yet" in row
    large = check(teacher=on_gpu | {"gpu_memory_gb": 1e-6})
    assert "  - num_gpus = " in large.out


def test_the_weights_of_a_server_are_not_counted(
    tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tiny_world.plan(tmp_path / "run")
    served = {"engine": "openai", "openai": {"base_url": "http://10.0.0.5:8000/v1"}}
    teacher = TeacherSection.model_validate({"model": plan.config.teacher.model, **served})
    describe(replace(plan, config=plan.config.model_copy(update={"teacher": teacher})))
    told = capsys.readouterr().out
    assert "scored by the server at http://10.0.0.5:8000/v1" in " ".join(told.split())
    assert "student ranks on the CPU take" in " ".join(told.split())


def test_the_text_as_a_teacher_takes_neither_memory_nor_hours(check: Check) -> None:
    on_gpu = {"device": "cuda", "num_gpus": 1.0, "num_cpus": 0.25, "gpu_memory_gb": 24}
    outcome = check(
        teacher={"engine": "text"},
        target={"k": 1, "tail_draws": 0},
        student=on_gpu | {"divergence_weight": 0.0, "ce_weight": 1.0},
    )
    rows = rows_of(outcome)
    assert rows["teacher"].startswith("none: the target is the next token of the text")
    assert "teachers: 1, each with 0.25 CPU (on cpu)" in rows["cluster"]
    assert "; cross-entropy, learning rate" in rows["training"]
    assert "teacher" not in rows["memory"]
    assert rows["hours"].startswith("training minutes on 1 H100")
    assert "are 6 for training at 35%" in rows["hours"]


def test_what_runs_on_the_cpu_is_compared_with_the_memory_of_this_machine(check: Check) -> None:
    row = rows_of(check())["memory"]
    there = r"\((this machine|this process's limit)\): fits"
    assert re.search(rf"teachers and student ranks on the CPU take .* {there}", row)


def test_a_run_on_gpus_has_its_hours_estimated_and_is_told_how(check: Check) -> None:
    on_gpus = {"device": "cuda", "num_gpus": 1.0, "num_cpus": 0.25}
    rows = rows_of(
        check(teacher=on_gpus | {"max_replicas": 3}, student=on_gpus | {"num_workers": 2})
    )
    assert "on 3 H100" in rows["hours"]
    assert "on 2 H100" in rows["hours"]
    assert "6 for training" in rows["hours"]
    assert "989 TFLOP/s" in rows["hours"]
    assert "hours" not in rows_of(check())


def test_it_says_what_follows_from_the_config(check: Check, filled: Plan) -> None:
    outcome = check()
    assert outcome.code == 0, outcome
    rows, corpus, recipe = rows_of(outcome), filled.sources.train, filled.recipe
    assert f"the same {recipe.vocab_size} ids" in rows["tokenizer"]
    assert f"{corpus.num_sequences:,} sequences of 32 tokens" in rows["corpus"]
    assert f"{corpus.num_targets:,} of them with a target; 8 more are held out" in rows["corpus"]
    assert (
        f"k = 8, 12 draws from the tail, {recipe.spec.codec_name}: {recipe.spec.bytes_per_token} "
        "bytes each" in rows["targets"]
    )
    assert recipe.fingerprint[:16] in rows["store"]
    assert f"{len(filled.chunks)} chunks of 8 sequences" in rows["store"]
    assert "0 are there already" in rows["store"]
    assert "50 steps of 8 sequences: 12,800 tokens" in rows["training"]
    assert "0.25 CPU (on cpu)" in rows["cluster"]
    assert "Nothing stands in the way" in outcome.out


def test_it_says_how_many_draws_a_target_has(check: Check) -> None:
    rows = rows_of(check(target={"k": 0, "tail_draws": 5}))
    assert "k = 0, 5 draws from the tail, ef-sqrt8: 6 bytes each" in rows["targets"]


def test_it_says_where_draws_are_of_no_use(check: Check) -> None:
    assert (
        "jsd, which learns nothing from the 12 draws a token"
        in check(student={"divergence": "jsd"}).out
    )
    assert "learns nothing from" not in check().out


def test_it_says_what_one_bucket_asks_of_the_teacher_before_a_chunk_is_there(check: Check) -> None:
    outcome = check(student={"divergence": "jsd"})
    assert outcome.code == 0, outcome
    assert (
        "stops before its first step unless the kept entries hold 80% of the teacher's mass in "
        "the first batch" in outcome.out
    )
    assert (
        "stops before its first step"
        not in check(student={"divergence": "jsd", "tail_as_bucket": True}).out
    )
    forward = check(target={"tail_draws": 0})
    assert "forward_kl, which sees all but the 8 kept entries as one bucket" in forward.out
    assert "stops before its first step" not in forward.out


def test_it_says_where_weighted_draws_are_noisy_and_what_to_do(check: Check) -> None:
    weighted = {"weighted_draws": True, "tail_draws": 25}
    assert "forward_kl learns more from blind draws" in check(target=weighted).out
    fresh = {"divergence": "jsd", "init": "config"}
    small = check(target=weighted, student=fresh).out
    assert "set student.forward_kl_steps to about" in small
    assert "take 2,048, or where the teacher is sharp, entries alone" in small
    quiet = check(target=weighted, student={"divergence": "tvd"}).out
    assert "forward_kl_steps" not in quiet
    assert "take 2,048" not in quiet


def test_one_bucket_of_a_flat_teacher_is_an_obstacle_once_the_first_batch_shows_it(
    check: Check, filled: Plan, tmp_path: Path
) -> None:
    store = {"url": filled.config.store.url}
    refused = check(store=store, student={"divergence": "jsd"})
    assert refused.code == 2, refused
    assert "of the teacher's mass, wanted at least 80%" in refused.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml"]
    assert check(store=store, student={"divergence": "jsd", "tail_as_bucket": True}).code == 0
    assert check(store=store).code == 0
    make_checkpoints(tmp_path / "run" / "checkpoints" / "student", 10)
    # a training that has begun goes on
    assert check(store=store, student={"divergence": "jsd"}).code == 0


def test_the_bytes_that_it_promises_are_those_that_the_store_takes(filled: Plan) -> None:
    sizes = [path.stat().st_size for path in Path(filled.config.store.url).rglob("*.safetensors")]
    promised = filled.bytes_per_chunk * len(filled.chunks)
    assert promised <= sum(sizes) <= promised + 2048 * len(sizes)


def test_it_writes_nothing(check: Check, tmp_path: Path) -> None:
    check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml"]


def test_it_counts_the_chunks_that_are_there_already(check: Check, filled: Plan) -> None:
    outcome = check(store={"url": filled.config.store.url})
    assert f"{len(filled.chunks)} are there already" in rows_of(outcome)["store"]


def test_a_store_that_nearly_matches_is_named_with_the_fields_that_differ(
    check: Check, filled: Plan
) -> None:
    outcome = check(store={"url": filled.config.store.url}, target={"k": 5})
    assert outcome.code == 0, outcome
    assert f"the store has {filled.recipe.fingerprint[:16]}" in outcome.out
    assert "k (exact entries a token): 5 against 8" in outcome.out


def test_no_weight_is_read(check: Check, tmp_path: Path) -> None:
    make_model(tmp_path / "strange", vocab_size=300)
    # a whole file, and none of the model's weights
    save_file({"peat": torch.zeros(1)}, tmp_path / "strange" / "model.safetensors")
    outcome = check(
        teacher={"model": str(tmp_path / "strange")}, student={"model": str(tmp_path / "strange")}
    )
    assert outcome.code == 0, outcome
    assert "parameters" in rows_of(outcome)["teacher"]


def test_a_padded_head_is_fine_and_a_narrow_one_is_not(check: Check, tmp_path: Path) -> None:
    make_model(tmp_path / "padded", vocab_size=384, tokenizer_vocab_size=300)
    make_model(tmp_path / "narrow", vocab_size=299, tokenizer_vocab_size=300)
    padded = check(student={"model": str(tmp_path / "padded")})
    assert padded.code == 0, padded
    assert "padded by 84" in rows_of(padded)["student"]
    narrow = check(student={"model": str(tmp_path / "narrow")})
    assert narrow.code == 2
    assert "299 rows, fewer than the tokenizer's 300 ids" in narrow.err


def test_the_run_directory_of_another_run_is_refused_by_check_and_by_run(
    check: Check, filled: Plan, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(filled.config.model_dump_json())
    (run_dir / "recipe.json").write_bytes(filled.recipe.canonical_json())
    same = check()
    assert same.code == 0, same
    assert "a run to resume" in rows_of(same)["run"]
    other = check(target={"k": 5})
    assert other.code == 2
    assert f"{run_dir} belongs to another run" in other.err
    assert "target.k: 8 -> 5" in other.err
    assert "name another --run-dir" in other.err
    refused = stillhouse("run", tmp_path / "config.toml", "--run-dir", run_dir)
    assert refused.code == 2
    assert "target.k: 8 -> 5" in refused.err


def test_what_is_unwise_is_noted_and_stops_nothing(check: Check) -> None:
    student, teacher = {"warmup_steps": 50, "global_batch_sequences": 6}, {"max_replicas": 20}
    outcome = check(
        student=student, teacher=teacher, corpus={"sequence_length": 513}, cluster={"num_cpus": 3}
    )
    assert outcome.code == 0, outcome
    notes = [line for line in outcome.out.splitlines() if line.startswith("note: ")]
    for words in (
        "never reaches its peak",
        "masked rows",
        "made for 512 positions",
        "10 fit beside the student",
    ):
        assert any(words in note for note in notes), words


def test_a_store_of_which_nothing_is_known_stays_as_it_was(check: Check, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    check()
    assert list((tmp_path / "store").iterdir()) == []


def test_every_obstacle_is_named_at_once(check: Check, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = check(student={"num_cpus": 1000}, store={"url": str(tmp_path / "file" / "store")})
    assert outcome.code == 2
    assert "CPU: 1000.25 needed" in outcome.err
    assert "is a file" in outcome.err


def test_a_store_that_is_a_file_is_named_once(check: Check, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = check(store={"url": str(tmp_path / "file")})
    assert outcome.code == 2
    assert f"store.url: {tmp_path}/file is a file; name another place" in outcome.err


def test_a_store_that_may_only_be_read_is_no_obstacle_once_all_its_chunks_are_there(
    check: Check, filled: Plan, tmp_path: Path
) -> None:
    with read_only(Path(filled.config.store.url), at=tmp_path / "seen") as seen:
        outcome = check(store={"url": str(seen)})
        assert outcome.code == 0, outcome
        assert "note: nothing can be written in" in outcome.out
        assert "`stillhouse train` reads them" in outcome.out
        incomplete = check(store={"url": str(seen)}, target={"k": 5})
    assert incomplete.code == 2
    assert "store.url: nothing can be written in" in incomplete.err


def test_a_run_directory_with_a_name_that_no_file_system_takes_is_a_mistake(
    check: Check, tmp_path: Path, cache: Path
) -> None:
    check()
    outcome = stillhouse(
        "check", tmp_path / "config.toml", "--run-dir", tmp_path / ("x" * 256), cache=cache
    )
    assert outcome.code == 2, outcome
    assert "longer than the 255 bytes" in outcome.err


def test_a_window_smaller_than_the_shuffle_needs_is_noted(check: Check, filled: Plan) -> None:
    outcome = check(store={"window_bytes": 100}, student={"max_steps": 1000})
    assert "less than a student may need for one step" in outcome.out
    assert ChunkStore(filled.config.store.url, filled.recipe).published() == set(filled.chunks)


def test_a_placement_that_contradicts_itself_is_an_obstacle_like_any_other(check: Check) -> None:
    outcome = check(teacher={"device": "cpu", "num_gpus": 1})
    assert outcome.code == 2
    assert "num_gpus is 1" in outcome.err
    assert "sequences of 32 tokens" in outcome.out


def test_exact_and_fast_logits_of_a_narrow_teacher_are_different_targets(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    def fingerprint(**teacher: str) -> str:
        return tiny_world.plan(tmp_path / "run", teacher=teacher).recipe.fingerprint

    assert (
        fingerprint(dtype="bfloat16")
        == fingerprint(dtype="bfloat16", logits="exact")
        != fingerprint(dtype="bfloat16", logits="fast")
    )
    assert fingerprint(dtype="float32", logits="exact") == fingerprint(
        dtype="float32", logits="fast"
    )


def test_training_alone_counts_a_chunk_that_was_cut_short_as_missing_and_says_who_makes_it(
    filled: Plan, tmp_path: Path
) -> None:
    store = ChunkStore(filled.config.store.url, filled.recipe)
    path = Path(store.url) / store.key(filled.chunks[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    try:
        with pytest.raises(
            StoreError,
            match=rf"^1 of {len(filled.chunks)} chunks are not in .*; `stillhouse produce` makes "
            r"them",
        ):
            train(replace(filled, run_dir=tmp_path / "run"))
    finally:
        path.write_bytes(whole)
