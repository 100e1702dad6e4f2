"""Extensions: an object of the user's own package, which a config names as `package.module:name`.

Engines, sources of sequences and divergences can be added in this way.
"""

import hashlib
import importlib
import re
from pathlib import Path
from typing import Any

from stillhouse.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_extension(name: str) -> bool:
    """Whether a setting's value names an object of the user's own, not one of Stillhouse's."""
    return _NAME.fullmatch(name) is not None


def load_extension(name: str, *, setting: str) -> Any:
    """The object of this name; `setting` is where the config has it.

    Raises ConfigError where its module cannot be imported, or has no such name. Any other error of
    the module is raised as it is.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f'{setting} is "{name}", whose module cannot be imported ({error}); install its '
            "package on every machine, or name its directory in PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(
            f'{setting} is "{name}", but {module_name} has no {attribute}; name an object at the '
            "top of that module"
        )
    return getattr(module, attribute)


def extension_digest(name: str) -> str:
    """16 hexadecimal digits, the sha256 of the file that defines the object: a changed file counts
    as another object."""
    file = importlib.import_module(name.partition(":")[0]).__file__
    assert file is not None, f"{name} is in no file"
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
