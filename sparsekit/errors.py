"""Every error a user can meet, in one tree.

SparsekitError            exit 1   base of all; the message is one line that names the thing
|- UsageError             exit 2   unknown name, malformed option, output folder in the way
|  |- BudgetError         exit 2   a budget that cannot be read or met; names the floor
|  `- DataError           exit 2   missing or damaged data, weights, recipe, checkpoint
|- TraceError             exit 1   the model could not be recorded
|- PlanError              exit 1   a plan that does not fit the model it is applied to
|- KernelError            exit 1   a tensor that a sparse layer cannot hold or take
|- QualityError           exit 3   a gate that the user set was missed
|- ExportError            exit 4   the ONNX file is wrong, or not equal to the network
`- MeasurementError       exit 5   a runtime is missing, or the machine too busy to measure
"""


class SparsekitError(Exception):
    """Base class; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(SparsekitError, ValueError):
    """Something the user named does not exist or cannot be read."""

    exit_code = 2


class BudgetError(UsageError):
    """A budget that cannot be read, or lies below the floor the network can reach."""


class DataError(UsageError):
    """Data, weights, a recipe or a checkpoint is missing, damaged or of another shape."""


class TraceError(SparsekitError):
    """The model's forward could not be recorded."""


class PlanError(SparsekitError, ValueError):
    """A plan does not fit the model it is applied to."""


class KernelError(SparsekitError, ValueError):
    """Weights whose zeros do not have the pattern that was asked for, or a tensor that a kernel cannot take."""


class QualityError(SparsekitError):
    """A quality gate that the user asked for was missed."""

    exit_code = 3


class ExportError(SparsekitError):
    """The exported file is invalid, or differs from the network by more than allowed."""

    exit_code = 4


class MeasurementError(SparsekitError):
    """A runtime is missing, or nothing trustworthy could be measured."""

    exit_code = 5


def nearest(name: str, valid: list[str]) -> str:
    """The valid names closest to `name`, as the tail of an error message.

    >>> nearest("resnet65", ["resnet56", "vgg16"])
    '; did you mean resnet56?'
    >>> nearest("zzz", ["a1", "b2"])
    '; valid: a1, b2'
    """
    from difflib import get_close_matches

    close = get_close_matches(name, valid, n=3)
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; valid: {', '.join(sorted(valid))}"
