"""`sb3-trpo train --resume`: a run goes on as if nothing had been between."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from huggingface_sb3 import EnvironmentName
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.monitor import load_results

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.zoo.command import main
from sb3_trpo_ext.zoo.manager import Manager
from sb3_trpo_ext.zoo.options import Training, parse, prepared
from sb3_trpo_ext.zoo.resume import last_checkpoint, restore_evaluations, saved_arguments
from sb3_trpo_ext.zoo.runs import read_run


def write_checkpoint(folder: Path, steps: int, statistics: bytes | None) -> None:
    (folder / f"rl_model_{steps}_steps.zip").touch()
    if statistics is not None:
        (folder / f"rl_model_vecnormalize_{steps}_steps.pkl").write_bytes(statistics)


def test_last_complete_checkpoint_is_found(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path, "A-v0") is None
    whole = pickle.dumps(list(range(1000)))
    write_checkpoint(tmp_path, 900, whole)
    write_checkpoint(tmp_path, 1000, whole)
    # Killed while it wrote the statistics, and before
    write_checkpoint(tmp_path, 2000, whole[:500])
    write_checkpoint(tmp_path, 3000, None)
    (tmp_path / "rl_model_best_steps.zip").touch()
    (tmp_path / "A-v0").mkdir()
    (tmp_path / "A-v0" / "config.yml").write_text("normalize: true\n")
    found = last_checkpoint(tmp_path, "A-v0")
    assert found is not None
    assert (found.num_timesteps, found.model.name) == (1000, "rl_model_1000_steps.zip")
    (tmp_path / "A-v0" / "config.yml").write_text("normalize: false\n")
    unnormalized = last_checkpoint(tmp_path, "A-v0")
    assert unnormalized is not None
    assert (unnormalized.num_timesteps, unnormalized.statistics) == (3000, None)


def test_evaluations_go_on_where_they_were(tmp_path: Path) -> None:
    callback = EvalCallback(gym.make("CartPole-v1"), log_path=str(tmp_path), n_eval_episodes=2)
    restore_evaluations(callback, 100)
    assert callback.best_mean_reward == -np.inf
    results = np.array([[1.0, 3.0], [9.0, 9.0], [4.0, 4.0]])
    np.savez(tmp_path / "evaluations", timesteps=[50, 100, 150], results=results, ep_lengths=results.astype(int))
    restore_evaluations(callback, 100)
    assert callback.evaluations_timesteps == [50, 100]
    assert callback.evaluations_results == [[1.0, 3.0], [9.0, 9.0]]
    assert callback.evaluations_length == [[1, 3], [9, 9]]
    assert callback.best_mean_reward == 9
    callback.n_eval_episodes = 3
    with pytest.raises(ValueError, match="`--eval-episodes`: the evaluations of this run have 2 episodes each, got 3"):
        restore_evaluations(callback, 100)


SETTINGS = ("n_envs:2", "n_steps:128", "batch_size:64", "n_critic_updates:1", "normalize:True", "target_kl:'lin_0.02'")


def train(folder: Path, n_timesteps: int, *options: str) -> Path:
    """A short training with checkpoints, in the environments of SB3 or of EnvPool."""
    arguments = ["--env", "Pendulum-v1", "-n", str(n_timesteps), "--seed", "3", "--save-freq", "256", "--eval-freq", "256"]
    arguments += ["--eval-episodes", "1", "--verbose", "0", "--device", "cpu", "-f", str(folder), *options]
    quoted = [setting.replace("'", '"') for setting in SETTINGS]
    assert main(["train", *arguments, "--hyperparams", *quoted]) == 0
    return folder / "trpo_ext" / "Pendulum-v1_1"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was to make 1,024 steps and was killed: after a checkpoint at 512, and before RL-Zoo could save the agent."""
    run = train(tmp_path_factory.mktemp("resume"), 1024)
    (run / "Pendulum-v1.zip").unlink()
    for file in [*run.glob("rl_model_*768_steps*"), *run.glob("rl_model_*1024_steps*")]:
        file.unlink()
    return run


