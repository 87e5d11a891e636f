"""Targets: their names, that every runtime computes what ONNX Runtime does, and ssh against a real server."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from sparsekit import latency, measure_latency
from sparsekit.errors import ExportError, MeasurementError, UsageError
from sparsekit.latency import measure_files
from sparsekit.samples import relative_error
from sparsekit.targets import Target, machine, parse_target, run_onnxruntime, run_torch, runtimes, ssh
from sparsekit.targets.worker import Conditions, start
from tests.test_latency import save_model

SCRIPTS = [machine.WORKER, *sorted(Path(runtimes.__file__).parent.glob("run_*.py"))]


# Names


@pytest.mark.parametrize(
    ("name", "script", "options"),
    [
        ("onnxruntime", "onnxruntime", {"provider": "CPUExecutionProvider", "precision": "float32"}),
        (
            "onnxruntime:CPU?precision=native",
            "onnxruntime",
            {"provider": "CPUExecutionProvider", "precision": "native"},
        ),
        ("ssh://a?runtime=onnxruntime:cuda", "onnxruntime", {"provider": "CUDAExecutionProvider"}),
        ("ssh://a?runtime=onnxruntime:CoreMLExecutionProvider", "onnxruntime", {"provider": "CoreMLExecutionProvider"}),
        ("ssh://a?runtime=openvino", "openvino", {"device": "CPU"}),
        ("ssh://a?runtime=openvino:gpu", "openvino", {"device": "GPU"}),
        ("ssh://a?runtime=ncnn&precision=native", "ncnn", {"precision": "native"}),
        ("ssh://a?runtime=executorch", "executorch", {"precision": "float32"}),
        ("torch", "torch", {"device": "cpu", "compile": ""}),
        ("torch:compile", "torch", {"device": "cpu", "compile": "1"}),
        ("torch:cuda", "torch", {"device": "cuda", "compile": ""}),
        ("torch:compile:cuda", "torch", {"device": "cuda", "compile": "1"}),
    ],
)
def test_a_name_says_runtime_and_options(name: str, script: str, options: dict[str, str]) -> None:
    target = parse_target(name)
    assert target.name == name
    assert target.runtime.script.name == f"run_{script}.py"
    assert target.runtime.script.is_file()
    assert options.items() <= target.runtime.options.items()


def test_only_the_cpu_is_timed_by_cpu_time() -> None:
    names = ("torch", "torch:cuda", "ssh://a?runtime=openvino", "ssh://a?runtime=openvino:GPU", "ssh://a")
    assert [parse_target(name).runtime.on_cpu for name in names] == [True, False, True, False, True]
    assert not parse_target("ssh://a?runtime=onnxruntime:CUDA").runtime.on_cpu


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("ssh://board", ssh.Ssh("board")),
        ("ssh://pi@Board:2222", ssh.Ssh("pi@Board", 2222)),
        ("ssh://pi@[::1]:22", ssh.Ssh("pi@::1", 22)),
        ("ssh://a?python=/opt/bin/python&config=/tmp/c", ssh.Ssh("a", None, "/opt/bin/python", "/tmp/c")),
    ],
)
def test_a_name_says_where(name: str, where: ssh.Ssh) -> None:
    assert parse_target(name).machine == where


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onnxruntme", "runtime 'onnxruntme': unknown; did you mean onnxruntime?"),
        ("onnxruntime:CUDDA", "onnxruntime:CUDDA: no such execution provider; did you mean CUDA"),
        ("torch:compiled", "torch:compiled: unknown 'compiled'; did you mean compile?"),
        ("ncnn:gpu", "ncnn:gpu: ncnn has no variants"),
        ("onnxruntime?precison=native", "unknown key 'precison'; did you mean precision?"),
        ("onnxruntime?precision=nativ", "precision 'nativ': unknown; did you mean native?"),
        ("onnxruntime?python=x", "unknown key 'python'"),
        ("ssh://a?pyton=x", "unknown key 'pyton'; did you mean python?"),
        ("ssh://a:b", "target 'ssh://a:b': Port could not be cast"),
        ("ssh://", r"expected ssh://\[user@\]host\[:port\]"),
        ("ssh://a/folder", r"expected ssh://\[user@\]host\[:port\]"),
        ("ssh://a:secret@b", r"expected ssh://\[user@\]host\[:port\]"),
    ],
)
def test_a_name_that_means_nothing_is_bad_usage_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_target(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"), [("openvino", "openvino"), ("ncnn", "ncnn"), ("executorch", "executorch")]
)
def test_a_runtime_that_is_not_installed_says_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(MeasurementError) as caught:
        parse_target(name)
    assert str(caught.value) == f"{package}: not installed; pip install 'sparsekit[{package}]'"
    assert parse_target(f"ssh://a?runtime={name}").name  # what is missing here may be there


# The scripts that go to other machines


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_stand_alone_and_are_python_3_8(script: Path) -> None:
    tree = ast.parse(script.read_text(), feature_version=(3, 8))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert not {name for name in names if name is None or name.startswith("sparsekit")}
    top = {node.names[0].name.split(".")[0] for node in tree.body if isinstance(node, ast.Import)}
    assert top <= {*sys.stdlib_module_names, "numpy"}  # a runtime is imported by those who ask for it


# Every runtime


class Net(nn.Module):
    """Two convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.conv(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


INPUTS = (torch.zeros(1, 3, 12, 12),)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def onnx_path(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network written by hand: torch's exporter takes seconds."""
    constants = [onnx.numpy_helper.from_array(x.detach().numpy(), name) for name, x in net.named_parameters()]
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "depthwise.weight", "depthwise.bias"], ["c"], group=16),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3, 12, 12])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 5])
    graph = helper.make_graph(nodes, "net", [x], [y], constants)
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def outputs(target: Target, path: Path, batch_size: int = 1, threads: int = 1) -> tuple[list[Any], Any]:
    how = Conditions(threads, batch_size, None, target.runtime.options)
    with target.site([path], batch_size) as site, start(target.name, site, [path], how) as worker:
        loaded = worker.load(0, min_warmups=1, warmup_s=0)
        assert worker.run(0, 2)[0].wall_ns > 0
        return worker.outputs(0), loaded


