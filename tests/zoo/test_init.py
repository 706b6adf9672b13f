"""`sb3-trpo init`: the folder that it makes can be trained in at once."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from interpreters import Interpreter

from sb3_trpo_ext.zoo.command import main
from sb3_trpo_ext.zoo.runs import evaluation_curve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(makefile: Path) -> dict[str, list[str]]:
    """The command line of each target."""
    found = re.findall(r"^(\w+):\n\t(.*)$", makefile.read_text(), flags=re.MULTILINE)
    return {target: shlex.split(line) for target, line in found}


def test_new_environment_is_trained_watched_and_tested(
    folder: Path, rl_zoo_interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "my_robot"]) == 0
    assert capsys.readouterr().out.endswith("cd my_robot && make train\n")
    project = folder / "my_robot"
    names = {"Makefile", "README.md", "hyperparams.yml", "my_robot.py", "test_my_robot.py"}
    assert {path.name for path in project.iterdir()} == names
    assert not [path for path in project.iterdir() if re.search("my_?env", path.read_text(), flags=re.IGNORECASE)]

    monkeypatch.chdir(project)
    targets = commands(project / "Makefile")
    assert set(targets) == {"train", "enjoy", "test"}
    assert targets["train"][0] == targets["enjoy"][0] == "sb3-trpo"
    assert main([*targets["train"][1:], "-n", "2048", "--device", "cpu"]) == 0
    # In place of a display
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert main([*targets["enjoy"][1:], "-n", "100"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"\r\| *O *X? *\|", output) or re.search(r"\r\| *X *O *\|", output)
    assert "Mean reward" in output or "Episode Reward" in output

    result = rl_zoo_interpreter.run("import pytest; sys.exit(pytest.main(['-p', 'no:cacheprovider']))", project)
    assert result.returncode == 0, result.stdout
    assert "2 passed" in result.stdout


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("my-robot", "`NAME` must be the name of a Python module in small letters, such as my_robot, got 'my-robot'"),
        ("../robot", "`NAME` must be the name of a Python module in small letters, such as my_robot, got '../robot'"),
        ("class", "`NAME` must be the name of a Python module in small letters, such as my_robot, got 'class'"),
        ("true", "`NAME` must be the name of a Python module in small letters, such as my_robot, got 'true'"),
        ("numpy", "`NAME`: there is a Python module numpy already"),
        ("gym", "`NAME`: there is a Python module gym already"),
        ("cart_pole", "`NAME`: Gymnasium has an environment CartPole-v0 already"),
        ("mine", "`NAME`: there is a mine in this folder already"),
    ],
)
def test_wrong_name_is_refused(name: str, problem: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine").mkdir()
    assert main(["init", name]) == 2
    assert f"sb3-trpo init: error: {problem}" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["mine"]
    assert not list((folder / "mine").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_new_environment_is_learned_in_a_minute(folder: Path) -> None:
    assert main(["init", "my_boat"]) == 0
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(["make", "train"], cwd=folder / "my_boat", env=environment, check=True, capture_output=True)
    # An agent that does nothing stays at a mean distance of 2 / 3 for 100 steps
    assert np.mean(evaluation_curve(folder / "my_boat" / "logs" / "trpo_ext" / "MyBoat-v0_1").returns[-1]) > -20
