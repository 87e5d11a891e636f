"""`compact` applies a plan to a network, `certify` proves that the small network computes what the plan says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsekit.coupling import Coupling
from sparsekit.errors import PlanError
from sparsekit.forward import plain as opened
from sparsekit.garbage import paused_collection
from sparsekit.gather import gathered
from sparsekit.plan import PruningPlan
from sparsekit.replay import as_program
from sparsekit.surgery import copied, cut, mask, plain
from sparsekit.survey import living


@dataclass(frozen=True)
class Certificate:
    """Evidence that the small network computes what the plan says.

    Attributes:
        max_relative_error: max |reference - compact| / max |reference|, the worst of the outputs, in float64.
        max_abs_output: max |reference|; a value near 0, or outputs without elements, make the comparison vacuous.
        groups: group name -> whether zero-masking equals removal there; where it does not the group is re-normalised.
        onnx_max_relative_error: ONNX Runtime against eager in float32, once exported.
    """

    max_relative_error: float
    max_abs_output: float
    groups: Mapping[str, bool]
    onnx_max_relative_error: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the networks agree to 1e-9 on outputs that are not all zero."""
        return self.max_abs_output > 0 and self.max_relative_error <= 1e-9

    @property
    def renormalised(self) -> tuple[str, ...]:
        """Names of the groups of which what is left is normalised anew."""
        return tuple(name for name, exact in self.groups.items() if not exact)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


def compact(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: Any = None,
    *,
    as_: Literal["auto", "module", "graph"] = "auto",
) -> nn.Module:
    """A copy of `model` from which every dropped channel has been cut.

    An empty plan gives a bit-equal copy.

    Args:
        model: the network that was traced.
        plan: what to keep.
        example_inputs: as for `trace`; needed only where the result is a recorded program.
        as_: "module" keeps the user's own class and forward; "graph" replays the recorded ops with the sizes in them
            rewritten; "auto" is a module unless the plan drops channels whose number the forward fixes.

    Raises:
        PlanError: the plan does not fit the model; or it needs a program, and `as_` or a missing example forbids it.
    """
    fixed = next((group for group, keep in plan.keep.items() if group.fixed_by and not keep.all()), None)
    if as_ == "module" and fixed is not None:
        raise PlanError(f"group {fixed.name!r}: {fixed.fixed_by}; as_='graph' cuts it in a recorded program")
    if as_ == "module" or (as_ == "auto" and fixed is None):
        return cut(model, plan)
    if example_inputs is None:
        reason = f"group {fixed.name!r}: {fixed.fixed_by}" if fixed else "as_='graph'"
        raise PlanError(f"{reason}; to record a program compact needs example_inputs")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    model = plain(model, plan)
    with paused_collection():
        return as_program(model, cut(model, plan), inputs, lambda recordings: living(recordings, plan, Coupling()))


def certify(model: nn.Module, plan: PruningPlan, small: nn.Module, example_inputs: Any) -> Certificate:
    """Compare `small` with what the plan means on `example_inputs`, both in float64 on the CPU and eval mode.

    The meaning is `mask(model, plan)`. Where a dropped group is re-normalised, the ops that normalise run on the
    channels that are left.

    Raises:
        PlanError: the two return different structures or shapes.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    inputs = tree_map_only(Tensor, _wide, inputs)
    dropped = {group: keep for group, keep in plan.keep.items() if not keep.all()}
    with torch.no_grad(), _Double():  # type: ignore[no-untyped-call]
        reference = mask(model, plan).double().cpu().eval()
        if all(group.exact for group in dropped):
            expected = _run(reference, inputs)
        else:
            expected = gathered(reference, PruningPlan(dropped), inputs)
        del reference
        got = _run(copied(small).double().cpu().eval(), inputs)
    shapes = [[list(leaf.shape) for leaf in leaves] for leaves in (expected, got)]
    if shapes[0] != shapes[1]:
        raise PlanError(f"certificate: masked outputs are {shapes[0]}, compact outputs {shapes[1]}")
    expected, got = ([leaf for leaf in leaves if leaf.numel()] for leaves in (expected, got))
    # Each output by its own scale, and tensor maxima, which keep a NaN where Python's max may drop it.
    scales = torch.stack([torch.tensor(0.0), *(leaf.double().abs().max() for leaf in expected)])
    errors = torch.stack(
        [torch.tensor(0.0), *((a.double() - b.double()).abs().max() for a, b in zip(expected, got, strict=True))]
    )
    return Certificate(
        max_relative_error=float(torch.where(errors == 0, errors, errors / scales).max()),
        max_abs_output=float(scales.max()),
        groups={group.name: group.exact for group in dropped},
    )


class _Double(TorchDispatchMode):
    """float64 also where a forward says float32, or makes tensors of the default type."""

    def __enter__(self) -> Any:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.dtype, self._widened, (args, kwargs or {}))
        return func(*args, **kwargs)

    @staticmethod
    def _widened(dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float32 else dtype


def _wide(x: Tensor) -> Tensor:
    return x.detach().cpu().double() if x.is_floating_point() else x.detach().cpu()


def _run(network: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    # Copies, because a forward may write into its inputs.
    output = opened(network(*tree_map_only(Tensor, torch.clone, inputs)))
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