@pytest.fixture
def run(killed: Path, tmp_path: Path) -> Path:
    """That run, to go on with."""
    copy = tmp_path / "trpo_ext" / killed.name
    shutil.copytree(killed, copy)
    args = copy / "Pendulum-v1" / "args.yml"
    args.write_text(args.read_text().replace(str(killed.parents[1]), str(tmp_path)))
    return copy


def test_checkpoints_have_the_statistics(run: Path) -> None:
    # 2 environments, each with its first observation: what VecNormalize had seen when the agent was saved
    with (run / "rl_model_vecnormalize_512_steps.pkl").open("rb") as file:
        assert pickle.load(file).obs_rms.count == pytest.approx(512 + 2, abs=1e-2)


def test_killed_run_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (run / "Pendulum-v1" / "config.yml").read_text()
    n_episodes = len(load_results(str(run)))
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 0
    assert f"Continuing from {run / 'rl_model_512_steps.zip'} after 512 steps" in capsys.readouterr().out

    assert [path.name for path in run.parent.iterdir()] == [run.name]
    model = TRPO.load(run / "Pendulum-v1.zip", device="cpu")
    assert model.num_timesteps == 1024
    # A checkpoint comes before the update of its last step: the rollout up to 512 steps is lost
    assert model._n_updates == 3
    read = read_run(run)
    assert read.updates["timesteps"].tolist() == [256, 768, 1024]
    assert read.evaluations.steps.tolist() == [256, 512, 768, 1024]
    # The schedule, too, goes on
    assert read.updates["kl_divergence_loss"].iloc[1] == pytest.approx(0.02 * (1 - 768 / 1024), rel=0.1)
    # Of the episodes of before those are still there that ended by then: each of the two environments has had one
    assert n_episodes == 2 * 2
    assert len(load_results(str(run))) == 2 + 2
    assert (np.diff(read.episodes.steps) >= 0).all()
    assert read.episodes.steps[-1] <= 1024
    assert (run / "Pendulum-v1" / "config.yml").read_text() == config
    with (run / "Pendulum-v1" / "vecnormalize.pkl").open("rb") as file:
        assert pickle.load(file).obs_rms.count == pytest.approx(1024 + 2 * 2, abs=1e-2)


def test_settings_are_those_of_the_run(run: Path) -> None:
    arguments = saved_arguments(run)
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    settings = yaml.safe_load(Path(given["--conf-file"]).read_text())["Pendulum-v1"]
    assert (settings["n_steps"], settings["target_kl"], settings["normalize"]) == (128, "lin_0.02", True)
    assert (given["--n-timesteps"], given["--save-freq"], given["--eval-freq"]) == ("1024", "256", "256")
    assert given["--seed"] == "3"


def test_options_of_the_command_line_win(run: Path) -> None:
    training = Training()
    options = prepared(parse("train", ["--resume", str(run), "--seed", "4", "-n", "2048"]), training)
    assert training.folder == run
    assert (options.seed, options.algo, options.env) == (4, "trpo_ext", "Pendulum-v1")
    numbers = [options.others[index + 1] for index, option in enumerate(options.others) if option in ("-n", "--n-timesteps")]
    assert numbers == ["1024", "2048"]
    assert "--resume" not in options.to_arguments()


def test_options_with_keys_and_lists_are_given_again(run: Path) -> None:
    args = run / "Pendulum-v1" / "args.yml"
    saved: dict[str, Any] = {"algo": "trpo_ext", "env": "Pendulum-v1", "env_kwargs": {"g": 9.0, "name": "a b"}}
    saved |= {"gym_packages": ["one", "two"], "vec_env": "envpool", "progress": True, "verbose": 0, "eval_freq": -1}
    # What is not given again: an empty option, and what made a run rather than what it is
    left_out = {
        "tensorboard_log": "",
        "device": None,
        "seed": False,
        "uuid": True,
        "hyperparams": {"gamma": 0.9},
        "trained_agent": "a.zip",
    }
    args.write_text(yaml.safe_dump({**saved, **left_out}, sort_keys=False))
    assert saved_arguments(run)[2:] == [
        *("--algo", "trpo_ext", "--env", "Pendulum-v1", "--env-kwargs", "g:9.0", "name:'a b'", "--gym-packages", "one", "two"),
        *("--vec-env", "envpool", "--progress", "--verbose", "0", "--eval-freq", "-1"),
    ]


