"""sparsekit inspect: what can be cut, what cannot, and what each layer costs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import click
from rich.table import Table

from sparsekit.cli.console import json_option, out, print_json
from sparsekit.cost import num_macs, num_params, term_value
from sparsekit.graph import Refusal, trace
from sparsekit.ingredients import build
from sparsekit.recipe import Recipe


@click.command()
@click.argument("model")
@click.option("--weights", help="Trained weights; groups and costs do not depend on them.")
@click.option("--data", help="Data set that says the input's size and the number of classes.")
@click.option("--image-size", type=int, help="Side of the input image in pixels, without data.")
@click.option("--renormalise", is_flag=True, help="Also list channels that LayerNorm and its like run over.")
@json_option
def inspect(
    model: str, weights: str | None, data: str | None, image_size: int | None, renormalise: bool, as_json: bool
) -> None:
    """List channel groups, refusals with reasons, MACs and parameters per layer.

    A group is cut exactly unless it is re-normalised: then what is left is normalised anew. A group whose number the
    forward fixes is cut in a recorded program instead of the network's own class.

    \b
    sparsekit inspect resnet56
    sparsekit inspect lenet5 --data fashion-mnist
    sparsekit inspect torchvision:densenet121 --json
    """
    recipe = Recipe(model=model, weights=weights, data=data, image_size=image_size)
    network, _, inputs = build(recipe)
    graph = trace(network, inputs, renormalise=renormalise)
    weights_of: Counter[str] = Counter()
    for term in graph.params:
        weights_of[term.name.rpartition(".")[0]] += term_value(term, graph)
    layers = [(term.name, term_value(term, graph), weights_of[term.name]) for term in graph.macs]
    if as_json:
        print_json(
            {
                "num_macs": num_macs(graph),
                "num_params": num_params(graph),
                "groups": [
                    {
                        "name": g.name,
                        "size": g.size,
                        "exact": g.exact,
                        "residual": g.residual,
                        "fixed_by": g.fixed_by,
                    }
                    for g in graph.groups
                ],
                "refusals": [dataclasses.asdict(refusal) for refusal in graph.refusals],
                "layers": [{"name": name, "num_macs": macs, "num_params": params} for name, macs, params in layers],
                "uncounted": list(graph.uncounted),
            }
        )
        return
    table = Table("channel group", "channels", "tensors", "residual stream", "re-normalised", "fixed by the forward")
    for group in graph.groups:
        flags = ("yes" if flag else "" for flag in (group.residual, not group.exact))
        table.add_row(group.name, str(group.size), str(len(group.slots)), *flags, group.fixed_by)
    out.print(table)
    table = Table("layer", "MACs", "share", "parameters")
    total = num_macs(graph)
    for name, macs, params in layers:
        table.add_row(name, f"{macs:,}", f"{macs / total:.1%}", f"{params:,}")
    out.print(table)
    for rows in _alike(graph.refusals):
        row = rows[0]
        where = row.module if len(rows) == 1 else f"{row.module} and {len(rows) - 1} like it, each"
        click.echo(f"kept: {where} ({row.source}, aten::{row.op}): {row.reason}; {row.macs_share:.1%} of MACs")
    click.echo(f"{total:,} MACs, {num_params(graph):,} parameters, {len(graph.groups)} groups")


def _alike(refusals: Iterable[Refusal]) -> list[list[Refusal]]:
    """Refusals of the same line for the same reason and share, as the blocks of a network have them."""
    alike: dict[tuple[str, str, str, str], list[Refusal]] = {}
    for row in refusals:
        alike.setdefault((row.source, row.op, row.reason, f"{row.macs_share:.1%}"), []).append(row)
    return list(alike.values())
