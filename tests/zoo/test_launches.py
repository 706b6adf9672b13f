"""`run.json`: what a run was made with, and how each of its launches ended."""

import json
import pickle
import signal
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_zoo3.exp_manager import ExperimentManager

from sb3_trpo_ext import TRPO, __version__
from sb3_trpo_ext.zoo import launches, manager
from sb3_trpo_ext.zoo.command import main
from sb3_trpo_ext.zoo.launches import Launch, git_revision, launches_in

OPTIONS = ["--eval-freq", "-1", "--device", "cpu", "--verbose", "0", "--seed", "3"]
TINY = ["-params", "n_envs:2", "n_steps:64", "batch_size:64", "n_critic_updates:1"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*options: str) -> None:
    assert main(["train", "--env", "CartPole-v1", *OPTIONS, *options, *TINY]) == 0


def entries() -> list[dict[str, Any]]:
    """Those of the first run."""
    return json.loads(Path("logs/trpo_ext/CartPole-v1_1/run.json").read_text())["launches"]


def test_finished_and_resumed_run_tells_what_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[dict[str, Any]] = []
    update = TRPO.train

    def watched(self: TRPO) -> None:
        running.extend(entries())
        update(self)

    monkeypatch.setattr(TRPO, "train", watched)
    train("-n", "128", "--env-kwargs", "render_mode:'rgb_array'")
    assert running[0]["status"] == "running"
    (entry,) = entries()
    assert set(running[0]) < set(entry)
    assert entry["status"] == "finished"
    assert (entry["algorithm"], entry["env"], entry["seed"]) == ("trpo_ext", "CartPole-v1", 3)
    assert entry["command"].startswith("sb3-trpo train --env CartPole-v1 --eval-freq -1 ")
    # It can be pasted into a shell
    assert """--env-kwargs 'render_mode:'"'"'rgb_array'"'"''""" in entry["command"]
    assert (entry["steps"], entry["total_steps"], entry["processes"]) == (128, 128, 1)
    assert entry["versions"]["sb3-trpo-ext"] == __version__
    assert {"stable-baselines3", "sb3-contrib", "rl_zoo3", "torch", "gymnasium", "numpy"} <= set(entry["versions"])
    assert entry["device"] == "cpu"
    assert 0 < entry["seconds"] < 600
    assert 0 <= (datetime.now(timezone.utc) - datetime.fromisoformat(entry["started"])).total_seconds() < 600

    assert main(["train", "--resume", "logs/trpo_ext/CartPole-v1_1", "-n", "384"]) == 0
    first, second = entries()
    assert first == entry
    assert second["command"] == "sb3-trpo train --resume logs/trpo_ext/CartPole-v1_1 -n 384"
    assert (second["status"], second["steps"], second["total_steps"], second["seed"]) == ("finished", 256, 384, 3)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")])
def test_end_in_the_middle_is_noted(error: type[BaseException], status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: TRPO) -> None:
        raise error

    monkeypatch.setattr(TRPO, "train", fail)
    if error is KeyboardInterrupt:
        # RL-Zoo ends in good order
        train("-n", "256")
    else:
        with pytest.raises(error):
            train("-n", "256")
    (entry,) = entries()
    assert (entry["status"], entry["steps"]) == (status, 128)
    assert "seconds" in entry


def test_a_manager_that_goes_to_other_processes_leaves_the_model_behind() -> None:
    launch = Launch()
    launch.model = TRPO("MlpPolicy", "CartPole-v1", n_steps=64)
    copied = pickle.loads(pickle.dumps(launch))
    assert copied.model is None
    assert vars(copied).keys() == vars(launch).keys()


def test_augmented_random_search_evaluates_in_its_own_processes() -> None:
    options = ["-params", "n_envs:2", "n_delta:2", "n_top:1", "--eval-freq", "-1", "-n", "100"]
    assert main(["train", "--algo", "ars", "--env", "CartPole-v1", "--device", "cpu", *options, "-f", "logs"]) == 0
    (file,) = Path("logs/ars").glob("*/run.json")
    (entry,) = launches_in(file)
    assert (entry["status"], entry["algorithm"]) == ("finished", "ars")


def test_run_that_does_not_begin_has_failed() -> None:
    assert main(["train", "--env", "CartPole-v1", *OPTIONS, "-params", "target_kl:-1.0"]) == 2
    (entry,) = entries()
    assert entry["status"] == "failed"
    assert "steps" not in entry


@pytest.mark.parametrize(("error", "status"), [(None, "finished"), (KeyboardInterrupt, "interrupted")])
def test_search_is_noted(error: type[BaseException] | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def objective(_: Any, trial: Any) -> float:
        if trial.number == 1 and error is not None:
            raise error
        return 0.0

    monkeypatch.setattr(ExperimentManager, "objective", objective)
    search = ["-optimize", "--n-trials", "2", "--no-optim-plots"]
    assert main(["train", "--env", "CartPole-v1", *OPTIONS, *search]) == 0
    (entry,) = entries()
    assert entry["status"] == status
    assert "steps" not in entry


def test_search_in_several_threads_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def objective(_: Any, trial: Any) -> float:
        if trial.number == 2:
            # Python gives it to the main thread, which waits for the trials
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.05)
        return 0.0

    monkeypatch.setattr(ExperimentManager, "objective", objective)
    search = ["-optimize", "--n-trials", "200", "--n-jobs", "2", "--no-optim-plots"]
    assert main(["train", "--env", "CartPole-v1", *OPTIONS, *search]) == 0
    (entry,) = entries()
    assert entry["status"] == "interrupted"


def test_other_processes_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "rank", lambda: 1)
    train("-n", "128")
    assert not list(Path().glob("**/run.json"))


def test_git_revision_tells_of_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    # The folder of the test may itself be in a repository
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
    assert git_revision() is None
    git("init")
    # Without a commit
    assert git_revision() is None
    (folder / "a.py").write_text("")
    git("add", "a.py")
    git("commit", "-m", "one")
    git("tag", "-a", "v1", "-m", "a release")
    assert git_revision() == git("rev-parse", "HEAD")
    # Such as logs/
    (folder / "b.py").write_text("")
    assert git_revision() == git("rev-parse", "HEAD")
    (folder / "a.py").write_text("changed")
    assert git_revision() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None


def test_gpu_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert launches.device_name(torch.device("cuda", 1)) == "GPU 1"


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"launches": {}}', '{"launches": [1]}'])
def test_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    launch, path = launches.Launch(), tmp_path / launches.FILE_NAME
    path.write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged"), launch.errors_noted():
        launch.begin(tmp_path, torch.device("cpu"))
    assert path.read_text() == content
