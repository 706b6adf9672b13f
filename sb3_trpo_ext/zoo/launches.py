"""``run.json`` in the folder of a run: the software, the machine and the command of each of its launches, and how it ended."""

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_trpo_ext import __version__
from sb3_trpo_ext._files import write_json
from sb3_trpo_ext.parallel.reductions import world_size

FILE_NAME = "run.json"
#: Packages whose versions may change a result; those that are not installed are left out.
PACKAGES = (
    "stable-baselines3",
    "sb3-contrib",
    "rl_zoo3",
    "torch",
    "gymnasium",
    "numpy",
    "mujoco",
    "envpool",
    "brax",
    "playground",
    "jax",
)


def versions() -> dict[str, str]:
    """The versions of this package and of those that it works with."""
    found = {"sb3-trpo-ext": __version__}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_revision() -> str | None:
    """The commit of the working folder, with ``-dirty`` if tracked files differ from it; ``None`` without one."""
    # Without tags, the description is the whole hash. No lock: the user may commit meanwhile
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def launches_in(path: Path) -> list[dict[str, Any]]:
    """
    Read the launches of a run.

    :param path: its ``run.json``
    :return: one entry for each, from the first to the last
    :raises ValueError: if the file has been damaged
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["launches"]
    except (ValueError, KeyError, TypeError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} is damaged: move it away, nothing else needs it")
    return entries


class Launch:
    """
    One launch of a run, and its entry in ``run.json``.

    The entry says "running" until the launch ends, and still says so if the process was killed.
    """

    def __init__(self) -> None:
        self._started, self._clock = datetime.now(timezone.utc), time.monotonic()
        self._path: Path | None = None
        self._entries: list[dict[str, Any]] = []
        #: What is trained, and the steps that earlier launches have made with it.
        self.model: BaseAlgorithm | None = None
        self.steps_before = 0

    def __getstate__(self) -> dict[str, Any]:
        # RL-Zoo sends its manager to other processes, which have no use for the model and its open files
        return {**vars(self), "model": None}

    def begin(self, folder: Path, device: torch.device, **facts: Any) -> None:
        """
        Add the entry to those of earlier launches.

        :param folder: of the run
        :param device: of the agent
        :param facts: what else the entry has
        """
        path = folder / FILE_NAME
        if path.is_file():
            self._entries = launches_in(path)
        self._path = path
        entry = {
            "status": "running",
            **facts,
            "started": self._started.isoformat(timespec="seconds"),
            "processes": world_size(),
            "device": device_name(device),
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
            "python": platform.python_version(),
            "git": git_revision(),
            "versions": versions(),
        }
        self._entries.append(entry)
        self._write()

    def end(self, status: str) -> None:
        """Note how the launch ended, and when; nothing if there is no entry, or if its end is noted already."""
        if self._path is None or self._entries[-1]["status"] != "running":
            return
        self._entries[-1] |= {"status": status, "seconds": round(time.monotonic() - self._clock, 1)}
        if self.model is not None:
            total = self.model.num_timesteps
            self._entries[-1] |= {"steps": total - self.steps_before, "total_steps": total}
        self._write()

    @contextlib.contextmanager
    def errors_noted(self) -> Iterator[None]:
        """Within the block, Ctrl-C or an error is the end of the launch."""
        try:
            yield
        except BaseException as error:
            self.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise

    def _write(self) -> None:
        assert self._path is not None
        write_json(self._path, {"launches": self._entries})
