"""`sb3-trpo push` and `pull`, with a folder in the place of the Hugging Face Hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub.errors import EntryNotFoundError

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.zoo.command import main

ENV = ["--env", "CartPole-v1"]
REPOSITORY = ["-orga", "somebody"]
FAST = ["-n", "64", "--seed", "0", "--eval-freq", "-1", "--hyperparams", "n_envs:1", "n_steps:32", "batch_size:32"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the Hub."""
    folder = tmp_path / "hub"

    def create_repo(self: Any, repo_id: str, private: bool = False, exist_ok: bool = False) -> str:
        (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self: Any, repo_id: str, folder_path: str, commit_message: str) -> None:
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)

    def download(repo_id: str, filename: str, **_: Any) -> str:
        path = folder / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return folder


@pytest.mark.parametrize("settings", [[], ["normalize:True"]], ids=["own normalization", "VecNormalize"])
def test_what_is_pushed_can_be_pulled(
    settings: list[str],
    tmp_path: Path,
    hub: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs, others = ["-f", str(tmp_path / "logs")], ["-f", str(tmp_path / "others")]
    (tmp_path / "logs").mkdir()
    assert main(["train", *ENV, *logs, *FAST, *settings]) == 0
    assert main(["push", *ENV, *logs, *REPOSITORY]) == 2
    assert "run `sb3-trpo report` first" in capsys.readouterr().err
    assert not list(hub.glob("*/*/*"))

    assert main(["report", *ENV, *logs, "--n-eval-episodes", "3"]) == 0
    assert main(["push", *ENV, *logs, *REPOSITORY]) == 0
    assert "https://huggingface.co/somebody/trpo_ext-CartPole-v1" in capsys.readouterr().out
    card = (hub / "somebody" / "trpo_ext-CartPole-v1" / "README.md").read_text()
    _, metadata, text = card.split("---\n", maxsplit=2)
    (result,) = yaml.safe_load(metadata)["model-index"][0]["results"]
    run = tmp_path / "logs" / "trpo_ext" / "CartPole-v1_1"
    returns = json.loads((run / "evaluation.json").read_text())["return"]
    assert result["dataset"]["type"] == "CartPole-v1"
    assert result["metrics"] == [{"type": "mean_reward", "value": f"{returns['mean']:.2f} +/- {returns['std']:.2f}"}]
    assert "sb3-trpo train --env CartPole-v1" in text

    assert main(["pull", *ENV, *others, *REPOSITORY, "--exp-id", "-1"]) == 2
    assert "`--exp-id` must be the number of a new run" in capsys.readouterr().err
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    assert main(["pull", *ENV, *others, *REPOSITORY]) == 2
    assert "TRUST_REMOTE_CODE" in capsys.readouterr().err
    assert not (tmp_path / "others").exists()
    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    for number in (1, 2):
        assert main(["pull", *ENV, *others, *REPOSITORY]) == 0
        pulled = tmp_path / "others" / "trpo_ext" / f"CartPole-v1_{number}"
        for name in ("run.json", "progress.csv", "evaluation.json", "CartPole-v1/config.yml", "CartPole-v1/args.yml"):
            assert (pulled / name).read_bytes() == (run / name).read_bytes()
        assert (pulled / "CartPole-v1" / "vecnormalize.pkl").is_file() == bool(settings)
    assert main(["pull", *ENV, *others, *REPOSITORY, "--exp-id", "2"]) == 2
    assert "--exp-id 2: there is a run in" in capsys.readouterr().err

    agents = [TRPO.load(folder / "CartPole-v1.zip", device="cpu") for folder in (run, pulled)]
    observations = np.random.default_rng(0).normal(size=(100, 4))
    actions = [agent.predict(observations, deterministic=True)[0] for agent in agents]
    np.testing.assert_array_equal(actions[0], actions[1])
    assert main(["report", *ENV, *others, "--n-eval-episodes", "3"]) == 0
    assert json.loads((pulled / "evaluation.json").read_text())["return"] == returns


def test_evaluation_of_an_earlier_agent_is_not_pushed(tmp_path: Path, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = ["-f", str(tmp_path / "logs")]
    (tmp_path / "logs").mkdir()
    assert main(["train", *ENV, *logs, *FAST]) == 0
    assert main(["report", *ENV, *logs, "--n-eval-episodes", "1"]) == 0
    path = tmp_path / "logs" / "trpo_ext" / "CartPole-v1_1" / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_timesteps": 1}))
    assert main(["push", *ENV, *logs, *REPOSITORY]) == 2
    assert "run `sb3-trpo report` again" in capsys.readouterr().err
    assert not list(hub.glob("*/*/*"))
