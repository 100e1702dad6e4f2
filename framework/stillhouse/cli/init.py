"""What `stillhouse init` writes: a config with the settings that have no default and the few that
every run chooses, and the JSON Schema beside it."""

import json

from stillhouse.config.settings import config_schema

SCHEMA_NAME = "stillhouse.schema.json"


def starter_file(*, teacher: str, student: str, dataset: str) -> str:
    """The text of the file: `starter_toml` below a line that names its schema. Editors read that
    line (Taplo, Even Better TOML), and look for the path beside the file."""
    toml = starter_toml(teacher=teacher, student=student, dataset=dataset)
    return f"#:schema ./{SCHEMA_NAME}\n\n{toml}"


def starter_toml(*, teacher: str, student: str, dataset: str) -> str:
    """A whole config for two models and a data set, as TOML that `load_config` reads."""
    return f"""\
[corpus]
dataset = {_quoted(dataset)}
# subset, split, revision and max_documents choose a part of it
format = "text"  # or "chat", for rows of {{role, content}} messages
sequence_length = 2048

[teacher]
model = {_quoted(teacher)}

[target]
k = 8  # log-probabilities kept for each token
tail_draws = 40  # and ids drawn from the rest, which keep the loss unbiased

[student]
model = {_quoted(student)}
learning_rate = 1e-4
"""


def schema_json() -> str:
    """The JSON Schema of a config file, as a file's text."""
    return json.dumps(config_schema(), indent=2) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a TOML basic string
