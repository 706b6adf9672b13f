"""Films and windows on a machine without a display."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sb3_trpo_ext.zoo import display
from sb3_trpo_ext.zoo.command import main


@pytest.fixture
def headless(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Linux server."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "SDL_VIDEODRIVER"):
        # Set first, so that what a test sets is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")
    return monkeypatch


@pytest.fixture
def renderers(headless: pytest.MonkeyPatch) -> Callable[..., None]:
    """Which of MuJoCo's renderers work."""

    def install(*working: str) -> None:
        def run(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
            assert f"mujoco.{env['MUJOCO_GL']} " in command[-1]
            return SimpleNamespace(returncode=int(env["MUJOCO_GL"] not in working))

        headless.setattr(subprocess, "run", run)

    return install


@pytest.mark.parametrize(("working", "chosen"), [(["egl", "osmesa"], "egl"), (["osmesa"], "osmesa")])
def test_renderer_that_works_is_chosen(working: list[str], chosen: str, renderers: Callable[..., None]) -> None:
    renderers(*working)
    display.prepare_film("Hopper-v5")
    assert os.environ["MUJOCO_GL"] == chosen


def test_missing_packages_are_named_for_mujoco_alone(renderers: Callable[..., None], headless: pytest.MonkeyPatch) -> None:
    renderers()
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] != "mujoco"}
    headless.setattr(sys, "modules", modules)
    headless.setattr(display, "load_env_creator", lambda _: None)
    display.prepare_film("CartPole-v1")
    assert "MUJOCO_GL" not in os.environ
    headless.setitem(modules, "mujoco", SimpleNamespace())
    with pytest.raises(ImportError, match="`apt-get install libegl1 libgl1` brings EGL"):
        display.prepare_film("Hopper-v5")


@pytest.mark.parametrize("variable", ["DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"])
def test_what_the_user_has_set_up_is_left_alone(
    variable: str, renderers: Callable[..., None], headless: pytest.MonkeyPatch
) -> None:
    renderers("egl")
    headless.setenv(variable, "glfw")
    display.prepare_film("Hopper-v5")
    assert os.environ.get("MUJOCO_GL") == ("glfw" if variable == "MUJOCO_GL" else None)


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_have_a_display(platform: str, renderers: Callable[..., None], headless: pytest.MonkeyPatch) -> None:
    renderers("egl")
    headless.setattr(sys, "platform", platform)
    display.prepare_film("Hopper-v5")
    assert "MUJOCO_GL" not in os.environ
    display.check_window(None)


def test_window_needs_a_display(headless: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["enjoy", "--env", "CartPole-v1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sb3-trpo enjoy: error: there is no display to open a window on: `sb3-trpo record-video` films")
    assert error.count("\n") == 1
    display.check_window(True)
    headless.setenv("SDL_VIDEODRIVER", "dummy")
    display.check_window(None)
    headless.delenv("SDL_VIDEODRIVER")
    headless.setenv("DISPLAY", ":0")
    display.check_window(None)


@pytest.mark.slow
def test_mujoco_is_filmed_without_a_display(tmp_path: Path, headless: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moviepy")
    if display.find_renderer() is None:
        pytest.skip("there is neither EGL nor OSMesa")
    sb3_trpo = [sys.executable, "-m", "sb3_trpo_ext.zoo"]
    small = ["-params", "n_envs:1", "n_steps:64", "batch_size:64"]
    train = ["train", "--env", "Hopper-v5", "-n", "64", "--eval-freq", "-1", *small]
    for command in (train, ["record-video", "--env", "Hopper-v5", "-n", "20"]):
        subprocess.run([*sb3_trpo, *command], cwd=tmp_path, env=dict(os.environ), check=True)
    assert len(list((tmp_path / "logs" / "trpo_ext" / "Hopper-v5_1" / "videos").glob("*.mp4"))) == 1
