"""`torchrun -m sb3_trpo_ext.zoo train`: who writes what, and how a run goes on after one of its processes has died."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.zoo import options
from sb3_trpo_ext.zoo.options import join_processes, parse
from sb3_trpo_ext.zoo.resume import folder_of_launch, launch_name, mark_folder
from sb3_trpo_ext.zoo.runs import read_run


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without traces of a launcher."""
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    return monkeypatch


def joined(*arguments: str) -> list[str]:
    """The command line of one of several processes."""
    given = parse("train", arguments)
    join_processes(given)
    return given.to_arguments()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algo", "ppo"], "`--algo`: only trpo_ext, trpo_ext_mask, trpo_ext_lstm train in several processes, got 'ppo'"),
        (["-optimize"], "`-optimize`"),
    ],
)
def test_what_cannot_be_done_together_is_refused(arguments: list[str], message: str, alone: Any) -> None:
    with pytest.raises(ValueError, match=message):
        joined(*arguments)


def test_seed_and_checkpoints_are_added_where_they_are_missing(alone: pytest.MonkeyPatch) -> None:
    assert joined("--env", "A", "--seed", "3") == ["--env", "A", "--seed", "3"]
    *rest, option, seed = joined("--env", "A", "--seed", "-1")
    assert (rest, option) == (["--env", "A"], "--seed")
    assert int(seed) >= 0
    assert joined("--env", "A")[-1] != joined("--env", "A")[-1]
    alone.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert joined("--seed", "3") == ["--seed", "3", "--save-freq", "100000"]
    assert joined("--seed", "3", "--save-freq", "9") == ["--seed", "3", "--save-freq", "9"]


def test_other_processes_do_not_track(alone: pytest.MonkeyPatch) -> None:
    assert "--track" in joined("--track", "--seed", "3")
    alone.setattr(options, "rank", lambda: 1)
    alone.setattr(sys, "stdout", sys.stdout)
    assert "--track" not in joined("--track", "--seed", "3")
    # Nor do they print
    assert sys.stdout.name == os.devnull


def test_restart_finds_the_folder_of_its_own_launch(tmp_path: Path, alone: pytest.MonkeyPatch) -> None:
    for number, launch in ((1, "another"), (3, "another"), (2, "mine")):
        folder = tmp_path / f"A-v0_{number}"
        folder.mkdir()
        alone.setenv("TORCHELASTIC_RUN_ID", launch)
        mark_folder(folder)
    assert folder_of_launch(str(tmp_path), "A-v0") == tmp_path / "A-v0_2"
    alone.setenv("TORCHELASTIC_RUN_ID", "new")
    assert folder_of_launch(str(tmp_path), "A-v0") is None


def test_launch_without_an_id_is_known_by_its_machine_and_process(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch_name().endswith(f" {os.getppid()}")


def launch(folder: Path, *arguments: str, torchrun: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start a training in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *torchrun]
    command += ["-m", "sb3_trpo_ext.zoo", "train", "-f", str(folder), "--seed", "0", "--verbose", "0", *arguments]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment)


def output_of(process: subprocess.Popen[str], folder: Path, timeout: float = 500) -> str:
    """Wait for a training, and read what it has printed."""
    try:
        process.wait(timeout)
    finally:
        process.kill()
    return (folder / "output.txt").read_text()


