"""Pictures of environments where there is no display, as on a server: what can be filmed, and what cannot be watched."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

#: What MuJoCo can draw with where there is no display.
RENDERERS = ("egl", "osmesa")
#: The first one in Debian: `libgl1` brings Mesa's drivers, without which `libegl1` is of no use.
PACKAGES = "libegl1 libgl1"


def has_display(environment: Mapping[str, str]) -> bool:
    """
    Whether a window can be opened.

    :param environment: the variables of the process
    :return: false on Linux without X11 and Wayland; macOS and Windows are taken to have a display
    """
    return not sys.platform.startswith("linux") or any(environment.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def find_renderer() -> str | None:
    """
    What MuJoCo can draw with without a display, tried out: the library alone does not do, it needs a driver.

    :return: a value for ``MUJOCO_GL``; ``None`` if nothing works
    """
    for name in RENDERERS:
        # In a process of its own, since MuJoCo and PyOpenGL decide once and for all
        attempt = [sys.executable, "-c", f"from mujoco.{name} import GLContext; GLContext(8, 8).make_current()"]
        if subprocess.run(attempt, env={**os.environ, "MUJOCO_GL": name}, capture_output=True, check=False).returncode == 0:
            return name
    return None


def prepare_film(env_id: str) -> None:
    """
    Let MuJoCo draw without a display, where nobody has said how; comes before MuJoCo is imported, which reads it once.

    :param env_id: the environment
    :raises ImportError: if the environment is one of MuJoCo and nothing can draw it
    """
    if has_display(os.environ) or "MUJOCO_GL" in os.environ:
        return
    renderer = find_renderer()
    if renderer is not None:
        os.environ["MUJOCO_GL"] = renderer
        return
    entry_point = gym.spec(env_id).entry_point
    if isinstance(entry_point, str):
        load_env_creator(entry_point)
    if "mujoco" in sys.modules:
        raise ImportError(
            "MuJoCo cannot draw: there is no display, and neither EGL nor OSMesa works; on Debian and Ubuntu "
            f"`apt-get install {PACKAGES}` brings EGL"
        )


def check_window(arguments: Sequence[str]) -> None:
    """
    Refuse to open a window where there is no display; without one, some environments abort and others draw nothing.

    :param arguments: of ``enjoy``
    :raises OSError: if there is no display, and ``--no-render`` is not given
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--no-render", action="store_true")
    # Whoever chooses a driver for pygame knows what it shows
    if parser.parse_known_args(arguments)[0].no_render or has_display(os.environ) or "SDL_VIDEODRIVER" in os.environ:
        return
    raise OSError(
        "there is no display to open a window on: `sb3-trpo record-video` films the agent, and `--no-render` runs it unseen"
    )
