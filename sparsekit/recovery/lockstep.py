"""Recorded forward passes that wait at every layer: it can be changed before they run on through it.

Repairing a network from its first layer to its last needs at each layer what all images make of the layers before, as
repaired. Running the network anew for every layer would cost its depth squared. Here every batch of images has a pass
of its own, and all of them wait where the next layer comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sparsekit.coupling import Coupling
from sparsekit.errors import PlanError
from sparsekit.plan import PruningPlan
from sparsekit.program import Program, Run
from sparsekit.replay import as_program
from sparsekit.surgery import plain
from sparsekit.survey import living


def recorded(network: nn.Module, example: Tensor) -> Program:
    """The forward of `network`, with its very own parameters and buffers: what is changed here is changed there.

    Args:
        network: returned as it is if it is a program.
        example: an input, batch first.

    Raises:
        PlanError: the forward follows the values of tensors, or writes the batch size as a number, so that no recording
            replays it.
    """
    program = network if isinstance(network, Program) else _recorded(network, example)
    sizes = [shape[0] for shape in program.evaluated.shapes if shape]
    if sizes != [None]:
        raise PlanError(f"recovery: needs a forward of one input and any batch size, this one is recorded at {sizes}")
    return program


def _recorded(network: nn.Module, example: Tensor) -> Program:
    whole = PruningPlan()
    program = as_program(
        plain(network, whole), network, (example,), lambda recordings: living(recordings, whole, Coupling())
    )
    return program.to(example.device)  # of the constants; all else is there


def visit(program: Program, batches: Sequence[Tensor], moments: Sequence[int]) -> Iterator[list[Run]]:
    """The passes of all batches, before each of these steps.

    A parameter or buffer that the caller changes then counts for all batches, and so does a tensor of a pass that it
    changes in place. Memory holds what a forward pass of all images holds at one moment.

    Args:
        program: run in eval mode, without gradients.
        batches: inputs, one pass each.
        moments: numbers of steps, ascending.

    >>> network = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sigmoid())
    >>> program = recorded(network, torch.zeros(2))
    >>> for (run,) in visit(program, [torch.tensor([-1.0, 1.0])], [0, 1]):
    ...     print([tensor.tolist() for tensor in run.tensors.values()])
    [[-1.0, 1.0]]
    [[0.0, 1.0]]
    """
    runs = [program.begin(batch) for batch in batches]
    for moment in moments:
        with torch.no_grad():
            for run in runs:
                run.advance(moment)
        yield runs
