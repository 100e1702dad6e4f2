"""Numbers and names as a reader wants them: few digits, a unit, and a space that does not break; no
directories of the writer's machine."""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import PurePath

_NARROW = "\N{NARROW NO-BREAK SPACE}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%-d %B %Y, %H:%M UTC")


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 60:
        return f"{seconds:.0f}{_NARROW}s"
    if minutes < 60:
        return f"{int(minutes)}{_NARROW}min {seconds % 60:.0f}{_NARROW}s"
    return (
        f"{int(hours)}{_NARROW}h {int(minutes) % 60}{_NARROW}min"
        if hours < 48
        else f"{hours / 24:.1f}{_NARROW}days"
    )


def percent(share: float) -> str:
    """With one decimal, or two where one would round to 100."""
    return (
        f"{100 * share:.1f}{_NARROW}%"
        if share < 0.995 or share == 1.0
        else f"{100 * share:.2f}{_NARROW}%"
    )


def _scaled(value: float, units: Iterable[tuple[float, str]]) -> str:
    for size, unit in units:
        if value >= size:
            return f"{value / size:.3g}{_NARROW}{unit}"
    return f"{value:,.0f}"


def large(value: float) -> str:
    return (
        f"{value:,.0f}"
        if value < 1e5
        else _scaled(value, ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")))
    )


def num_bytes(value: float) -> str:
    return _scaled(value, ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))) + (
        "" if value >= 1e3 else f"{_NARROW}B"
    )


def short_name(name: str) -> str:
    """Of a model or data set: a hub name as it is, the last two parts of a path."""
    return "/".join(PurePath(name).parts[-2:])


def times(ratio: float) -> str:
    return f"{ratio:,.1f}{_NARROW}×" if ratio < 100 else f"{ratio:,.0f}{_NARROW}×"


def small(value: float) -> str:
    """Two digits; in powers of ten up to a thousandth and from ten thousand."""
    if value == 0.0 or 1e-3 < abs(value) < 1e4:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return power if mantissa == "1.0" else f"{mantissa.removesuffix('.0')}·{power}"
