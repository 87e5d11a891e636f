"""The layers of a network, found in its recorded forward: what multiplies with a parameter, and what follows.

They are looked for among the ops and not among the modules: the weights of nn.MultiheadAttention, say, are used while
no module that holds them is called, and a recorded program has no modules at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsekit.program import Program
from sparsekit.steps import Value, values
from sparsekit.surgery import tensor_of


@dataclass(frozen=True)
class Convolution:
    """How a convolution slides; sizes are per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    num_conv_groups: int


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """A step that normalises with statistics which nothing else uses.

    Attributes:
        step: its number.
        input: index of the tensor that it reads.
        output: index of the tensor that it makes.
        states: names of the parameters and buffers "weight", "bias", "running_mean", "running_var", as far as there
            are.
        eps: added to the variance.
    """

    step: int
    input: int
    output: int
    states: Mapping[str, str]
    eps: float

    @property
    def name(self) -> str:
        """The path of the module."""
        return self.states["running_mean"].rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Stream:
    """What a layer's output is added to.

    Attributes:
        value: index of the tensor; it is there, as it will be added, before the layer runs.
        path: numbers of the steps that move the values of the output to other places, between its end and the sum.
    """

    value: int
    path: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or a matrix product with a parameter.

    Attributes:
        weight: name of the parameter; of the largest of them where the factor is computed from parameters.
        bias: name of the parameter that is added per output.
        inputs_first: the weight is [inputs, outputs, ...]; that of convolutions is [inputs, outputs / conv groups, ..].
        convolution: None for a matrix product, which takes rows of inputs.
        step: number of the step that multiplies.
        input: index of the tensor that it reads.
        end: number of the step before which the output is there, bias included.
        output: index of that tensor, [N, outputs, ...] of a convolution, else [..., outputs].
        is_plain: weight and bias are parameters as they are, and have no other uses.
        norm: the BatchNorm that reads this very output.
        stream: None where the output, or what the norm makes of it, is not added to anything made before.
    """

    weight: str
    bias: str | None
    inputs_first: bool
    convolution: Convolution | None
    step: int
    input: int
    end: int
    output: int
    is_plain: bool
    norm: BatchNorm | None
    stream: Stream | None

    @property
    def name(self) -> str:
        """The path of the module, or the weight's own name."""
        return self.weight.removesuffix(".weight")

    @property
    def last(self) -> int:
        """Number of the step before which the output of the norm is there, or without one the layer's."""
        return self.norm.step + 1 if self.norm else self.end

    @property
    def made(self) -> int:
        """Index of that tensor."""
        return self.norm.output if self.norm else self.output

    @property
    def channel_dim(self) -> int:
        """The dimension of input and output that holds channels."""
        return 1 if self.convolution else -1


def layers_of(program: Program) -> list[Layer]:
    """In the order of the forward pass; those alone that read what the inputs have a say in."""
    forward = _Forward(program)
    return [layer for number in range(len(forward.steps)) if (layer := forward.layer(number))]


def batch_norms_of(program: Program) -> list[BatchNorm]:
    """In the order of the forward pass."""
    forward = _Forward(program)
    return [norm for number in range(len(forward.steps)) if (norm := forward.batch_norm(number))]


# They move values to other places, and make no others.
_REARRANGEMENTS = ("alias", "clone", "permute", "reshape", "roll", "slice", "squeeze", "transpose", "unsqueeze")
_NORM_STATES = ("weight", "bias", "running_mean", "running_var")


