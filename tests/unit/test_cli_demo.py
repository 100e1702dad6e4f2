"""The demo makes its models from the training split alone, whole or not at all, and they open as
any Hugging Face model does."""

import html
import io
import math
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from stillhouse.cli.demo import run_demo
from stillhouse.config import CorpusSection, load_config
from stillhouse.errors import ConfigError
from stillhouse.models.heads import check_head, check_packing
from stillhouse.models.load import load_model
from stillhouse.models.tokenizers import (
    check_same_ids,
    load_tokenizer,
    tokenizer_digest,
    vocab_size_of,
)
from stillhouse.pipeline.holder import Holder
from stillhouse.pipeline.ownership import locked
from stillhouse.pipeline.toy import (
    Shape,
    Sizes,
    demo_config,
    learning_rate_share,
    llama_config,
    make_models,
    train_on_text,
)
from stillhouse.report import write_report
from stillhouse.sequence import Sequences
from stillhouse.sequences.corpus import Corpus
from stillhouse.sequences.packing import prepare_corpus

CORPUS = CorpusSection(dataset="stdlib", sequence_length=32, max_documents=12, heldout_sequences=16)
SIZES = Sizes(
    vocab_size=320,
    teacher=Shape(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2),
    student=Shape(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2),
    num_steps=40,
    batch_sequences=4,
    learning_rate=1e-2,
    warmup_steps=4,
)


class Made:
    """What `make_models` wrote and said, and the cache that it filled."""

    def __init__(self, directory: Path, cache_dir: Path) -> None:
        self.directory, self.cache_dir = directory, cache_dir
        said = io.StringIO()
        make_models(
            directory, CORPUS, SIZES, cache_dir=cache_dir, console=Console(file=said, width=200)
        )
        self.said = said.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def heldout(made: Made) -> Corpus:
    tokenizer = load_tokenizer(str(made.directory / "teacher"))
    return prepare_corpus(
        CORPUS, tokenizer, tokenizer_digest=tokenizer_digest(tokenizer), cache_dir=made.cache_dir
    ).heldout


def cross_entropy(model: Any, rows: Sequences) -> float:
    ids = torch.from_numpy(rows.token_ids_SL.astype(np.int64))
    positions = torch.from_numpy(rows.positions_SL.astype(np.int64))
    mask = torch.from_numpy(rows.loss_mask_SL == 1)
    with torch.inference_mode():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits[mask], ids.roll(-1, dims=1)[mask]))


def test_the_teacher_opens_with_the_auto_classes_and_has_learnt(
    made: Made, heldout: Corpus
) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(made.directory / "teacher")
    assert teacher.dtype == torch.float32
    assert teacher.config.tie_word_embeddings
    assert (
        cross_entropy(teacher, heldout.rows(0, heldout.num_sequences))
        < math.log(SIZES.vocab_size) - 1.0
    )


def test_the_teacher_passes_the_checks_of_a_run(made: Made) -> None:
    config = demo_config(made.directory.parent)
    teacher = load_model(
        config.teacher.model_copy(update={"model": str(made.directory / "teacher")})
    )
    check_head(teacher, vocab_size=SIZES.vocab_size)
    check_packing(teacher, vocab_size=SIZES.vocab_size)


def test_the_student_is_a_config_whose_weights_a_seed_decides(made: Made) -> None:
    config = AutoConfig.from_pretrained(made.directory / "student")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (
        16,
        1,
        SIZES.vocab_size,
    )
    assert not list((made.directory / "student").glob("*.safetensors"))


def test_both_tokenizers_are_one_and_any_text_survives_them(made: Made) -> None:
    tokenizers: list[Any] = [
        AutoTokenizer.from_pretrained(made.directory / name) for name in ("teacher", "student")
    ]
    teacher, student = tokenizers
    check_same_ids(teacher, student)
    assert vocab_size_of(teacher) == SIZES.vocab_size
    assert (
        teacher.eos_token_id == AutoConfig.from_pretrained(made.directory / "teacher").eos_token_id
    )
    text = "def f(x):\n\treturn x  # naïve café ☕\n"
    assert teacher.decode(teacher(text)["input_ids"]) == text


