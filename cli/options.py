"""How several verbs read their flags: callbacks for click options."""

from __future__ import annotations

import tomllib
from typing import Any

import click

from sparsekit.errors import UsageError


def name_values(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """`name=value`, where value is TOML, or a plain word."""
    options = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--option {text!r}: expected NAME=VALUE")
        try:
            options[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[name.strip()] = value.strip()
    return options


def words(_: click.Context, __: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """What stands between the commas."""
    return None if text is None else tuple(filter(None, (word.strip() for word in text.split(","))))


def numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Whole numbers between commas."""
    parts = words(context, parameter, text)
    try:
        return None if parts is None else tuple(map(int, parts))
    except ValueError:
        raise UsageError(f"{parameter.opts[0]} {text!r}: expected numbers like 60,90") from None
