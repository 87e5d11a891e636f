"""ONNX files in OpenVINO. Run by latency_worker.py; needs numpy and openvino.

Options: `device` ("CPU"), `precision` ("float32"; "native" lets the device choose, bfloat16 on recent CPUs).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

PRECISIONS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "int8"}
# The layers that multiply: what they compute in is what the network computes in.
LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")


def describe(options: dict[str, str]) -> dict[str, Any]:
    import openvino

    core, device = openvino.Core(), options["device"]
    if device.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
        raise SystemExit(f"openvino has no device {device} here, only {', '.join(core.available_devices)}")
    name = core.get_property(device, "FULL_DEVICE_NAME")
    device_facts = {} if device == "CPU" else {"device": name}
    return {"runtime": f"openvino {openvino.__version__.split('-')[0]} {device}", "device": device_facts}


class Session:
    """A file compiled for fixed shapes, one stream; `precision` is what its multiplying layers run in."""

    note = ""

    def __init__(self, path: str, threads: int, batch_size: int, options: dict[str, str]) -> None:
        import openvino

        model = openvino.Core().read_model(path)
        model.reshape({value.any_name: fixed(value.partial_shape, batch_size) for value in model.inputs})
        self.inputs = [
            (value.any_name, str(np.dtype(value.element_type.to_dtype())), sizes(value.partial_shape))
            for value in model.inputs
        ]
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if options["device"] == "CPU":
            # Pinned threads would share a CPU with whoever is on it already.
            settings.update({"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False})
        if options["precision"] == "float32":
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = openvino.compile_model(model, options["device"], settings)
        self.request = compiled.create_infer_request()
        self.precision = precision_of(compiled)

    def bind(self, feeds: dict[str, Any]) -> None:
        import openvino

        self.feeds = feeds  # the tensors below share their memory
        for i, feed in enumerate(feeds.values()):
            self.request.set_input_tensor(i, openvino.Tensor(feed, shared_memory=True))

    def run(self, num_runs: int) -> None:
        infer = self.request.infer
        for _ in range(num_runs):
            infer(share_outputs=True)

    def outputs(self) -> list[Any]:
        self.run(1)
        return [np.array(tensor.data) for tensor in self.request.output_tensors]


def sizes(shape: Any) -> list[int | None]:
    return [dimension.get_length() if dimension.is_static else None for dimension in shape]


def fixed(shape: Any, batch_size: int) -> Any:
    """The shape with the batch for a first dimension that has no size."""
    import openvino

    return openvino.PartialShape(
        [
            batch_size if axis == 0 and size is None else (-1 if size is None else size)
            for axis, size in enumerate(sizes(shape))
        ]
    )


def precision_of(compiled: Any) -> str:
    """The precisions of the layers that multiply, the most frequent first."""
    layers = [layer.get_rt_info() for layer in compiled.get_runtime_model().get_ops()]
    found = Counter(
        PRECISIONS.get(layer["runtimePrecision"].astype(str), layer["runtimePrecision"].astype(str))
        for layer in layers
        if "layerType" in layer and layer["layerType"].astype(str) in LAYERS
    )
    return "+".join(name for name, _ in found.most_common()) or "unknown"


def load(path: str, threads: int, batch_size: int, options: dict[str, str]) -> Session:
    return Session(path, threads, batch_size, options)
