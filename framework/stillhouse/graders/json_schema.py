"""The grader `json_schema`: the text is JSON that a JSON Schema allows.

Where the text has a fenced block (```), its last one is read, else all of it.
"""

import json
from collections.abc import Callable

import jsonschema
import referencing

from stillhouse.errors import ConfigError
from stillhouse.graders.base import Sample
from stillhouse.graders.fences import last_block


def scorer(schema_text: str) -> Callable[[Sample], float]:
    """See `JsonSchemaSection`. For a grader's process: a pattern of the schema may take for ever on
    some text.

    The schema is of the draft that it names, or else of 2020-12. A reference to another document is
    not fetched. Raises ConfigError where it is no schema.
    """
    schema = json.loads(schema_text)
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(
            f"a grader's schema_text is no JSON Schema: {error.message}; correct it"
        ) from None
    validator = kind(schema, registry=referencing.Registry())

    def score(sample: Sample) -> float:
        try:
            value = json.loads(last_block(sample.text), parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        return float(validator.is_valid(value))

    return score


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