def kill_second(agent: subprocess.Popen[str]) -> None:
    """Kill the second process of a training, without a chance to say anything."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    second = [int(child) for child in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes()]
    os.kill(second[0], signal.SIGKILL)


def wait_for(folder: Path, pattern: str, agent: subprocess.Popen[str]) -> list[Path]:
    """Wait until there are such files."""
    deadline = time.monotonic() + 200
    while not (found := sorted(folder.glob(pattern))) and agent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found, (folder / "output.txt").read_text()
    return found


@pytest.mark.slow
def test_wrong_option_ends_the_launch_with_a_status(tmp_path: Path) -> None:
    process = launch(tmp_path, "--env", "CartPole-v1", "-params", "target_klx:1")
    output = output_of(process, tmp_path)
    assert process.returncode != 0
    assert "sb3-trpo train: error: there is no hyperparameter 'target_klx'" in output


@pytest.mark.slow
def test_two_processes_solve_cartpole(tmp_path: Path) -> None:
    process = launch(tmp_path, "--env", "CartPole-v1", "--eval-freq", "50000")
    output = output_of(process, tmp_path)
    assert process.returncode == 0, output
    run = tmp_path / "trpo_ext" / "CartPole-v1_1"
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    model = TRPO.load(run / "CartPole-v1.zip", device="cpu")
    # Each process makes half of the steps, in rollouts of 2 x 512 steps
    assert 100_000 <= model.num_timesteps < 100_000 + 2048
    assert len(list(run.glob("*.monitor.csv"))) == 2
    read = read_run(run)
    assert read.evaluations.steps.tolist() == [50_000, 100_000]
    assert read.updates["timesteps"].iloc[0] == 2048
    # The first process alone prints
    assert output.count("Saving to") == output.count("Log path") == 1
    env = gym.make("CartPole-v1")
    env.reset(seed=1)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=20, warn=False)
    assert float(np.mean(mean)) >= 475


@pytest.mark.slow
def test_two_processes_train_humanoid(tmp_path: Path) -> None:
    """VecNormalize, checkpoints and evaluation in two processes, for a few updates of the settings that we ship."""
    arguments = ("--env", "Humanoid-v5", "-n", "32768", "--eval-freq", "16384", "--eval-episodes", "2")
    process = launch(tmp_path, *arguments, torchrun=("--max-restarts", "1"))
    output = output_of(process, tmp_path)
    assert process.returncode == 0, output
    run = tmp_path / "trpo_ext" / "Humanoid-v5_1"
    model = TRPO.load(run / "Humanoid-v5.zip", device="cpu")
    assert model.num_timesteps == 32_768
    assert model._n_updates == 4
    with (run / "Humanoid-v5" / "vecnormalize.pkl").open("rb") as file:
        statistics = pickle.load(file)
    # Every observation of both processes: 64 environments each, and their first ones
    assert statistics.obs_rms.count == pytest.approx(32_768 + 2 * 64, abs=1e-2)
    updates = read_run(run).updates
    # `target_kl` falls to zero, where the last update finds it
    assert list(updates["status_name"]) == ["accepted"] * 3 + ["zero_target_kl"]
    assert updates["rollout/ep_rew_mean"].iloc[-1] > updates["rollout/ep_rew_mean"].iloc[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_killed_process_ends_the_run_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    process = launch(tmp_path, "--env", "CartPole-v1", "--save-freq", "4096", "--eval-freq", "-1")
    (checkpoint, *_) = wait_for(tmp_path, "trpo_ext/*/rl_model_*_steps.zip", process)
    kill_second(process)
    killed = time.monotonic()
    output = output_of(process, tmp_path, timeout=60)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in output
    assert TRPO.load(checkpoint, device="cpu").num_timesteps == 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_killed_process_is_started_again_and_the_run_goes_on(tmp_path: Path) -> None:
    arguments = ("--env", "Pendulum-v1", "-n", "65536", "--save-freq", "16384", "--eval-freq", "8192", "--eval-episodes", "2")
    process = launch(tmp_path, *arguments, "-params", "normalize:True", torchrun=("--max-restarts", "2"))
    wait_for(tmp_path, "trpo_ext/*/rl_model_vecnormalize_*_steps.pkl", process)
    kill_second(process)
    output = output_of(process, tmp_path)
    assert process.returncode == 0, output
    assert output.count("Continuing from") == 1
    run = tmp_path / "trpo_ext" / "Pendulum-v1_1"
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    model = TRPO.load(run / "Pendulum-v1.zip", device="cpu")
    # Not from the beginning: in all it has made the steps that were asked for
    assert 65_536 <= model.num_timesteps < 65_536 + 2 * model.n_steps * model.n_envs
    timesteps = read_run(run).updates["timesteps"].to_numpy()
    assert (np.diff(timesteps) > 0).all()
    assert len(timesteps) == model._n_updates
    evaluations = read_run(run).evaluations.steps
    assert evaluations[0] <= 8192
    assert (np.diff(evaluations) > 0).all()
