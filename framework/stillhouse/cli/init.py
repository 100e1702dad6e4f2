"""The config that `stillhouse init` writes: what has no default, and the few numbers that every run
wants to choose. Nothing is guessed."""

import json


def starter_toml(*, teacher: str, student: str, dataset: str) -> str:
    """A whole config for two models and a data set, as TOML that `load_config` reads; every setting
    that it leaves out has a default."""
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


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a TOML basic string
