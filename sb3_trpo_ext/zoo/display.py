"""Machines without a display, such as servers: MuJoCo films with EGL or OSMesa there, and a window is refused."""

import os
import subprocess
import sys

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

#: What MuJoCo can draw with where there is no display.
RENDERERS = ("egl", "osmesa")
#: The first one in Debian: `libgl1` brings Mesa's drivers, without which `libegl1` is of no use.
PACKAGES = "libegl1 libgl1"


def has_display() -> bool:
    """Whether a window can be opened: on Linux with X11 or Wayland; macOS and Windows are taken to have a display."""
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def find_renderer() -> str | None:
    """
    Try what MuJoCo can draw with where there is no display: the library alone is not enough, it needs a driver.

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
    Choose what MuJoCo draws with where there is no display, unless the user has: call it before MuJoCo is imported.

    :param env_id: the environment
    :raises ImportError: if the environment is one of MuJoCo and nothing can draw it
    """
    if has_display() or "MUJOCO_GL" in os.environ:
        return
    renderer = find_renderer()
    if renderer is not None:
        os.environ["MUJOCO_GL"] = renderer
        return
    entry_point = gym.spec(env_id).entry_point
    if isinstance(entry_point, str):
        load_env_creator(entry_point)
    if "mujoco" in sys.modules:
        raise ImportError(f"MuJoCo cannot draw without a display, EGL or OSMesa: `apt-get install {PACKAGES}` brings EGL")


def check_window(no_render: bool | None) -> None:
    """
    Refuse to open a window where there is no display; without one, some environments abort and others draw nothing.

    :param no_render: whether none is wanted
    :raises OSError: if there is no display
    """
    # Whoever chooses a driver for pygame knows what it shows
    if not (no_render or has_display() or "SDL_VIDEODRIVER" in os.environ):
        raise OSError("there is no display to open a window on: `sb3-trpo record-video` films, `--no-render` opens none")