class _Forward:
    """The pass of a program in eval mode, and who reads what in it."""

    def __init__(self, program: Program) -> None:
        recorded = program.evaluated
        self.program, self.steps, self.states = program, recorded.steps, recorded.states
        self.num_uses: Counter[int] = Counter()
        self.readers: dict[int, list[int]] = {}
        self.made = dict.fromkeys(recorded.inputs, -1)  # by which step first
        self.follows = set(recorded.inputs)  # what the inputs have a say in
        parameters = dict(program.named_parameters())
        # What a value is computed from, without the inputs; fixed filters, of blurs say, are buffers.
        self.sources = {index: {name} if name in parameters else set() for index, name in self.states.items()}
        for number, step in enumerate(self.steps):
            read = values(step.args)
            for index in dict.fromkeys(read):
                self.readers.setdefault(index, []).append(number)
                self.num_uses[index] += 1
            for index in step.outputs:
                self.made.setdefault(index, number)
            if not self.follows.isdisjoint(read):
                self.follows.update(step.outputs)
                continue
            for index in step.outputs:
                self.sources.setdefault(index, set()).update(*(self.sources.get(source, ()) for source in read))

    def layer(self, number: int) -> Layer | None:
        step = self.steps[number]
        sliding: Convolution | None = None
        match self._op(number), step.args:
            case "convolution", {"input": x, "weight": factor, "bias": added, "transposed": inputs_first}:
                sliding = _sliding(step.args)
            case "mm", {"self": x, "mat2": factor}:
                (factor, inputs_first), added = self._turned_back(factor), None
            case "addmm", {"self": added, "mat1": x, "mat2": factor} if not {"alpha", "beta"} & step.args.keys():
                factor, inputs_first = self._turned_back(factor)
            case _:
                return None
        weight, bias = self._weight(factor.index), self._vector(added)
        if weight is None or x.index not in self.follows:
            return None
        is_plain = self._is_own(factor) and (added is None or (bias is not None and self._is_own(added)))
        end, output = number + 1, step.outputs[0]
        if self._op(number) == "mm" and (found := self._biased(end, output)):
            end, output, bias = found
        norm = self._norm(end, output) if output == step.outputs[0] else None
        last, made = (norm.step + 1, norm.output) if norm else (end, output)
        stream = self._stream(last, made, before=number)
        return Layer(weight, bias, inputs_first, sliding, number, x.index, end, output, is_plain, norm, stream)

    def batch_norm(self, number: int) -> BatchNorm | None:
        step = self.steps[number]
        if self._op(number) != "native_batch_norm" or step.args["training"]:
            return None
        given = {name: step.args[name] for name in _NORM_STATES if step.args[name] is not None}
        states = {name: state for name, value in given.items() if (state := self._state(value))}
        kept = [step.args[name] for name in _NORM_STATES[2:]]
        if states.keys() != given.keys() or any(value is None or self.num_uses[value.index] > 1 for value in kept):
            return None
        if step.args["input"].index not in self.follows:
            return None
        return BatchNorm(number, step.args["input"].index, step.outputs[0], states, step.args["eps"])

    def _op(self, number: int) -> str:
        return self.steps[number].op.split(".")[1]

    def _reads(self, moment: int, value: int) -> Iterator[int]:
        """Steps from `moment` on that read the value, as long as nothing has written into it."""
        for number in self.readers.get(value, ()):
            if number >= moment:
                yield number
                if value in self.steps[number].outputs:
                    return

    def _state(self, value: Any) -> str | None:
        return self.states.get(value.index) if isinstance(value, Value) else None

    def _is_own(self, value: Value) -> bool:
        """Whether it is a parameter or buffer that nothing else reads."""
        return value.index in self.states and self.num_uses[value.index] == 1

    def _weight(self, index: int) -> str | None:
        """The largest parameter from which a value is computed."""
        names = sorted(self.sources.get(index, ())) if index not in self.follows else []
        return max(names, key=lambda name: tensor_of(self.program, name).numel(), default=None)

    def _vector(self, value: Any) -> str | None:
        """The name of a parameter of one dimension."""
        name = self._state(value)
        tensor = tensor_of(self.program, name) if name else None
        return name if isinstance(tensor, nn.Parameter) and tensor.dim() == 1 else None

    def _turned_back(self, value: Value) -> tuple[Value, bool]:
        """What a matrix is the transpose of; or it itself, and True."""
        if (number := self.made.get(value.index)) is not None:
            args = self.steps[number].args
            if self._op(number) in ("t", "transpose") or args.get("dims") == [1, 0]:
                source: Value = args["self"]
                return source, False
        return value, True

    def _biased(self, moment: int, value: int) -> tuple[int, int, str] | None:
        """Where a bias is added to a product behind it, the step behind that, the sum, and the bias."""
        for number in self._reads(moment, value):
            step = self.steps[number]
            if self._op(number) == "reshape":
                return self._biased(number + 1, step.outputs[0])
            added = self._added(number, value)
            bias = self._vector(added)
            if added and bias and self._is_own(added):
                return number + 1, step.outputs[0], bias
        return None

    def _added(self, number: int, value: int) -> Value | None:
        """What a step adds to the value."""
        args = self.steps[number].args
        if self._op(number) not in ("add", "add_") or "alpha" in args:
            return None
        others = [term for term in (args["self"], args["other"]) if isinstance(term, Value) and term.index != value]
        return others[0] if len(others) == 1 else None

    def _norm(self, moment: int, value: int) -> BatchNorm | None:
        norms = (self.batch_norm(number) for number in self._reads(moment, value))
        return next((norm for norm in norms if norm and norm.input == value), None)

    def _stream(self, moment: int, value: int, *, before: int, path: tuple[int, ...] = ()) -> Stream | None:
        for number in self._reads(moment, value):
            other = self._added(number, value)
            if other and other.index in self.follows and self.made[other.index] < before:
                written = any(other.index in self.steps[between].outputs for between in range(before, number))
                return None if written else Stream(other.index, path)
            if self._op(number) in _REARRANGEMENTS:
                (moved,) = self.steps[number].outputs
                found = self._stream(number + 1, moved, before=before, path=(*path, number))
                if found:
                    return found
        return None


def _sliding(args: Mapping[str, Any]) -> Convolution:
    return Convolution(tuple(args["stride"]), tuple(args["padding"]), tuple(args["dilation"]), args["groups"])
