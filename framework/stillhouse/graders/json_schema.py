"""The grader `json_schema`: the text is JSON that a JSON Schema allows.

Where the text has a fenced block (```), its last one is read, else all of it.
"""

import functools
import json
from typing import Any

import jsonschema
import referencing

from stillhouse.errors import ConfigError
from stillhouse.graders.base import Sample
from stillhouse.graders.fences import last_block


def score(sample: Sample, *, schema_text: str) -> float:
    """See `JsonSchemaSection`. A pattern of the schema may take for ever on some text: for a
    grader's process."""
    try:
        value = json.loads(last_block(sample.text), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return float(validator(schema_text).is_valid(value))


@functools.cache
def validator(schema_text: str) -> Any:
    """Of the schema's own draft, 2020-12 where it names none. A reference to another document is
    not fetched. Raises ConfigError where it is no schema."""
    schema = json.loads(schema_text)
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(
            f"a grader's schema_text is no JSON Schema: {error.message}; correct it"
        ) from None
    return kind(schema, registry=referencing.Registry())


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