def with_python_object(run: Path) -> None:
    """Give a run the settings that a Python file would have given it."""
    config = run / "Pendulum-v1" / "config.yml"
    config.write_text(config.read_text() + "  - - policy_kwargs\n    - activation_fn: !!python/name:torch.nn.ReLU ''\n")


def test_statistics_are_found_whatever_the_settings_hold(run: Path) -> None:
    config = run / "Pendulum-v1" / "config.yml"
    expected = last_checkpoint(run, "Pendulum-v1")
    assert expected is not None
    assert expected.statistics is not None
    with_python_object(run)
    assert last_checkpoint(run, "Pendulum-v1") == expected
    with pytest.raises(ValueError, match=r"config.yml has Python objects in policy_kwargs, which are not read again"):
        saved_arguments(run)
    config.write_text("normalize: [")
    assert last_checkpoint(run, "Pendulum-v1") == expected
    with pytest.raises(ValueError, match=r"config.yml is empty or damaged"):
        saved_arguments(run)


def test_final_agent_keeps_its_statistics(tmp_path: Path) -> None:
    """Those that RL-Zoo looks for are written again with each best agent of the training that goes on."""
    run = train(tmp_path, 256)
    whole = run / "Pendulum-v1" / "vecnormalize.pkl"
    expected = whole.read_bytes()
    manager = Manager.__new__(Manager)
    manager.env_name, manager._checkpoint = EnvironmentName("Pendulum-v1"), None
    manager._go_to_checkpoint(run)
    whole.write_bytes(pickle.dumps("later"))
    found = last_checkpoint(run, "Pendulum-v1")
    assert found is not None
    assert found.model.name == "Pendulum-v1.zip"
    assert found.statistics is not None
    assert found.statistics.read_bytes() == expected


def test_ended_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    run = train(tmp_path, 512)
    assert main(["train", "--resume", str(run), "-n", "1024"]) == 0
    assert TRPO.load(run / "Pendulum-v1.zip", device="cpu").num_timesteps == 1024
    assert read_run(run).updates["timesteps"].tolist() == [256, 512, 768, 1024]


def test_ended_run_says_that_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, 256)
    before = TRPO.load(run / "Pendulum-v1.zip", device="cpu")
    assert main(["train", "--resume", str(run)]) == 0
    assert "The run has already made its 256 steps: ask for more with `-n`." in capsys.readouterr().out
    after = TRPO.load(run / "Pendulum-v1.zip", device="cpu")
    assert after.num_timesteps == 256
    for name, value in before.policy.state_dict().items():
        assert value.equal(after.policy.state_dict()[name])


