"""The name of a model in a config: a local directory, or a name on the hub.

Nothing heavy is imported here, so that a wrong path is refused at once.
"""

from pathlib import Path

from stillhouse.errors import ModelError


def source_of(model: str) -> str:
    """The path of a local directory, or a hub name as it is. Raises ModelError for a path without a
    directory."""
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ModelError(
            f"there is no directory {model}{where_it_was_looked_for(model)}; give that of a saved "
            "model, or a hub name such as 'owner/name'"
        )
    return model


def where_it_was_looked_for(model: str) -> str:
    """The directory that a relative path starts from, in words; '' for an absolute path."""
    if Path(model).expanduser().is_absolute():
        return ""
    return (
        f" in {Path.cwd()} (a path of --set is relative to the current directory, not to the "
        "config file)"
    )
