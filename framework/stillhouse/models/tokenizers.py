"""Tokenizers as maps of ids: loaded, digested, and compared between teacher and student."""

import hashlib
import json
from copy import deepcopy

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stillhouse.errors import ModelError
from stillhouse.model_path import source_of
from stillhouse.models.sources import from_hub


def load_tokenizer(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """The fast tokenizer beside a model. Raises ModelError: absent, gated, or without a fast
    implementation."""
    tokenizer = from_hub(
        lambda: AutoTokenizer.from_pretrained(
            source_of(model), revision=revision, trust_remote_code=trust_remote_code
        ),
        "tokenizer",
        model,
    )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"the tokenizer of {model} is a {type(tokenizer).__name__}, without a tokenizer.json; "
            "only fast tokenizers are supported: convert it, or name another model's with the same "
            "ids"
        )
    return tokenizer


def with_chat_template(
    tokenizer: PreTrainedTokenizerFast, template: str | None
) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer with this chat template in place of its own; None: the tokenizer."""
    if template is None:
        return tokenizer
    changed = deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 over all that decides ids: the tokenizer's rules and vocabulary, its special tokens
    and its chat template."""
    decides = json.loads(tokenizer.backend_tokenizer.to_str())
    for of_the_last_call in ("truncation", "padding"):
        decides.pop(of_the_last_call, None)
    decides["special_tokens_map"] = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items()
    }
    decides["chat_template"] = tokenizer.chat_template
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def vocabulary_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 over what each id stands for. Tokenizers that split texts otherwise, or have other
    chat templates, may have equal vocabularies."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def vocab_size_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """V, the size of the vocabulary of every target: the highest id + 1."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_ids(
    teacher_tokenizer: PreTrainedTokenizerFast, student_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Raise ModelError unless both have the same highest id and no id stands for two tokens.

    The models' heads may be padded to different sizes.
    """
    teacher = {number: token for token, number in teacher_tokenizer.get_vocab().items()}
    student = {number: token for token, number in student_tokenizer.get_vocab().items()}

    # The same token for each id that both have.
    cure = (
        "; distillation needs one id map: choose a student of the same tokenizer, or set "
        "student.tokenizer to the teacher's and retrain"
    )
    differing = sorted(
        number for number in teacher.keys() & student.keys() if teacher[number] != student[number]
    )
    if differing:
        few = ", ".join(
            f"{number} is {teacher[number]!r} and {student[number]!r}" for number in differing[:4]
        )
        raise ModelError(
            f"the tokenizers of teacher and student disagree about {len(differing)} ids: "
            f"{few}{cure}"
        )

    # The same highest id.
    if max(teacher) != max(student):
        longer, name = (teacher, "teacher") if max(teacher) > max(student) else (student, "student")
        extra = sorted(teacher.keys() ^ student.keys())
        few = ", ".join(f"{number} is {longer.get(number)!r}" for number in extra[-4:])
        raise ModelError(
            f"the teacher's tokenizer ends at id {max(teacher)}, the student's at {max(student)}: "
            f"{len(extra)} ids are in one alone, the last of them the {name}'s ({few}){cure}"
        )
