"""Choosing the writer engine that a config names."""

from stillhouse.errors import ConfigError
from stillhouse.extension import load_extension
from stillhouse.writer.engine import WriterEngine

_MEMBERS = ("identity", "weight_hashes", "write")


def writer_named(name: str) -> type[WriterEngine]:
    """The engine class of `writer.engine`: a built-in one, or the user's `package.module:name`.

    Raises ConfigError where the user's own cannot be imported or lacks members of WriterEngine.
    """
    built_in = _built_in(name)
    if built_in is not None:
        return built_in
    found: type[WriterEngine] = load_extension(name, setting="writer.engine")
    missing = [member for member in _MEMBERS if not callable(getattr(found, member, None))]
    if missing:
        raise ConfigError(
            f'writer.engine is "{name}", which has no {", ".join(missing)}; wanted a class with '
            "all members of WriterEngine"
        )
    return found


def _built_in(name: str) -> type[WriterEngine] | None:
    """Imported here, so that a process loads no libraries of other engines."""
    match name:
        case "transformers":
            from stillhouse.writer.transformers import TransformersWriter

            return TransformersWriter
        case "vllm":
            from stillhouse.writer.vllm import VllmWriter

            return VllmWriter
        case "openai":
            from stillhouse.writer.openai import OpenAIWriter

            return OpenAIWriter
    return None
