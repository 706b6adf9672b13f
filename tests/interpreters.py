"""A new interpreter that makes its imports once, and then runs code in forks of itself, each like a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

#: Reads requests from its standard input, and prints the status of each.
SERVER = """
import json, os, sys, traceback
{imports}
for line in sys.stdin:
    code, folder, *paths = json.loads(line)
    child = os.fork()
    if child == 0:
        for descriptor, path in enumerate(paths):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
        os.chdir(folder)
        try:
            exec(code)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        for file in (sys.stdout, sys.stderr):
            file.flush()
        # Taking down all that has been imported takes longer than most of what is run
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Interpreter:
    """
    Imports PyTorch or RL-Zoo once, where a process for each piece of code would take seconds for it every time.

    It starts with the first piece of code. Forks of the tests themselves would not do: those have imported everything, and
    PyTorch refuses to differentiate in a fork once it has done so beside an accelerator.

    :param imports: code that is run once
    """

    def __init__(self, imports: str) -> None:
        self.imports = imports
        self._server: subprocess.Popen[str] | None = None

    def run(self, code: str, folder: Path) -> "subprocess.CompletedProcess[str]":
        """Run code after the imports, in a folder, and return its status and what it prints."""
        # Apple's libraries do not survive a fork, and Windows has none
        if sys.platform != "linux":
            command = [sys.executable, "-c", f"{self.imports}\n{code}"]
            return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if self._server is None:
            command = [sys.executable, "-c", SERVER.format(imports=self.imports)]
            # One thread, or OpenMP's others would be missing in a fork
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as name:
            output, errors = Path(name) / "output", Path(name) / "errors"
            request = [code, str(folder), os.devnull, str(output), str(errors)]
            print(json.dumps(request), file=self._server.stdin, flush=True)
            status = int(self._server.stdout.readline())
            return subprocess.CompletedProcess(code, status, output.read_text(), errors.read_text())

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            self._server.communicate()


#: Starts the processes of a test of `torch.distributed`.
PROCESSES = """
import sys
sys.path = {path}
import {module}
from torch.multiprocessing import start_processes
start_method = "fork" if sys.platform == "linux" else "spawn"
start_processes({module}.one_process_of_two, ({folder!r},), {n_processes}, start_method=start_method)
"""


def run_processes(interpreter: Interpreter, module: str, folder: Path, n_processes: int) -> None:
    """Run `one_process_of_two` of a module of the tests in as many processes, each with its rank and a folder."""
    code = PROCESSES.format(path=sys.path, module=module, folder=str(folder), n_processes=n_processes)
    result = interpreter.run(code, folder)
    assert result.returncode == 0, result.stderr
