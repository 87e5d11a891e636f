"""ONNX files in ONNX Runtime, on one execution provider. Run by latency_worker.py; needs numpy and onnxruntime.

Options: `provider` ("CPUExecutionProvider"), `precision` ("float32" keeps providers that would compute in less
from it, where they can be told; "native" lets them).
"""

from __future__ import annotations

from typing import Any

CPU = "CPUExecutionProvider"
TYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}
# What keeps a provider in float32: CUDA multiplies in TF32, OpenVINO in bfloat16 or float16 where the device can.
FLOAT32 = {
    "CUDAExecutionProvider": {"use_tf32": "0"},
    "OpenVINOExecutionProvider": {"load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}'},
}
# Providers on the CPU with threads of their own, and what sets their number.
THREADS = {"OpenVINOExecutionProvider": "num_of_threads", "XnnpackExecutionProvider": "intra_op_num_threads"}


def describe(options: dict[str, str]) -> dict[str, Any]:
    import onnxruntime

    provider = options["provider"]
    available = onnxruntime.get_available_providers()
    if provider not in available:
        names = ", ".join(name.replace("ExecutionProvider", "") for name in available)
        raise SystemExit(f"onnxruntime {onnxruntime.__version__} here has no {provider}, only {names}")
    return {"runtime": f"onnxruntime {onnxruntime.__version__} {provider}"}


class Session:
    """A file loaded, with its inputs."""

    def __init__(self, path: str, threads: int, options: dict[str, str]) -> None:
        self.session, self.note = open_session(path, threads, options)
        self.inputs = [
            (value.name, TYPES.get(value.type, value.type.replace("tensor(", "").replace(")", "")), value.shape)
            for value in self.session.get_inputs()
        ]
        self.path, self.options = path, options

    @property
    def precision(self) -> str:
        """What it computes in, as far as the file and the provider tell."""
        provider = self.options["provider"]
        if provider != CPU and (provider not in FLOAT32 or self.options["precision"] == "native"):
            return "provider's choice"
        with open(self.path, "rb") as file:
            # In pieces: the file must not count as memory that running it takes.
            if any(b"DequantizeLinear" in piece for piece in iter(lambda: file.read(2**20), b"")):
                return "int8"
        return next((dtype for _, dtype, _ in self.inputs if dtype.startswith("float")), "float32")

    def bind(self, feeds: dict[str, Any]) -> None:
        self.feeds = feeds

    def run(self, num_runs: int) -> None:
        run, feeds = self.session.run, self.feeds
        for _ in range(num_runs):
            run(None, feeds)

    def outputs(self) -> list[Any]:
        return list(self.session.run(None, self.feeds))


def open_session(path: str, threads: int, options: dict[str, str]) -> tuple[Any, str]:
    """A session on the provider alone; where it cannot run every node, one that says how many the CPU runs instead."""
    import onnxruntime

    provider = options["provider"]
    forced = options["precision"] == "float32"
    settings = dict(FLOAT32.get(provider, {})) if forced else {}
    if provider in THREADS:
        settings[THREADS[provider]] = str(threads)
    providers = [(provider, settings)]
    alone = session_options(threads)
    if provider == CPU:
        return onnxruntime.InferenceSession(path, alone, providers=providers), ""
    alone.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(path, alone, providers=providers)
        note = ""
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
        if "fallback to CPU EP" not in str(error):
            raise
        shared = session_options(threads)
        shared.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = onnxruntime.InferenceSession(path, shared, providers=providers)
        note = shared_note(session, provider)
    if session.get_providers()[0] != provider:  # its libraries did not load
        raise SystemExit(f"{provider}: installed, but does not start here")
    return session, note


def shared_note(session: Any, provider: str) -> str:
    """How many nodes the CPU runs; an error where that is all."""
    assignment = getattr(session, "get_provider_graph_assignment_info", None)
    if assignment is None:
        return "some nodes on the CPU"  # older versions do not tell how many
    count: dict[str, int] = {}
    for part in assignment():
        count[part.ep_name] = count.get(part.ep_name, 0) + len(part.get_nodes())
    if not count.get(provider):
        raise SystemExit(f"{provider} can run no node of it")
    return f"{count.get(CPU, 0)} of {sum(count.values())} nodes on the CPU"


def session_options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised
    # Threads spin while the network runs, as they do in production, and stop with it: the next process's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def load(path: str, threads: int, batch_size: int, options: dict[str, str]) -> Session:
    return Session(path, threads, options)
