"""Every setting as a value, for the table of `stillhouse settings` and docs/settings.md; and the
JSON Schema of a config file, for editors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from stillhouse import suggestions
from stillhouse.config.fields import Section
from stillhouse.config.generate import PromptsSection, SamplingSection, WriterSection
from stillhouse.config.graders import SECTIONS_BY_KIND, AcceptSection, DecontaminateSection
from stillhouse.config.sections import Config, section_types
from stillhouse.config.servers import WritingSection
from stillhouse.config.vllm import VllmSection
from stillhouse.errors import ConfigError

_ALONE: Mapping[str, Mapping[str, type[Section]]] = {  # that are listed for their own word alone
    "prompts": {"prompts": PromptsSection},
    "writer": {
        "writer": WriterSection,
        "writer.openai": WritingSection,
        "writer.vllm": VllmSection,
    },
    "sampling": {"sampling": SamplingSection},
    "graders": {f"graders ({kind})": section for kind, section in SECTIONS_BY_KIND.items()},
    "accept": {"corpus.accept": AcceptSection},
    "decontaminate": {"corpus.decontaminate": DecontaminateSection},
}
_TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `kind` is its type and range in words, `default` a value as TOML writes it, or
    'none', or 'required'."""

    section: str
    name: str
    kind: str
    default: str
    description: str


def all_settings() -> list[Setting]:
    """Every setting of every section of a run's config, in order."""
    return _settings_of(section_types())


def _settings_of(sections: Mapping[str, type[Section]]) -> list[Setting]:
    settings = []
    for section, kind in sections.items():
        schema = kind.model_json_schema()
        schemas, tables = schema["properties"], schema.get("$defs", {})
        settings += [
            Setting(
                section,
                name,
                _kind(schemas[name], tables),
                _default(field),
                field.description or "",
            )
            for name, field in kind.model_fields.items()
        ]
    return settings


def settings_matching(word: str) -> list[Setting]:
    """The settings of the section `word`, which may be one of `stillhouse generate`, or a table of
    corpus, or else those of a run's config with the word in name or description; all of these for
    ''. Raises ConfigError, with near names, where there is none."""
    if word in _ALONE:
        return _settings_of(_ALONE[word])
    settings = all_settings()
    if word in section_types():
        return [each for each in settings if each.section == word]
    lower = word.lower()
    found = [
        each
        for each in settings
        if lower in f"{each.section}.{each.name} {each.description}".lower()
    ]
    if not found:
        names = {each.name for each in settings}
        meant = suggestions.setting(word, section="", known={"": sorted(names)})
        raise ConfigError(f"no setting has '{word[:100]}' in its name or description; {meant}")
    return found


def config_schema() -> dict[str, Any]:
    """The JSON Schema of one config file. No section is required: a config may be merged from
    several files, or completed by --set."""
    schema = Config.model_json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A config of Stillhouse",
    }
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    return schema


def _kind(schema: Mapping[str, Any], tables: Mapping[str, Any]) -> str:
    """A JSON Schema's type and range in words; `tables` has the schemas that it refers to."""
    if variants := schema.get("anyOf", schema.get("oneOf")):
        # an optional setting has null; its default says none
        kinds = [_kind(each, tables) for each in variants if each.get("type") != "null"]
        return " or ".join(kinds)
    if "$ref" in schema:
        keys = tables[schema["$ref"].rpartition("/")[2]]["properties"]
        return f"table of {', '.join(keys)}"
    if "enum" in schema:
        return ", ".join(json.dumps(value) for value in schema["enum"])
    if schema["type"] == "array" and "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {_kind(schema['prefixItems'][0], tables)}"
    if schema["type"] == "array":
        return f"list of {_kind(schema['items'], tables)}"
    if schema["type"] == "object":
        return f"table of {_kind(schema['additionalProperties'], tables)}"
    return " ".join(filter(None, (_TYPES[schema["type"]], _range(schema))))


def _range(schema: Mapping[str, Any]) -> str:
    words = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "to {}",
        "exclusiveMaximum": "below {}",
    }
    return " ".join(
        text.format(_number(schema[key])) for key, text in words.items() if key in schema
    )


def _number(value: float) -> str:
    """A bound as people read it: 2^24, 65,536, 0.01."""
    bits = int(abs(value)).bit_length() - 1
    if bits > 16 and abs(value) == 1 << bits:
        return f"{'-' if value < 0 else ''}2^{bits}"
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or isinstance(field.default, Section):
        return "none"
    if type(field.default) is int:
        return f"{field.default:_}" if field.default >= 10_000 else f"{field.default}"
    return json.dumps(field.default)
