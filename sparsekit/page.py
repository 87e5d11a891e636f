"""Templates of self-contained HTML pages, filled in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import jinja2

from sparsekit.number_text import interval, ms, percent, times, value


def render(template: str, values: Mapping[str, object]) -> str:
    """The page that the template of that name makes of `values`; all text in it is escaped."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"value": value, "percent": percent, "times": times, "ms": ms}
    environment.globals["interval"] = interval
    return environment


def toml(table: Mapping[str, object], path: str = "") -> str:
    """A recipe's text as TOML writes it; None is left out, since TOML has no word for it.

    >>> print(toml({"model": "resnet56", "weights": None, "prune": {"epochs": 2}}))
    model = "resnet56"
    <BLANKLINE>
    [prune]
    epochs = 2
    """
    lines = [
        f"{key} = {json.dumps(item)}"
        for key, item in table.items()
        if item is not None and not isinstance(item, Mapping)
    ]
    for key, item in table.items():
        if isinstance(item, Mapping):
            lines += ["", f"[{path}{key}]", toml(item, f"{path}{key}.")]
    return "\n".join(lines).strip()
