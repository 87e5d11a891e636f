"""Weights with zeros in a pattern, as the kernels store them.

`GroupSparse` keeps groups of `rows` outputs by `cols` inputs; a square group is a block of BSR. `NM24` keeps 2 of
every 4 consecutive inputs.
"""

# N outputs, K inputs, C input channels of one tap (K = taps * C)
# R row blocks of V outputs, H columns of groups of g inputs, T steps, S groups of a step, B = S * g inputs of a step
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekit.errors import KernelError

ROWS = (16, 32, 64, 128)
COLS = (8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class GroupSparse:
    """A weight [N, K] of which only groups of `rows` outputs by `cols` inputs are stored, several to a step.

    The steps of a row block follow each other and their groups ascend. A block's last step may end in repetitions of
    its last group's index, with zeros for values. N and K need not be multiples of the group's sides.

    Attributes:
        values: [T, V, B], the groups of a step side by side.
        gidx: int32 [(T + 1) * S], the column where each group lies, in groups. A kernel loads the indices one step
            ahead of use, so there is one step more than values have.
        ptr: int32 [R + 1], where the steps of each row block begin.
        order: int32 [R], the row blocks, those of most steps first.
        shape: N and K.
        taps: K is this many runs of equal length, a convolution's kernel positions. Each run is padded to whole
            groups: column h of groups is input g * (h mod P) of tap h div P, where P is the groups of a tap.
    """

    values: Tensor
    gidx: Tensor
    ptr: Tensor
    order: Tensor
    shape: tuple[int, int]
    taps: int = 1

    @property
    def rows(self) -> int:
        """Outputs of a group, V."""
        return self.values.shape[1]

    @property
    def cols(self) -> int:
        """Inputs of a group, g."""
        num_steps, _, step = self.values.shape
        return (num_steps + 1) * step // self.gidx.numel()

    @property
    def max_steps(self) -> int:
        """Steps of the longest row block. Waits for the device."""
        return int(self.ptr.diff().amax())

    @property
    def density(self) -> float:
        """Fraction of the groups that are stored, in [0, 1]. Waits for the device."""
        num_cols = self.taps * _ceil_div(self.shape[1] // self.taps, self.cols)
        num_groups = int(_begins(self.gidx, self.values.shape[0]).sum())
        return num_groups / (self.order.numel() * num_cols)

    def to_dense(self) -> Tensor:
        """The weight [N, K], exactly as it was packed; differentiable in `values`."""
        return scatter_groups(self.values, self.gidx, self.ptr, shape=self.shape, cols=self.cols, taps=self.taps)

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GroupSparse:
        """The same weight elsewhere, or with values of another dtype."""
        gidx, ptr, order = (index.to(device=device) for index in (self.gidx, self.ptr, self.order))
        return replace(self, values=self.values.to(device=device, dtype=dtype), gidx=gidx, ptr=ptr, order=order)

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors, for a state dict or a safetensors file; `from_tensors` reads them."""
        layout = torch.tensor([*self.shape, self.taps])
        return {"values": self.values, "gidx": self.gidx, "ptr": self.ptr, "order": self.order, "layout": layout}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> GroupSparse:
        """What gave these `tensors`."""
        num_out, num_in, taps = tensors["layout"].tolist()
        values, gidx, ptr, order = (tensors[name] for name in ("values", "gidx", "ptr", "order"))
        return cls(values, gidx, ptr, order, (num_out, num_in), taps)


def pack(
    weight_NK: Tensor, mask_NK: Tensor | None = None, *, rows: int, cols: int, step: int = 64, taps: int = 1
) -> GroupSparse:
    """Store the groups of a weight in which the mask keeps anything.

    Args:
        weight_NK: [N, K]; a convolution's columns are tap-major, `weight.permute(0, 2, 3, 1).flatten(1)`.
        mask_NK: bool [N, K], True where the weight is kept; None keeps what is not zero.
        rows: outputs of a group, one of `ROWS`.
        cols: inputs of a group, one of `COLS`.
        step: inputs that a kernel multiplies at a time, a power of two and at least `cols`.
        taps: kernel positions of a convolution.

    Raises:
        KernelError: if the sizes do not go together, or an index does not fit 32 bits.

    >>> packed = pack(torch.eye(64), rows=16, cols=8)
    >>> packed.values.shape, packed.density
    (torch.Size([4, 16, 64]), 0.25)
    >>> torch.equal(packed.to_dense(), torch.eye(64))
    True
    """
    _check_pattern(weight_NK, rows, cols, taps)
    if step < cols or step & (step - 1):
        raise KernelError(f"step {step}: must be a power of two of at least {cols}, the columns of a group")
    mask_NK = weight_NK != 0 if mask_NK is None else mask_NK
    if mask_NK.shape != weight_NK.shape or mask_NK.dtype != torch.bool:
        expected, got = list(weight_NK.shape), f"{mask_NK.dtype} {list(mask_NK.shape)}"
        raise KernelError(f"mask: must be torch.bool {expected} like the weight, got {got}")
    kept_RH = blocks(mask_NK, rows, cols, taps).flatten(2).any(2)
    gidx, ptr = _index(kept_RH, step // cols)
    values = gather_groups(
        weight_NK.masked_fill(~mask_NK, 0), gidx, ptr, rows=rows, cols=cols, num_groups=step // cols, taps=taps
    )
    order = ptr.diff().argsort(descending=True, stable=True).int()
    return GroupSparse(values, gidx, ptr, order, (weight_NK.shape[0], weight_NK.shape[1]), taps)


def from_torch_bsr(weight_NK: Tensor, *, step: int = 64) -> GroupSparse:
    """The weight of torch's BSR tensor, with the same blocks stored; wide blocks are split into groups of 64 inputs.

    Raises:
        KernelError: if it is not BSR, or its blocks are of a size that no kernel takes.
    """
    if weight_NK.layout != torch.sparse_bsr:
        raise KernelError(f"from_torch_bsr: needs a torch.sparse_bsr tensor, got {weight_NK.layout}")
    crow, col, values = weight_NK.crow_indices(), weight_NK.col_indices(), weight_NK.values()
    ones = torch.ones_like(values)
    stored_NK = torch.sparse_bsr_tensor(crow, col, ones, weight_NK.shape, check_invariants=True).to_dense()
    rows, cols = values.shape[1], min(values.shape[2], COLS[-1])
    return pack(weight_NK.to_dense(), stored_NK != 0, rows=rows, cols=cols, step=max(step, cols))


def gather_groups(
    weight_NK: Tensor, gidx: Tensor, ptr: Tensor, *, rows: int, cols: int, num_groups: int, taps: int = 1
) -> Tensor:
    """The values [T, V, B] of a dense weight, or of its gradient, at the groups that a packed one stores.

    Takes the parts of a `GroupSparse`; `num_groups` is S, the groups of a step. Does not wait for the device.
    """
    num_steps = gidx.numel() // num_groups - 1
    blocks_RHVg = blocks(weight_NK, rows, cols, taps)
    gidx_TS = gidx[: num_steps * num_groups].view(num_steps, num_groups).long()
    groups_TSVg = blocks_RHVg[_row_of_step(ptr, num_steps)[:, None], gidx_TS]
    groups_TSVg = groups_TSVg.masked_fill(~_begins(gidx, num_steps)[:, :, None, None], 0)
    return groups_TSVg.transpose(1, 2).reshape(num_steps, rows, num_groups * cols)


def scatter_groups(
    values_TVB: Tensor, gidx: Tensor, ptr: Tensor, *, shape: tuple[int, int], cols: int, taps: int = 1
) -> Tensor:
    """The dense weight [N, K] of a packed one, differentiable in the values.

    Takes the parts of a `GroupSparse`. Does not wait for the device.
    """
    num_steps, rows, step = values_TVB.shape
    (num_out, num_in), num_groups, num_rows = shape, step // cols, ptr.numel() - 1
    groups_TSVg = values_TVB.view(num_steps, rows, num_groups, cols).transpose(1, 2)
    groups_TSVg = groups_TSVg.masked_fill(~_begins(gidx, num_steps)[:, :, None, None], 0)
    gidx_TS = gidx[: num_steps * num_groups].view(num_steps, num_groups).long()
    cols_per_tap = _ceil_div(num_in // taps, cols)
    blocks_RHVg = values_TVB.new_zeros(num_rows, taps * cols_per_tap, rows, cols)
    row_TS = _row_of_step(ptr, num_steps)[:, None].expand_as(gidx_TS)
    blocks_RHVg = blocks_RHVg.index_put((row_TS, gidx_TS), groups_TSVg, accumulate=True)  # repetitions add zeros
    weight = blocks_RHVg.transpose(1, 2).reshape(num_rows * rows, taps, cols_per_tap * cols)
    return weight[:num_out, :, : num_in // taps].reshape(num_out, num_in)


@dataclass(frozen=True, eq=False)
class NM24:
    """A weight [N, K] with at most 2 of every 4 consecutive inputs stored, at 9/16 of the bytes in a 16-bit dtype.

    Attributes:
        values: [N, P / 2], where P is K padded to a multiple of 8.
        positions: uint8 [N, P / 8]; bits 2 i and 2 i + 1 are where in its run of 4 the i-th of the 4 values lies
            that belong to these 8 inputs. Positions of a run ascend.
        shape: N and K.
    """

    values: Tensor
    positions: Tensor
    shape: tuple[int, int]

    @classmethod
    def pack(cls, weight_NK: Tensor) -> NM24:
        """Store a weight that has at least 2 zeros in every 4 consecutive inputs.

        Raises:
            KernelError: naming the first run with more.

        >>> packed = NM24.pack(torch.tensor([[0.0, 5.0, 0.0, 7.0, 0.0, 0.0, 0.0, 9.0]]))
        >>> packed.values.tolist(), [f"{byte:08b}" for byte in packed.positions[0].tolist()]
        ([[5.0, 7.0, 0.0, 9.0]], ['11001101'])
        """
        num_out, num_in = weight_NK.shape
        runs = pad(weight_NK, (0, -num_in % 8)).view(num_out, -1, 4)
        nonzero = runs != 0
        too_many = (nonzero.sum(2) > 2).nonzero()
        if too_many.numel():
            row, run = too_many[0].tolist()
            raise KernelError(f"2:4 weight: row {row} has more than 2 nonzeros in inputs {4 * run} to {4 * run + 3}")
        kept = nonzero.byte().argsort(dim=2, descending=True, stable=True)[:, :, :2].sort(dim=2).values
        shifts = torch.arange(0, 8, 2, device=runs.device)
        positions = (kept.view(num_out, -1, 4) << shifts).sum(2).byte()
        return cls(runs.gather(2, kept).view(num_out, -1), positions, (num_out, num_in))

    def to_dense(self) -> Tensor:
        """The weight [N, K], exactly as it was packed; differentiable in `values`."""
        num_out, num_in = self.shape
        shifts = torch.arange(0, 8, 2, device=self.positions.device)
        kept = (self.positions.long()[:, :, None] >> shifts & 3).view(num_out, -1, 2)
        runs = self.values.new_zeros(*kept.shape[:2], 4)
        return runs.scatter(2, kept, self.values.view_as(kept)).view(num_out, -1)[:, :num_in]


def _index(kept_RH: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """`gidx` and `ptr` of a packed weight with these groups, `num_groups` to a step."""
    num_kept_R = kept_RH.sum(1)
    ptr = pad(num_kept_R.add(num_groups - 1).div(num_groups, rounding_mode="floor").cumsum(0), (1, 0))
    num_steps = int(ptr[-1])
    _check_int32("packed weight", (num_steps + 1) * num_groups)
    row, col = kept_RH.nonzero(as_tuple=True)
    rank = torch.arange(row.numel(), device=row.device)
    first_R = pad(num_kept_R.cumsum(0), (1, 0))
    slot = ptr[row] * num_groups + rank - first_R[row]
    # A slot that begins no group repeats the last one that did: the tail of its own step, which never starts empty.
    last = torch.zeros(num_steps * num_groups, dtype=torch.long, device=row.device)
    last[slot] = rank
    return pad(col[last.cummax(0).values], (0, num_groups)).int(), ptr.int()


def _begins(gidx: Tensor, num_steps: int) -> Tensor:
    """Bool [T, S]: False where a step repeats its last group to fill up."""
    num_groups = gidx.numel() // (num_steps + 1)
    gidx_TS = gidx[: num_steps * num_groups].view(num_steps, num_groups)
    return pad(gidx_TS.diff(dim=1) != 0, (1, 0), value=True)


def _row_of_step(ptr: Tensor, num_steps: int) -> Tensor:
    """Int64 [T]: the row block of each step."""
    return torch.searchsorted(ptr[1:], torch.arange(num_steps, dtype=ptr.dtype, device=ptr.device), right=True)


def blocks(weight_NK: Tensor, rows: int, cols: int, taps: int) -> Tensor:
    """The groups of a weight that is padded to whole ones, [R, H, V, g]; arguments as for `pack`."""
    num_out, num_in = weight_NK.shape
    runs = weight_NK.reshape(num_out, taps, num_in // taps)
    padded = pad(runs, (0, -(num_in // taps) % cols, 0, 0, 0, -num_out % rows))
    return padded.reshape(_ceil_div(num_out, rows), rows, -1, cols).transpose(1, 2)


def _check_pattern(weight_NK: Tensor, rows: int, cols: int, taps: int) -> None:
    if rows not in ROWS or cols not in COLS:
        raise KernelError(f"group of {rows} x {cols}: rows must be one of {ROWS} and columns one of {COLS}")
    if weight_NK.dim() != 2 or not weight_NK.numel():
        raise KernelError(f"weight: must be a matrix that is not empty, got {list(weight_NK.shape)}")
    if weight_NK.shape[1] % taps:
        raise KernelError(f"weight: {weight_NK.shape[1]} columns are no multiple of {taps} taps")
    _check_int32("weight", taps * (weight_NK.shape[1] // taps + cols))


def _check_int32(name: str, size: int) -> None:
    if size >= 2**31:
        raise KernelError(f"{name}: {size} columns or groups do not fit a 32-bit index")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
