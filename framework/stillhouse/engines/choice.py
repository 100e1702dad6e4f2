"""Choosing the teacher engine that a config names, and checking it against the config's target."""

from collections.abc import Mapping

from stillhouse.config import TargetSection
from stillhouse.engines.base import Capabilities, TeacherEngine
from stillhouse.engines.openai import OpenAIEngine
from stillhouse.engines.rollouts import RolloutsEngine
from stillhouse.engines.text import TextEngine
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.engines.vllm import VllmEngine
from stillhouse.errors import ConfigError
from stillhouse.extension import load_extension

_BUILT_IN: Mapping[str, type[TeacherEngine]] = {
    "transformers": TransformersEngine,
    "vllm": VllmEngine,
    "openai": OpenAIEngine,
    "text": TextEngine,
    "rollouts": RolloutsEngine,
}
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
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    found: type[TeacherEngine] = load_extension(name, setting="teacher.engine")
    missing = [member for member in _MEMBERS if not callable(getattr(found, member, None))]
    if missing:
        raise ConfigError(
            f'teacher.engine is "{name}", which has no {", ".join(missing)}; wanted a class with '
            "all members of TeacherEngine"
        )
    return found