def installed(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        pytest.param("openvino", 3, marks=installed("openvino")),
        pytest.param("ncnn", 1, marks=installed("ncnn", "pnnx")),
        pytest.param("torch", 3),
        pytest.param("executorch", 1, marks=installed("executorch")),
    ],
)
def test_every_runtime_computes_what_onnx_runtime_does_in_float32(
    name: str, batch_size: int, net: nn.Module, onnx_path: Path
) -> None:
    target = parse_target(name)
    path = target.prepare(net, INPUTS, onnx_path, onnx_path.parent)
    assert path.name == f"net{target.runtime.suffix if name != 'openvino' else '.onnx'}"
    actual, loaded = outputs(target, path, batch_size, threads=2)
    expected, _ = outputs(parse_target("onnxruntime"), onnx_path, batch_size)
    assert [y.size for y in expected] == [batch_size * 5]
    error = relative_error(actual, expected)
    assert error is not None
    assert error < 2e-6  # some hundred float32 products, summed in another order
    assert loaded.precision == "float32"


@installed("openvino")
def test_native_precision_is_reported_as_the_runtime_has_it(onnx_path: Path) -> None:
    actual, loaded = outputs(parse_target("openvino?precision=native"), onnx_path)
    expected, _ = outputs(parse_target("onnxruntime"), onnx_path)
    error = relative_error(actual, expected)
    assert error is not None
    assert (loaded.precision == "float32") == (error < 2e-6)


