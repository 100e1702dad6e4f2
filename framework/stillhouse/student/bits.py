"""bitsandbytes, which the extra `bits` installs: numbers of 8 bits."""

from types import ModuleType

from stillhouse.errors import ConfigError


def bitsandbytes_for(setting: str) -> ModuleType:
    """The package. Raises ConfigError, which names the setting that needs it, where it is not
    installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"{setting} needs bitsandbytes, which cannot be imported ({error}); install it with "
            "`pip install 'stillhouse[bits]'`, on every machine"
        ) from None
    package: ModuleType = bitsandbytes
    return package
