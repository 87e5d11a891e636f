"""The command line: one file per verb, which parses, calls and prints."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from sparsekit.cli.bench import bench
from sparsekit.cli.compress import compress
from sparsekit.cli.env import env
from sparsekit.cli.export import export
from sparsekit.cli.gan import gan
from sparsekit.cli.inspect import inspect
from sparsekit.cli.report import report
from sparsekit.errors import SparsekitError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sparsekit")
def commands() -> None:
    """Turn a trained PyTorch network and a budget into a smaller, verified, measured ONNX file.

    \b
    sparsekit compress
    sparsekit compress --help

    \b
    Exit codes: 0 done, 1 failed, 2 bad usage, 3 quality gate missed,
    4 the ONNX file is not the network, 5 nothing could be measured,
    130 interrupted.
    """


for verb in (compress, inspect, export, bench, gan, report, env):
    commands.add_command(verb)


def main() -> None:
    """Run the command line; every expected failure is one line on stderr and an exit code."""
    try:
        commands.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:  # what click makes of Ctrl-C
        _fail("interrupted; `sparsekit compress` continues with --resume", 130)
    except SparsekitError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        reason = error.strerror or str(error)
        _fail(f"{error.filename}: {reason}" if error.filename else reason, 1)


def _fail(message: str, exit_code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(exit_code)