def test_later_state_wins(run: Path) -> None:
    """RL-Zoo saves the agent at an interruption, which may come before the next checkpoint or after it."""
    shutil.copyfile(run / "rl_model_256_steps.zip", run / "Pendulum-v1.zip")
    found = last_checkpoint(run, "Pendulum-v1")
    assert found is not None
    assert found.model.name == "rl_model_512_steps.zip"
    (run / "rl_model_512_steps.zip").replace(run / "Pendulum-v1.zip")
    found = last_checkpoint(run, "Pendulum-v1")
    assert found is not None
    assert (found.model.name, found.num_timesteps) == ("Pendulum-v1.zip", 512)
    # Both files are of that step, and the other one may be of a later best agent
    own = run / "rl_model_vecnormalize_512_steps.pkl"
    assert found.statistics == own
    own.write_bytes(own.read_bytes()[:100])
    found = last_checkpoint(run, "Pendulum-v1")
    assert found is not None
    assert found.statistics == run / "Pendulum-v1" / "vecnormalize.pkl"
    # Cut off while it was written
    whole = (run / "Pendulum-v1.zip").read_bytes()
    (run / "Pendulum-v1.zip").write_bytes(whole[: len(whole) // 2])
    found = last_checkpoint(run, "Pendulum-v1")
    assert found is not None
    assert found.num_timesteps == 256


def test_run_goes_on_in_more_environments(run: Path) -> None:
    assert main(["train", "--resume", str(run), "-n", "1600", "--hyperparams", "n_envs:4", "n_steps:64"]) == 0
    header, names, *episodes = (run / "3.monitor.csv").read_text().splitlines()
    assert header.startswith("#{")
    assert (names, len(episodes)) == ("r,l,t", 1)
    # Of 200 steps each: two before the checkpoint at 512, and four after 800 more
    assert read_run(run).episodes.steps.tolist() == [400, 400, *[512 + 800] * 4]
    assert main(["train", "--resume", str(run), "-n", "1700"]) == 0


class Told(gym.Wrapper):
    """Says how an episode ended, which may be nothing."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(gym.make("CartPole-v1", **kwargs))

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {**info, "reason": None}


def test_more_is_told_of_an_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tuple, which a YAML file does not have; the settings of a run are in one."""
    monkeypatch.setitem(gym.registry, "Told-v0", gym.envs.registration.EnvSpec("Told-v0", entry_point=Told))
    settings = ["n_envs:1", "n_steps:128", "batch_size:64", "policy:'MlpPolicy'"]
    settings += ["monitor_kwargs:dict(info_keywords=('reason',))"]
    options = ["--env", "Told-v0", "-n", "512", "--eval-freq", "-1", "--verbose", "0", "--device", "cpu", "-f", str(tmp_path)]
    assert main(["train", *options, "--hyperparams", *settings]) == 0
    run = tmp_path / "trpo_ext" / "Told-v0_1"
    before = (run / "0.monitor.csv").read_text()
    assert before.splitlines()[1] == "r,l,t,reason"
    assert before.endswith(",\n")
    assert main(["train", "--resume", str(run), "-n", "1024"]) == 0
    after = (run / "0.monitor.csv").read_text()
    assert after.startswith(before)
    assert len(after) > len(before)


def test_run_in_envpool_goes_on_there(tmp_path: Path) -> None:
    pytest.importorskip("envpool")
    run = train(tmp_path, 512, "--vec-env", "envpool")
    n_episodes = len(load_results(str(run)))
    assert n_episodes > 0
    assert main(["train", "--resume", str(run), "-n", "1024"]) == 0
    assert len(load_results(str(run))) == 2 * n_episodes
    assert TRPO.load(run / "Pendulum-v1.zip", device="cpu").num_timesteps == 1024
    assert "envpool" in (run / "Pendulum-v1" / "args.yml").read_text()


def test_ppo_goes_on_as_well(tmp_path: Path) -> None:
    arguments = ["--algo", "ppo", "--env", "CartPole-v1", "--save-freq", "256", "--eval-freq", "-1", "--verbose", "0"]
    small = ["n_envs:2", "n_steps:64", "batch_size:64", "n_epochs:1"]
    main(["train", *arguments, "-n", "256", "--device", "cpu", "-f", str(tmp_path), "--hyperparams", *small])
    run = tmp_path / "ppo" / "CartPole-v1_1"
    assert main(["train", "--resume", str(run), "-n", "512"]) == 0
    assert PPO.load(run / "CartPole-v1.zip", device="cpu").num_timesteps == 512


@pytest.mark.parametrize("folder", [".", "missing"])
def test_folder_without_a_run_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`--resume`: there is no run of `sb3-trpo train` in .*: give one"):
        saved_arguments(tmp_path / folder)


def test_run_without_checkpoint_is_refused(run: Path) -> None:
    for file in run.glob("rl_model_*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"`--resume`: there is no checkpoint in .*`--save-freq`"):
        saved_arguments(run)
