"""Weights & Biases and MLflow, as the page about them says. Nothing leaves the machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tracking.md"
TRAIN = ["train", "--env", "CartPole-v1", "-n", "512", "--seed", "3", "--eval-freq", "-1", "--device", "cpu", "--verbose", "0"]
TINY = ["--hyperparams", "n_envs:2", "n_steps:64", "batch_size:64", "n_critic_updates:1"]


def train(folder: Path, *options: str, **environment: str) -> None:
    """In a process of its own: W&B changes TensorBoard's writer for good, MLflow remembers its store, and both end at exit."""
    command = [sys.executable, "-m", "sb3_trpo_ext.zoo", *TRAIN, *options]
    result = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_wandb_gets_settings_and_curves(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    train(tmp_path, "--track", "--wandb-project-name", "poles", *TINY, WANDB_MODE="offline", WANDB_SILENT="true")
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for text in ("poles", "CartPole-v1__trpo_ext__3__", "saved_hyperparams", "train/kl_divergence_loss"):
        assert text.encode() in content, text


def test_mlflow_gets_parameters_and_curves(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "mlflow_callback.py").write_text(code)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    train(tmp_path, *TINY, "callback:'mlflow_callback.MLflowCallback'", MLFLOW_TRACKING_URI=uri)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(["0"])
    assert (run.info.status, run.data.params["gamma"], run.data.params["seed"]) == ("FINISHED", "0.99", "3")
    assert {"train/kl_divergence_loss", "rollout/ep_rew_mean"} <= set(run.data.metrics)
    assert "train/status_name" not in run.data.metrics
    history = client.get_metric_history(run.info.run_id, "train/kl_divergence_loss")
    assert [metric.step for metric in history] == [256, 384, 512]
