"""Numbers, times and names as the report shows them: few digits, a unit, a space that does not
break.

Names of models and data sets lose the directories of the machine that the run was on.
"""

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import PurePath

_NARROW = "\N{NARROW NO-BREAK SPACE}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def date(seconds: float) -> str:
    """A moment, in seconds since 1970, in UTC."""
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%-d %B %Y, %H:%M UTC")


def duration(seconds: float) -> str:
    """Seconds below a minute, minutes and seconds below an hour, and so on up to days."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 60:
        return f"{seconds:.0f}{_NARROW}s"
    if minutes < 60:
        return f"{int(minutes)}{_NARROW}min {seconds % 60:.0f}{_NARROW}s"
    if hours < 48:
        return f"{int(hours)}{_NARROW}h {int(minutes) % 60}{_NARROW}min"
    return f"{hours / 24:.1f}{_NARROW}days"


def percent(share: float) -> str:
    """A share of 1 in per cent, with one decimal, or two where one would round to 100."""
    digits = 1 if share < 0.995 or share == 1.0 else 2
    return f"{100 * share:.{digits}f}{_NARROW}%"


def counted(number: int, thing: str) -> str:
    """A number and its noun, such as "1 replica" and "3 replicas"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def large(value: float) -> str:
    """A count: all digits below 100,000, three digits and a letter from there on."""
    if value < 1e5:
        return f"{value:,.0f}"
    return _scaled(value, ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")))


def num_bytes(value: float) -> str:
    """A size in bytes, to three digits, with a decimal prefix."""
    if value < 1e3:
        return f"{value:,.0f}{_NARROW}B"
    return _scaled(value, ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def _scaled(value: float, units: Iterable[tuple[float, str]]) -> str:
    size, unit = next((size, unit) for size, unit in units if value >= size)
    return f"{value / size:.3g}{_NARROW}{unit}"


def short_name(name: str) -> str:
    """A model's or data set's name: a hub name as it is, of a path the last two parts."""
    return "/".join(PurePath(name).parts[-2:])


def times(ratio: float) -> str:
    """How many times as large."""
    return f"{ratio:,.1f}{_NARROW}×" if ratio < 100 else f"{ratio:,.0f}{_NARROW}×"


def small(value: float) -> str:
    """A number to two digits; as a power of ten up to a thousandth and from ten thousand."""
    if value == 0.0 or 1e-3 < abs(value) < 1e4:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"
    return scientific(value)


def scientific(value: float) -> str:
    """A number to two digits as a power of ten, such as 3.2·10⁻⁴."""
    mantissa, exponent = f"{value:.1e}".split("e")
    power = f"10{_exponent(int(exponent))}"
    return power if mantissa == "1.0" else f"{mantissa.removesuffix('.0')}·{power}"


def same_power(value: float, *, largest: float) -> str:
    """A tick of an axis whose every tick has the power of ten of the largest one."""
    exponent = math.floor(math.log10(largest))
    return "0" if value == 0.0 else f"{value / 10.0**exponent:.3g}·10{_exponent(exponent)}"


def _exponent(number: int) -> str:
    return str(number).translate(_SUPERSCRIPTS)
