"""Another machine, over the system's ssh: files and two stand-alone scripts go there, nothing of them stays.

One connection carries everything. Its own command on the far side makes a fresh folder, waits for the end of its
stdin and removes the folder: that end comes with the end of the measurement, an error, Ctrl-C, the death of this
process or of the network alike.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, cast

from sparsekit.errors import MeasurementError
from sparsekit.targets.machine import WORKER, Site
from sparsekit.targets.worker import last_words

# The user's configuration and known hosts hold; no question is asked that no one is there to answer.
OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15")
MARK = "sparsekit folder: "
HOLD = f"""
trap '' HUP INT TERM PIPE
folder=$(mktemp -d "${{TMPDIR:-/tmp}}/sparsekit.XXXXXXXX") || exit 1
echo "{MARK}$folder"
cat >/dev/null
rm -rf "$folder"
"""
GOODBYE_S = 20.0


@dataclass(frozen=True)
class Ssh:
    """A machine that ssh reaches without a password.

    Attributes:
        destination: `user@host`, `host`, or a `Host` of the ssh configuration.
        python: Python 3.8 or later there, with numpy and what the runtime needs.
        config: ssh configuration file instead of the user's own.
    """

    destination: str
    port: int | None = None
    python: str = "python3"
    config: str | None = None

    @contextmanager
    def site(self, script: Path, files: Sequence[Path]) -> Iterator[Site]:
        """A fresh folder there with `files`, the worker and the `script` of its runtime; removed whatever happens.

        Raises:
            MeasurementError: ssh is missing, cannot connect or cannot write there; in ssh's own words.
        """
        if shutil.which("ssh") is None:
            raise MeasurementError(f"{self._name}: no ssh on this machine")
        with TemporaryDirectory(prefix="sparsekit-") as sockets, self._folder(f"{sockets}/s") as folder:
            ssh = self._command(f"{sockets}/s")
            names = [f"{i}{''.join(file.suffixes[-1:])}" for i, file in enumerate(files)]
            self._copy(ssh, folder, [(WORKER, "worker.py"), (script, "runtime.py"), *zip(files, names, strict=True)])
            # What a runtime leaves in the temporary folder (ONNX Runtime does) goes with ours.
            start = f"exec env TMPDIR={folder} {shlex.quote(self.python)} {folder}/worker.py {folder}/runtime.py"
            yield Site((*ssh, start), tuple(f"{folder}/{name}" for name in names))

    @property
    def _name(self) -> str:
        return f"ssh://{self.destination}" + (f":{self.port}" if self.port else "")

    def _command(self, socket: str, *options: str) -> tuple[str, ...]:
        """What runs a shell command there, over the connection of `socket`."""
        config = ("-F", self.config) if self.config else ()
        port = ("-p", str(self.port)) if self.port else ()
        return ("ssh", *OPTIONS, "-S", socket, *options, *config, *port, "--", self.destination)

    @contextmanager
    def _folder(self, socket: str) -> Iterator[str]:
        """A folder there, for as long as the connection lasts that this opens at `socket`."""
        command = (*self._command(socket, "-o", "ControlMaster=yes"), f"exec sh -c {shlex.quote(HOLD)}")
        with TemporaryFile() as stderr:
            # A session of its own: Ctrl-C must not end the connection before the folder is removed.
            process = Popen(command, bufsize=0, stdin=PIPE, stdout=PIPE, stderr=stderr, start_new_session=True)
            stdin, stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
            line = ""
            with stdout:
                try:
                    line = stdout.readline().decode(errors="replace").strip()
                    if not line:
                        words = last_words(stderr, f"ssh ended with status {process.wait()}")
                        raise MeasurementError(f"{self._name}: {words}")
                    if not line.startswith(MARK):
                        raise MeasurementError(f"{self._name}: the shell there prints {line!r} before any command runs")
                    yield line.removeprefix(MARK)
                finally:
                    stdin.close()
                    try:
                        process.wait(GOODBYE_S if line else 1.0)
                    except subprocess.TimeoutExpired:
                        process.kill()  # the far side sees the connection end and removes the folder by itself
                        process.wait()

    def _copy(self, ssh: Sequence[str], folder: str, files: Sequence[tuple[Path, str]]) -> None:
        with TemporaryFile() as archive:
            with tarfile.open(fileobj=archive, mode="w") as tar:
                for file, name in files:
                    tar.add(file.resolve(), name)
            archive.seek(0)
            command = (*ssh, f"tar -xf - -C {folder}")
            with TemporaryFile() as stderr:
                status = subprocess.run(command, stdin=archive, stderr=stderr, start_new_session=True).returncode
                if status:
                    words = last_words(stderr, f"tar ended with status {status}")
                    raise MeasurementError(f"{self._name}: files could not be copied there: {words}")