@installed("ncnn", "pnnx")
def test_a_file_is_held_against_the_onnx_file_beside_it(
    net: nn.Module, onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "WARMUP_S", 0.0)
    target = parse_target("ncnn")
    shutil.copy(onnx_path, tmp_path / "a.onnx")
    path = target.prepare(net, INPUTS, tmp_path / "a.onnx", tmp_path)
    limits: dict[str, Any] = {"target": target, "min_launches": 2, "max_launches": 2, "max_seconds": 0}
    (x,) = measure_latency([path], **limits).latencies
    assert x.output_error is not None
    assert 0 < x.output_error < 2e-6
    model = onnx.load(onnx_path)
    model.graph.node[-1].attribute.add(name="alpha", f=-1.0, type=onnx.AttributeProto.FLOAT)
    onnx.save(model, tmp_path / "a.onnx")
    (x,) = measure_latency([path], **limits).latencies
    assert x.output_error is not None
    assert x.output_error > 0.1
    (tmp_path / "a.onnx").unlink()
    (x,) = measure_latency([path], **limits).latencies
    assert x.output_error is None
    save_model(tmp_path / "a.onnx", ["batch", 3, 12, 12])
    with pytest.raises(MeasurementError, match=r"a\.ncnn: ncnn gives outputs of other sizes than ONNX Runtime"):
        measure_latency([path], **limits)


@installed("ncnn", "pnnx")
def test_onnx_files_are_converted_where_a_runtime_runs_others(onnx_path: Path) -> None:
    (time_ms,) = measure_files([onnx_path], target="ncnn", num_launches=1)
    assert time_ms > 0


@installed("ncnn", "pnnx")
def test_ncnn_takes_no_batch_but_one_since_it_would_run_the_first_of_it_alone(onnx_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"net\.onnx: ncnn runs batches of one, not \[\[3, 3, 12, 12\]\]"):
        measure_files([onnx_path], target="ncnn", batch_size=3)


