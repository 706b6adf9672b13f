"""What is installed, and what an import costs."""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import sb3_trpo_ext
from sb3_trpo_ext.envs import EnvPoolVecEnv
from sb3_trpo_ext.zoo.command import main
from sb3_trpo_ext.zoo.settings import hyperparams_path

ROOT = Path(__file__).resolve().parent.parent


def test_import_loads_nothing_that_it_does_not_need() -> None:
    code = "import sb3_trpo_ext, sb3_trpo_ext.envs, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "sb3_trpo_ext" in modules
    assert {"rl_zoo3", "sb3_contrib", "matplotlib", "optuna", "plotly", "envpool"}.isdisjoint(modules)


def test_missing_envpool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r"pip install sb3-trpo-ext\[envpool\]"):
        EnvPoolVecEnv("Humanoid-v5")


def test_console_script_is_installed() -> None:
    (script,) = (entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "sb3-trpo")
    assert script.load() is main


def test_version_is_that_of_the_distribution() -> None:
    assert sb3_trpo_ext.__version__ == metadata.version("sb3-trpo-ext")


def test_settings_are_found() -> None:
    assert hyperparams_path().is_file()


def test_wheel_ships_settings_and_types(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (path,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        settings = archive.read("sb3_trpo_ext/hyperparams/trpo_ext.yml")
    assert settings == (ROOT / "hyperparams" / "trpo_ext.yml").read_bytes()
    assert {"sb3_trpo_ext/__init__.py", "sb3_trpo_ext/py.typed", "sb3_trpo_ext/zoo/command.py"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "hyperparams/")) for name in names)
