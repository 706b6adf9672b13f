"""The command `sb3-trpo export` on the humanoid of results/, and what the page on export does with it."""

import re
from pathlib import Path
from typing import Any

import pytest

from sb3_trpo_ext.zoo.command import main

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).resolve().parents[2]


def test_the_humanoid_walks_without_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)
    arguments = ["--env", "Humanoid-v5", "-f", str(ROOT / "results"), "-o", "humanoid.onnx"]
    assert main(["export", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "humanoid.onnx\n  inputs   observation\n  outputs  action" in printed
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "export.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    (code,) = (block for block in blocks if "humanoid.onnx" in block)
    scope: dict[str, Any] = {}
    exec(code.replace(', render_mode="human"', ""), scope)
    # It falls in a few episodes, and not in this one
    assert scope["total"] > 5000


def test_the_file_goes_beside_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    arguments = ["--env", "CartPole-v1", "-f", str(tmp_path / "logs")]
    train = ["-n", "64", "--seed", "0", "--eval-freq", "-1", "--hyperparams", "n_envs:1", "n_steps:32", "batch_size:32"]
    assert main(["train", *arguments, *train]) == 0
    assert main(["export", *arguments, "--format", "torchscript", "--stochastic"]) == 0
    (path,) = (tmp_path / "logs").glob("trpo_ext/CartPole-v1_1/CartPole-v1.pt")
    assert str(path) in capsys.readouterr().out


def test_a_run_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--env", "CartPole-v1", "-f", str(tmp_path)]) == 2
    assert "there is no run of CartPole-v1" in capsys.readouterr().err