class Viewing(nn.Module):
    """Two inputs of different dimensions, and a view that channels_last breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(400, 5)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(x).view(x.shape[0], 400)) + z
        return logits


def test_a_program_that_channels_last_breaks_is_run_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, z = Viewing(), torch.ones(1, 5)
    path = parse_target("torch").prepare(net, (*INPUTS, z), tmp_path / "m.onnx", tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    session = run_torch.Session(str(path), 1, {"device": "cpu", "compile": "", "precision": "float32"})
    assert [shape[1:] for _, _, shape in session.inputs] == [[3, 12, 12], [5]]
    x = torch.randn(2, 3, 12, 12)
    session.bind({"0": x.numpy(), "1": z.repeat(2, 1).numpy()})
    assert session.note == "channels_last"
    (actual,) = session.outputs()
    assert session.note == "contiguous_format"
    torch.testing.assert_close(torch.from_numpy(actual), net(x, z).detach())


def test_a_file_of_another_runtime_is_refused_in_one_line(onnx_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"net\.onnx: torch runs \.pt2 files$"):
        measure_files([onnx_path], target="torch")


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_torch_cannot_export_is_an_export_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"m\.pt2: Branching cannot be exported: ") as caught:
        parse_target("torch").prepare(Branching(), INPUTS, tmp_path / "m.onnx", tmp_path)
    assert "\n" not in str(caught.value)


# ONNX Runtime's execution providers


def test_a_provider_that_runs_nothing_of_a_network_is_refused(onnx_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"onnxruntime:Tensorrt: onnxruntime \S+ here has no Tensorrt"):
        measure_files([onnx_path], target="onnxruntime:Tensorrt")
    pytest.importorskip("onnxruntime")
    if "AzureExecutionProvider" not in __import__("onnxruntime").get_available_providers():
        pytest.skip("this onnxruntime has no provider that runs nothing")
    with pytest.raises(MeasurementError, match=r"net\.onnx: AzureExecutionProvider can run no node of it"):
        measure_files([onnx_path], target="onnxruntime:Azure")


def test_nodes_that_the_cpu_runs_instead_are_counted() -> None:
    def part(name: str, size: int) -> SimpleNamespace:
        return SimpleNamespace(ep_name=name, get_nodes=lambda: [None] * size)

    parts = [part("X", 3), part(run_onnxruntime.CPU, 2), part("X", 4)]
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    assert run_onnxruntime.shared_note(session, "X") == "2 of 9 nodes on the CPU"
    with pytest.raises(SystemExit, match="Y can run no node"):
        run_onnxruntime.shared_note(session, "Y")


# Where it runs


def test_the_fingerprint_says_device_runtime_and_precision() -> None:
    fingerprint = parse_target("onnxruntime").fingerprint()
    assert fingerprint["runtime"].startswith("onnxruntime ")
    assert fingerprint["precision"] == "float32"
    assert fingerprint["cpu"]
    assert fingerprint == parse_target("onnxruntime").fingerprint()
    assert fingerprint != parse_target("onnxruntime?precision=native").fingerprint()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has CPU affinity")
def test_every_thread_stays_on_the_cpus_given(onnx_path: Path) -> None:
    target = parse_target("onnxruntime")
    cpu = max(os.sched_getaffinity(0))
    how = Conditions(2, 1, (cpu,), target.runtime.options)
    with target.site([onnx_path]) as site, start(target.name, site, [onnx_path], how) as worker:
        worker.load(0, min_warmups=1, warmup_s=0)
        threads = [int(path.name) for path in Path(f"/proc/{worker.pid}/task").iterdir()]
        assert len(threads) > 1
        assert {frozenset(os.sched_getaffinity(thread)) for thread in threads} == {frozenset({cpu})}
    with pytest.raises(MeasurementError, match=r"^onnxruntime: affinity 4000: .*no such CPU here"):
        measure_files([onnx_path], affinity=[4000])


# ssh


@dataclass(frozen=True)
class Server:
    """An ssh server on this machine, with keys that are thrown away; `folder` is where it makes folders."""

    port: int
    config: Path
    folder: Path

    def name(self, **keys: object) -> str:
        query = "&".join(
            f"{key}={value}" for key, value in ({"python": sys.executable, "config": self.config} | keys).items()
        )
        return f"ssh://127.0.0.1:{self.port}?{query}"

    def left_behind(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    daemon = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if daemon is None or shutil.which("ssh") is None:
        pytest.skip("no ssh and sshd on this machine (Debian: openssh-server)")
    home, folder = tmp_path_factory.mktemp("ssh"), tmp_path_factory.mktemp("there")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / key], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nAuthorizedKeysFile {home}/user.pub\n"
        f"UsePAM no\nStrictModes no\nPasswordAuthentication no\nPidFile none\nSetEnv TMPDIR={folder}\n"
    )
    (home / "known").write_text(f"[127.0.0.1]:{port} {(home / 'host.pub').read_text()}")
    (home / "config").write_text(
        f"IdentityFile {home}/user\nIdentitiesOnly yes\nUserKnownHostsFile {home}/known\nGlobalKnownHostsFile none\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd as root wants it; Debian makes it when the service starts
    with (home / "log").open("w") as log:
        process = subprocess.Popen([daemon, "-D", "-e", "-f", home / "sshd_config"], stderr=log, start_new_session=True)
        try:
            wait_for(lambda: "listening" in (home / "log").read_text() or process.poll() is not None)
            if process.poll() is not None:
                pytest.skip(f"sshd does not start: {(home / 'log').read_text().splitlines()[-1:]}")
            yield Server(port, home / "config", folder)
        finally:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds; a test that never gets there fails."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("waited 20 s in vain")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text() if sys.platform == "linux" else True


def test_files_are_run_on_the_machine_that_ssh_reaches_and_nothing_is_left_there(
    server: Server, onnx_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = parse_target(server.name())
    with target.site([onnx_path, onnx_path]) as site:
        (folder,) = server.folder.iterdir()
        assert {path.name for path in folder.iterdir()} == {"worker.py", "runtime.py", "0.onnx", "1.onnx"}
        assert site.paths == (f"{folder}/0.onnx", f"{folder}/1.onnx")
    assert server.left_behind() == []
    monkeypatch.setattr(latency, "WARMUP_S", 0.0)
    result = measure_latency([onnx_path, onnx_path], target=target, min_launches=2, max_launches=2, max_seconds=0)
    assert server.left_behind() == []
    assert [x.path for x in result.latencies] == [onnx_path] * 2
    assert [x.output_error for x in result.latencies] == [0.0] * 2
    assert result.target == target.name
    assert len(result.ratios) == 1
    assert target.fingerprint() == parse_target("onnxruntime").fingerprint()


def test_an_error_there_is_one_line_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_text("hello")
    with pytest.raises(MeasurementError, match=r"broken\.onnx: InvalidProtobuf: [^\n]*Protobuf parsing failed"):
        measure_files([broken], target=server.name())
    with pytest.raises(MeasurementError, match=r"ssh://127.*: env: [^\n]*/no/python[^\n]*No such file"):
        measure_files([broken], target=server.name(python="/no/python"))
    assert server.left_behind() == []


SLEEPER = """
import json, os, sys, time
print(json.dumps({"runtime": "", "device": {}}), flush=True)
open(PIDS, "a").write(f"{os.getpid()} ")
for line in sys.stdin:
    pass
