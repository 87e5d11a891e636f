"""sparsekit env: hardware and versions, for bug reports and benchmark rows."""

from __future__ import annotations

import dataclasses

import click

from sparsekit.cli.console import json_option, print_json
from sparsekit.environment import Environment


@click.command()
@json_option
def env(as_json: bool) -> None:
    """Print hardware and versions; no host names, no paths.

    \b
    sparsekit env --json
    """
    values = dataclasses.asdict(Environment.collect())
    if as_json:
        print_json(values)
        return
    for name, value in (values | values.pop("packages")).items():
        text = " ".join(value) if isinstance(value, tuple) else value
        click.echo(f"{name:<12} {'-' if text is None else text}")