def test_what_happens_is_said_in_plain_words_where_there_is_no_terminal(made: Made) -> None:
    assert "A tokenizer of 320 tokens, learnt from 12 files" in made.said
    assert "A teacher of" in made.said
    assert "step 40 of 40, loss" in made.said


def test_the_teacher_learns_from_the_training_split_alone(made: Made) -> None:
    """Whoever trains on nothing but `split.train` gets the same weights to the last bit."""
    tokenizer = load_tokenizer(str(made.directory / "teacher"))
    split = prepare_corpus(
        CORPUS, tokenizer, tokenizer_digest=tokenizer_digest(tokenizer), cache_dir=made.cache_dir
    )
    torch.manual_seed(CORPUS.seed)
    again = LlamaForCausalLM(llama_config(SIZES.teacher, tokenizer, CORPUS.sequence_length))
    train_on_text(again, split.train, SIZES, show=list[float]().append)
    weights = AutoModelForCausalLM.from_pretrained(made.directory / "teacher").state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in again.state_dict().items())


def test_a_corpus_that_is_too_short_is_read_again(made: Made, heldout: Corpus) -> None:
    """Sixteen sequences, and steps for more: every batch is whole."""
    tokenizer = load_tokenizer(str(made.directory / "teacher"))
    model = LlamaForCausalLM(llama_config(SIZES.student, tokenizer, CORPUS.sequence_length))
    losses: list[float] = []
    train_on_text(
        model, heldout, replace(SIZES, num_steps=60, batch_sequences=6), show=losses.append
    )
    assert len(losses) == 60
    assert losses[-1] < losses[0] - 0.5


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    shares = [learning_rate_share(step, SIZES) for step in range(SIZES.num_steps)]
    assert shares[: SIZES.warmup_steps] == [0.25, 0.5, 0.75, 1.0]
    assert shares[SIZES.warmup_steps :] == sorted(shares[SIZES.warmup_steps :], reverse=True)
    assert 0.0 < shares[-1] < 0.01


def test_a_second_demo_does_not_make_models_beside_the_first(tmp_path: Path) -> None:
    with (
        locked(Holder.here("stillhouse demo", tmp_path, now=0.0)),
        pytest.raises(ConfigError, match=f"{tmp_path} is in use by"),
    ):
        run_demo(tmp_path, cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.usefixtures("ray_cluster")
def test_what_was_typed_is_what_the_report_says_to_run_again(made: Made, tmp_path: Path) -> None:
    """It needs more processors than there are, so that it ends before anything is started."""
    shutil.copytree(made.directory, tmp_path / "models")
    corpus = [
        f"corpus.{name} = {getattr(CORPUS, name)!r}"
        for name in ("sequence_length", "max_documents", "heldout_sequences")
    ]
    typed = "stillhouse demo --run-dir 'somewhere else'"
    with pytest.raises(ConfigError, match="CPU"):
        run_demo(
            tmp_path,
            [*corpus, "teacher.num_cpus = 1000.0"],
            cache_dir=made.cache_dir,
            command=typed,
        )
    assert f'<pre class="command">{html.escape(typed)}</pre>' in write_report(tmp_path).read_text(
        encoding="utf-8"
    )


def test_the_packages_config_is_the_repositorys_and_its_models_are_those_the_demo_writes() -> None:
    path = Path(__file__).parents[2] / "configs" / "demo.toml"
    assert path.read_bytes() == (files("stillhouse.pipeline") / "demo.toml").read_bytes()
    assert load_config([path]) == demo_config(Path("runs/demo"))


def test_everything_of_a_demo_lies_in_its_run_directory(tmp_path: Path) -> None:
    config = demo_config(tmp_path / 'somewhere "else"')
    assert {config.teacher.model, config.student.model, config.store.url} == {
        str(tmp_path / 'somewhere "else"' / place)
        for place in ("models/teacher", "models/student", "store")
    }
