"""What SkyPilot says of job groups: a program for an environment of its own, since it wants other
versions of libraries that we have.

Reads a JSON list of files' texts, and writes the list of what is wrong with each, null where
nothing is.
"""

import json
import os
import sys

# on the command line
_GIVEN = {
    "envs": ["BUCKET"],
    "secrets": ["HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN"],
}


def problem_with(text: str) -> str | None:
    from sky.utils import dag_utils, schemas, yaml_utils

    # as on its server: here it lets pass what a plugin might know
    schemas._allow_additional_properties = lambda: False
    given = {kind: [(name, "given") for name in names] for kind, names in _GIVEN.items()}
    unknown = set(yaml_utils.read_yaml_all_str(text)[0]) - dag_utils._JOB_GROUP_HEADER_FIELDS
    if unknown:
        return f"its first document has {unknown}, which is nothing to SkyPilot"
    try:
        dag_utils.load_job_group_from_yaml_str(text, given["envs"], given["secrets"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # it says what it has loaded
    json.dump([problem_with(text) for text in json.load(sys.stdin)], answers)
    answers.close()
