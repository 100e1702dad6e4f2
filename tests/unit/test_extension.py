"""Extensions: a user's own part that is not what its setting needs is refused before anything
starts, with what is wrong."""

from pathlib import Path
from typing import Any

import pytest

from stillhouse.config import CorpusSection, TargetSection
from stillhouse.engines.base import Capabilities
from stillhouse.engines.choice import engine_named, require_capable
from stillhouse.errors import ConfigError
from stillhouse.extension import extension_digest, load_extension
from stillhouse.losses.divergences import divergence_identity, divergence_named
from stillhouse.sequences.source import open_sources

PARTS = """
from types import SimpleNamespace
from stillhouse.losses.divergences import Divergence
from stillhouse.sequences.source import Sources

def function(p, q): return (p - q).square().sum(dim=-1)
sound = Divergence(function)
one_number = Divergence(lambda p, q: function(p, q).sum())
not_finite = Divergence(lambda p, q: function(p, q) / 0)
constant = Divergence(lambda p, q: function(p, q).detach())
kl = lambda p, q: (p.exp() * (p - q)).sum(dim=-1)
generated = Divergence(kl, generator=lambda x: -x)
not_its_generator = Divergence(kl, generator=lambda x: x.exp() * x)
not_0_at_0 = Divergence(kl, generator=lambda x: 1 - x)
not_elementwise = Divergence(kl, generator=lambda x: -x.sum())

class HalfAnEngine:
    def probe(self): ...

def no_sources(section, tokenizer, *, block_sequences, cache_dir): return [1, 2]
def short_sources(section, tokenizer, *, block_sequences, cache_dir):
    lengths = (section.sequence_length, 5)
    return Sources(*(SimpleNamespace(sequence_length=length) for length in lengths))
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with parts that are sound and unsound; another for each test, since a
    module is imported once."""
    name = f"parts_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(PARTS)
    (tmp_path / f"broken_{name}.py").write_text("def f(:")
    (tmp_path / f"raises_{name}.py").write_text("''.no_such_method()")
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent_module:x", ["cannot be imported", "PYTHONPATH"]),
        ("broken_{parts}:f", ["cannot be imported", "invalid syntax"]),
        ("{parts}:absent", ["has no absent", "at the top of that module"]),
    ],
)
def test_what_cannot_be_loaded_is_said_with_its_setting(
    parts: str, name: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_extension(name.format(parts=parts), setting="teacher.engine")
    for word in ("teacher.engine is", *words):
        assert word in str(caught.value)


def test_an_error_inside_of_a_module_is_its_own(parts: str) -> None:
    with pytest.raises(AttributeError, match="no_such_method"):
        load_extension(f"raises_{parts}:x", setting="teacher.engine")


@pytest.mark.parametrize("name", ["function", "one_number", "not_finite", "constant"])
def test_what_is_no_usable_divergence_is_refused(parts: str, name: str) -> None:
    with pytest.raises(ConfigError, match=r"student\.divergence is"):
        divergence_named(f"{parts}:{name}", 0.5)


@pytest.mark.parametrize("name", ["not_its_generator", "not_0_at_0", "not_elementwise"])
def test_a_generator_of_something_else_is_refused(parts: str, name: str) -> None:
    assert divergence_named(f"{parts}:generated").generator is not None
    with pytest.raises(ConfigError, match="`generator` is not that of its `of`; wanted g"):
        divergence_named(f"{parts}:{name}")


def test_a_divergence_is_known_by_its_name_and_the_text_of_its_file(
    parts: str, tmp_path: Path
) -> None:
    name = f"{parts}:sound"
    divergence_named(name, 0.5)
    before = divergence_identity(name)
    assert before == f"{name}@{extension_digest(name)}"
    with (tmp_path / f"{parts}.py").open("a") as file:
        file.write("# another text\n")
    assert divergence_identity(name) != before
    assert divergence_identity("jsd") == "jsd"


def test_a_class_that_is_no_engine_is_refused_by_what_it_lacks(parts: str) -> None:
    with pytest.raises(ConfigError, match="no describe, identity, records, backend"):
        engine_named(f"{parts}:HalfAnEngine")


@pytest.mark.parametrize(
    ("capabilities", "words"),
    [
        (Capabilities(most_entries=19), "gives 19 entries at most"),
        (Capabilities(draws=False), "cannot draw from the tail"),
    ],
)
def test_a_target_that_an_engine_cannot_make_is_refused(
    capabilities: Capabilities, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        require_capable(capabilities, TargetSection(k=20, tail_draws=4), engine="mine")
    require_capable(Capabilities(most_entries=20), TargetSection(k=20, tail_draws=4), engine="mine")


@pytest.mark.parametrize("name", ["weighted_draws", "label_logprob", "tail_entropy"])
def test_what_an_engine_does_not_make_is_refused_by_name(name: str) -> None:
    target = TargetSection.model_validate({name: True})
    with pytest.raises(ConfigError, match=f"target.{name} is true, but the engine"):
        require_capable(Capabilities(), target, engine="mine")
    able: Any = {name: True}
    require_capable(Capabilities(**able), target, engine="mine")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_sources", "gives a list"),
        ("short_sources", "sequences have 5 tokens; wanted corpus.sequence_length, which is 8"),
    ],
)
def test_what_opens_no_usable_sources_is_refused(
    parts: str, tmp_path: Path, name: str, words: str
) -> None:
    section = CorpusSection(dataset="anything", source=f"{parts}:{name}", sequence_length=8)
    no_tokenizer: Any = None  # not looked at
    with pytest.raises(ConfigError, match=words):
        open_sources(
            section,
            no_tokenizer,
            tokenizer_digest="",
            block_sequences=4,
            cache_dir=tmp_path,
            on_progress=lambda *_: None,
        )