"""


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workers that never answer to a load write who they are."""
    pids = tmp_path / "pids"
    (tmp_path / "sleeper.py").write_text(SLEEPER.replace("PIDS", repr(str(pids))))
    monkeypatch.setattr(ssh, "WORKER", tmp_path / "sleeper.py")
    return pids


def test_ctrl_c_leaves_neither_files_nor_processes_there(server: Server, onnx_path: Path, pids: Path) -> None:
    def interrupt_when_it_runs(signal: int, frame: object) -> None:
        if pids.exists():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt_when_it_runs)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            measure_files([onnx_path], target=server.name())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert server.left_behind() == []
    wait_for(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()))


def test_the_death_of_this_process_leaves_nothing_there_either(
    server: Server, onnx_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = (
        "import sys",
        "from pathlib import Path",
        "from sparsekit.targets import parse_target",
        "target = parse_target(sys.argv[1])",
        "with target.site([Path(sys.argv[2])]):",
        "    print('there', flush=True)",
        "    sys.stdin.read()",
    )
    command = [sys.executable, "-c", "\n".join(lines), server.name(), str(onnx_path)]
    environment = os.environ | {"TMPDIR": str(tmp_path_factory.mktemp("here"))}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        assert len(server.left_behind()) == 1
        process.kill()
    wait_for(lambda: server.left_behind() == [])


def test_a_host_whose_key_is_not_known_is_refused(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(server.config.read_text().replace("/known", "/unknown"))
    with pytest.raises(MeasurementError, match=r"^ssh://127\.0\.0\.1:\d+: Host key verification failed\.$"):
        parse_target(server.name(config=config)).fingerprint()
    assert not (server.config.parent / "unknown").exists()
    assert server.left_behind() == []


def test_a_machine_that_does_not_let_us_in_or_is_not_there_is_one_line(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(server.config.read_text().replace("/user", "/host"))
    with pytest.raises(MeasurementError, match=r"^ssh://127\.0\.0\.1:\d+: \S+: Permission denied \(publickey[^\n]*$"):
        parse_target(server.name(config=config)).fingerprint()
    with pytest.raises(MeasurementError, match=r"^ssh://127\.0\.0\.1:1: [^\n]*Connection refused$"):
        parse_target(f"ssh://127.0.0.1:1?config={server.config}").fingerprint()
