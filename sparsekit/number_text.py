"""Numbers as a reader wants them: shares, sizes, ratios and intervals as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def percent(share: float | None) -> str:
    """
    >>> percent(0.9361), percent(None)
    ('93.61 %', '-')
    """
    return "-" if share is None else f"{100 * share:.2f} %"


def si(count: float) -> str:
    """One decimal and the prefix, which the caller's unit may follow.

    >>> si(125_485_696), si(512)
    ('125.5 M', '512 ')
    """
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= power:
            return f"{count / power:.1f} {prefix}"
    return f"{count:.0f} "


def times(ratio: float | None, digits: int = 3) -> str:
    """A ratio to so many significant digits.

    >>> times(0.4912, 2), times(1.0), times(10.4, 2), times(None)
    ('0.49x', '1.00x', '10x', '-')
    """
    return "-" if ratio is None else f"{ratio:#.{digits}g}".rstrip(".") + "x"


def interval(low: float | None, high: float | None, num_decimals: int = 2) -> str:
    """
    >>> interval(0.5, 0.54), interval(None, 0.54)
    ('[0.50, 0.54]', '')
    """
    return "" if low is None or high is None else f"[{low:.{num_decimals}f}, {high:.{num_decimals}f}]"


def ms(milliseconds: float) -> str:
    """Three digits, and the unit left to the caller.

    >>> ms(5.0), ms(0.12345), ms(123.4)
    ('5.00', '0.123', '123')
    """
    return f"{milliseconds:#.3g}".rstrip(".")


def value(thing: object) -> str:
    """One JSON value.

    >>> value({"busy": False, "threads": [1, 2]}), value(None), value(3.14159)
    ('busy no, threads 1, 2', '-', '3.142')
    """
    if isinstance(thing, bool):
        return "yes" if thing else "no"
    if isinstance(thing, float):
        return f"{thing:.4g}"
    if isinstance(thing, Mapping):
        return ", ".join(f"{key} {value(item)}" for key, item in thing.items())
    if isinstance(thing, Sequence) and not isinstance(thing, str):
        return ", ".join(value(item) for item in thing)
    return "-" if thing is None else str(thing)
