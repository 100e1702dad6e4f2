"""Choosing the teacher engine that a config names, and checking it against the config's target."""

from stillhouse.config import TargetSection
from stillhouse.engines.base import Capabilities, TeacherEngine
from stillhouse.errors import ConfigError
from stillhouse.extension import load_extension

_MEMBERS = ("describe", "identity", "records", "probe", "backend")


def require_capable(capabilities: Capabilities, target: TargetSection, *, engine: str) -> None:
    """Raise ConfigError where the engine cannot make the config's target."""
    most = capabilities.most_entries
    if most is not None and target.k > most:
        raise ConfigError(
            f'target.k is {target.k}, but the engine "{engine}" gives {most} entries at most; '
            "lower target.k"
        )
    if target.tail_draws and not capabilities.draws:
        raise ConfigError(
            f'target.tail_draws is {target.tail_draws}, but the engine "{engine}" cannot draw '
            "from the tail; set it to 0"
        )
    if target.temperature != 1.0 and not capabilities.temperatures:
        raise ConfigError(
            f'target.temperature is {target.temperature:g}, but the engine "{engine}" scores at 1 '
            "alone; set it to 1"
        )
    for name in ("weighted_draws", "label_logprob", "tail_entropy"):
        if getattr(target, name) and not getattr(capabilities, name):
            raise ConfigError(
                f'target.{name} is true, but the engine "{engine}" does not make it; leave it out, '
                "or take another engine"
            )


def engine_named(name: str) -> type[TeacherEngine]:
    """The engine class of `teacher.engine`: a built-in one, or the user's `package.module:name`.

    Raises ConfigError where the user's own cannot be imported or lacks members of TeacherEngine.
    """
    built_in = _built_in(name)
    if built_in is not None:
        return built_in
    found: type[TeacherEngine] = load_extension(name, setting="teacher.engine")
    missing = [member for member in _MEMBERS if not callable(getattr(found, member, None))]
    if missing:
        raise ConfigError(
            f'teacher.engine is "{name}", which has no {", ".join(missing)}; wanted a class with '
            "all members of TeacherEngine"
        )
    return found


def _built_in(name: str) -> type[TeacherEngine] | None:
    """Imported here, so that a process loads no libraries of other engines."""
    match name:
        case "transformers":
            from stillhouse.engines.transformers import TransformersEngine

            return TransformersEngine
        case "vllm":
            from stillhouse.engines.vllm import VllmEngine

            return VllmEngine
        case "openai":
            from stillhouse.engines.openai import OpenAIEngine

            return OpenAIEngine
        case "text":
            from stillhouse.engines.text import TextEngine

            return TextEngine
        case "rollouts":
            from stillhouse.engines.rollouts import RolloutsEngine

            return RolloutsEngine
    return None
