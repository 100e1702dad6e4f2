"""Choosing the writer engine that a config names."""

from collections.abc import Mapping

from stillhouse.errors import ConfigError
from stillhouse.extension import load_extension
from stillhouse.writer.engine import WriterEngine
from stillhouse.writer.openai import OpenAIWriter
from stillhouse.writer.transformers import TransformersWriter
from stillhouse.writer.vllm import VllmWriter

_BUILT_IN: Mapping[str, type[WriterEngine]] = {
    "transformers": TransformersWriter,
    "vllm": VllmWriter,
    "openai": OpenAIWriter,
}
_MEMBERS = ("identity", "weight_hashes", "write")


def writer_named(name: str) -> type[WriterEngine]:
    """The engine class of `writer.engine`: a built-in one, or the user's `package.module:name`.

    Raises ConfigError where the user's own cannot be imported or lacks members of WriterEngine.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    found: type[WriterEngine] = load_extension(name, setting="writer.engine")
    missing = [member for member in _MEMBERS if not callable(getattr(found, member, None))]
    if missing:
        raise ConfigError(
            f'writer.engine is "{name}", which has no {", ".join(missing)}; wanted a class with '
            "all members of WriterEngine"
        )
    return found
