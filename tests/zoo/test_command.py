"""The ways into RL-Zoo: our command, the plugin for the stock one, the settings and the search space."""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import pytest
import sb3_contrib
import yaml
from gymnasium import spaces
from interpreters import Interpreter
from rl_zoo3 import ALGOS
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_trpo_ext import TRPO, MaskableTRPO, RecurrentTRPO, TrainingRecorder, __version__
from sb3_trpo_ext.callbacks import TimedEvalCallback
from sb3_trpo_ext.zoo import search_space
from sb3_trpo_ext.zoo.command import COMMANDS, main
from sb3_trpo_ext.zoo.manager import Manager, register
from sb3_trpo_ext.zoo.masks import MaskedAgent, remember
from sb3_trpo_ext.zoo.options import parse, register_simulator, simulator_of, with_defaults
from sb3_trpo_ext.zoo.settings import KEY, SCHEDULED, hyperparams_path, linear_schedule, load_hyperparams

register()

HYPERPARAMS = load_hyperparams()
BOX2D = ("LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3")
# Small enough for a test, and still several updates
TINY = ["-params", "n_envs:2", "n_steps:64", "batch_size:64", "n_critic_updates:1"]


def run(*command: str, cwd: Path) -> str:
    """Run a command in a process of its own and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SDL_VIDEODRIVER": "dummy"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def saved_data(path: Path) -> dict[str, Any]:
    """What a saved model says about itself."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("data"))


def manager(env_id: str, folder: Path, algo: str = KEY, config: Path | None = None, **kwargs: Any) -> Manager:
    """The experiment manager, as RL-Zoo's `train` makes it."""
    return Manager(
        argparse.Namespace(),
        algo,
        env_id,
        str(folder),
        eval_freq=-1,
        device="cpu",
        verbose=0,
        config=str(config or hyperparams_path()),
        **kwargs,
    )


# === The settings ===


def test_humanoid_comes_first() -> None:
    assert next(iter(HYPERPARAMS)) == "Humanoid-v5"
    assert "default" in HYPERPARAMS


@pytest.mark.parametrize("env_id", HYPERPARAMS)
def test_entry_constructs_our_model(env_id: str, tmp_path: Path) -> None:
    entry = HYPERPARAMS[env_id]
    if env_id == "atari":
        pytest.importorskip("ale_py")
        pytest.importorskip("cv2")
    if env_id in BOX2D:
        pytest.importorskip("Box2D")
    simulator = simulator_of(env_id)
    if simulator is not None:
        pytest.importorskip({"brax": "brax", "playground": "mujoco_playground"}[simulator[0]])
        register_simulator(env_id)
    gym_id = {"atari": "PongNoFrameskip-v4", "default": "MountainCar-v0"}.get(env_id, env_id)
    config = tmp_path / "one_entry.yml"
    # An entry of its own, so that "atari" and "default" are what RL-Zoo falls back to.
    config.write_text(yaml.safe_dump({env_id: entry}), encoding="utf-8")

    results = manager(gym_id, tmp_path, config=config).setup_experiment()

    assert results is not None
    model = results[0]
    assert type(model) is TRPO
    assert model.n_envs == entry.get("n_envs", 1)
    assert (model.get_vec_normalize_env() is not None) == bool(entry.get("normalize", False))
    assert model.env is not None
    model.env.close()


#: The values of an entry that are ours, and what they are in theirs, converted.
OUR_OWN: dict[str, dict[str, tuple[Any, float]]] = {
    "Swimmer-v5": {"gae_lambda": (0.98, 0.95)},
    "Hopper-v5": {"target_kl": ("lin_0.06", 0.03), "gamma": (0.995, 0.99)},
}


@pytest.mark.parametrize(
    ("env_id", "zoo_id"),
    [
        ("Swimmer-v5", "Swimmer-v4"),
        ("Hopper-v5", "Hopper-v4"),
        ("MountainCar-v0", "MountainCar-v0"),
        ("MountainCarContinuous-v0", "MountainCarContinuous-v0"),
        ("BipedalWalker-v3", "BipedalWalker-v3"),
    ],
)
def test_entry_from_rl_zoo_is_the_same_in_joint_kl_units(env_id: str, zoo_id: str) -> None:
    if env_id in BOX2D:
        pytest.importorskip("Box2D")
    path = Path(sys.modules["rl_zoo3"].__path__[0]) / "hyperparams" / "trpo.yml"
    theirs = {"target_kl": 0.01, "cg_damping": 0.1, **yaml.safe_load(path.read_text(encoding="utf-8"))[zoo_id]}
    action_space = gym.make(env_id).action_space
    n_actions = action_space.shape[0] if isinstance(action_space, spaces.Box) else 1

    # What RL-Zoo leaves to sb3-contrib's defaults, where ours are others
    left_out: dict[str, Any] = {
        "learning_rate": 1e-3,
        "n_steps": 2048,
        "batch_size": 128,
        "gae_lambda": 0.95,
        "vf_lambda": None,
        "norm_obs": False,
        "norm_reward": False,
    }
    left_out |= {"policy_kwargs": "dict(log_std_init=0)"}
    entry = {name: value for name, value in HYPERPARAMS[env_id].items() if name in theirs or value != left_out.get(name)}
    expected = {**theirs, "target_kl": n_actions * theirs["target_kl"], "cg_damping": n_actions * theirs["cg_damping"]}
    for name, (value, in_theirs) in OUR_OWN.get(env_id, {}).items():
        assert expected.pop(name) == pytest.approx(in_theirs)
        assert entry.pop(name) == value
    assert entry == pytest.approx(expected)


def test_defaults_shared_with_sb3_contrib_are_the_same() -> None:
    # Entries "from RL-Zoo" leave out what is a default of both.
    ours, theirs = (cls("MlpPolicy", "CartPole-v1") for cls in (TRPO, sb3_contrib.TRPO))
    for name in ("gamma", "n_critic_updates", "cg_max_steps"):
        assert getattr(ours, name) == getattr(theirs, name), name


# === Registration and schedules ===


def test_register_leaves_trpo_to_sb3_contrib() -> None:
    assert ALGOS["trpo_ext"] is TRPO
    assert issubclass(ALGOS["trpo_ext_mask"], MaskableTRPO)
    assert ALGOS["trpo_ext_lstm"] is RecurrentTRPO
    assert ALGOS["trpo"] is sb3_contrib.TRPO
    assert HYPERPARAMS_SAMPLER["trpo_ext"] is search_space.sample_trpo_params
    assert HYPERPARAMS_CONVERTER["trpo_ext"] is search_space.convert_trpo_params
    assert HYPERPARAMS_SAMPLER["trpo"] is not search_space.sample_trpo_params


#: Prints what differs in RL-Zoo's modules and in its manager after our class is registered.
REPLACED = """
import importlib, pkgutil, sys
import rl_zoo3.exp_manager, rl_zoo3.train, rl_zoo3.enjoy, rl_zoo3.cli
{imports}

def attributes():
    modules = {{name: module for name, module in sys.modules.items() if name.partition(".")[0] == "rl_zoo3"}}
    modules["Manager"] = rl_zoo3.exp_manager.ExperimentManager
    return {{(name, key): id(value) for name, module in modules.items() for key, value in vars(module).items()}}

before = attributes()
{register}
after = attributes()
print(*(".".join(key) for key in after if after[key] != before[key]))
"""


@pytest.mark.parametrize(
    ("imports", "register"),
    [
        ("from sb3_trpo_ext.zoo.manager import register", "register(); register()"),
        ("import rl_zoo3.hyperparams_opt", "import sb3_trpo_ext.zoo.plugin"),
    ],
)
def test_one_attribute_of_rl_zoo_is_replaced(
    imports: str, register: str, rl_zoo_interpreter: Interpreter, tmp_path: Path
) -> None:
    result = rl_zoo_interpreter.run(REPLACED.format(imports=imports, register=register), tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["rl_zoo3.train.ExperimentManager"]


@pytest.mark.parametrize("name", SCHEDULED)
def test_schedule_string_reaches_our_model(name: str, tmp_path: Path) -> None:
    results = manager("CartPole-v1", tmp_path, hyperparams={name: "lin_0.4"}).setup_experiment()
    assert results is not None
    model, saved = results
    # The file keeps what the user wrote.
    assert saved[name] == "lin_0.4"
    assert isinstance(model, TRPO)
    schedule = getattr(model, name)
    assert [schedule(progress) for progress in (1.0, 0.5, 0.0, -0.01)] == pytest.approx([0.4, 0.2, 0.0, 0.0])


def test_other_algorithms_keep_their_strings(tmp_path: Path) -> None:
    config = tmp_path / "sac.yml"
    entry = {"n_timesteps": 10, "policy": "MlpPolicy", "buffer_size": 10, "ent_coef": "auto_0.1"}
    config.write_text(yaml.safe_dump({"Pendulum-v1": entry}), encoding="utf-8")
    results = manager("Pendulum-v1", tmp_path, algo="sac", config=config).setup_experiment()
    assert results is not None
    model = results[0]
    assert isinstance(model, SAC)
    assert model.ent_coef == "auto_0.1"


def test_linear_schedule_is_a_class_of_sb3() -> None:
    assert isinstance(linear_schedule("target_kl", "lin_0.1"), LinearSchedule)


@pytest.mark.parametrize("text", ["0.1", "lin", "lin_", "lin_a", "cos_0.1"])
def test_linear_schedule_names_the_argument_and_the_value(text: str) -> None:
    with pytest.raises(ValueError, match=rf"`target_kl` must be .*got '{text}'"):
        linear_schedule("target_kl", text)


# === The command line ===


@pytest.mark.parametrize(
    ("name", "given", "added"),
    [
        ("train", ["--env", "A"], ["--algo", "trpo_ext", "--conf-file", str(hyperparams_path())]),
        ("train", ["--algo", "trpo_ext"], ["--conf-file", str(hyperparams_path())]),
        ("train", ["--algo", "trpo_ext_lstm"], ["--conf-file", str(hyperparams_path("trpo_ext_lstm"))]),
        ("enjoy", ["--algo", "trpo_ext_mask"], ["-f", "logs"]),
        ("train", ["--algo", "trpo"], []),
        ("train", ["--algo", "trpo_ext", "--conf-file", "a.yml"], []),
        ("train", ["--conf-file", "a.yml"], ["--algo", "trpo_ext"]),
        ("enjoy", ["--env", "A"], ["--algo", "trpo_ext", "-f", "logs"]),
        ("enjoy", ["-f", "runs"], ["--algo", "trpo_ext"]),
        ("enjoy", ["--algo", "ppo"], []),
        ("plot-train", ["-e", "A", "-f", "logs"], ["-a", "trpo_ext"]),
        ("plot-train", ["-a", "ppo"], []),
        ("all-plots", ["-e", "A", "-f", "logs"], ["-a", "trpo_ext"]),
        ("all-plots", ["-a", "trpo_ext", "trpo"], []),
        ("plot-from-file", ["-i", "A"], []),
        ("report", ["--env", "A", "-f", "runs", "--algo", "ppo"], []),
    ],
)
def test_defaults_are_added_to_what_the_user_wrote(name: str, given: list[str], added: list[str]) -> None:
    arguments = with_defaults(parse(name, given)).to_arguments()
    assert sorted(arguments) == sorted([*added, *given])
    # Read again, they say the same
    assert parse(name, arguments) == with_defaults(parse(name, given))


def test_abbreviated_options_are_read() -> None:
    arguments = ["--algo=ppo", "-conf", "a.yml", "-optimize", "-params", "a:1", "b:2", "-n", "3", "--vec-env=subproc"]
    options = parse("train", arguments)
    assert options.to_arguments() == [
        *("-n", "3", "--algo", "ppo", "--conf-file", "a.yml", "--optimize-hyperparameters", "--vec-env", "subproc"),
        *("--hyperparams", "a:1", "b:2"),
    ]
    # Whatever RL-Zoo's parser would take for one of ours, or our default would override it
    options = with_defaults(parse("train", ["--conf", "a.yml", "--hyperparam", "target_kl:lin_0.1"]))
    assert (options.conf_file, options.hyperparams) == ("a.yml", ["target_kl:lin_0.1"])
    assert options.to_arguments().count("--conf-file") == 1
    assert parse("enjoy", ["--exp", "1"]).exp_id == 1
    # An option of the script that begins like one of `train`'s
    assert parse("record-video", ["-o", "films"]).to_arguments() == ["-o", "films"]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in COMMANDS)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sb3-trpo-ext {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_our_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert sum(line.startswith("  --gym-packages ") for line in output.splitlines()) == 1
    assert "--verbose 2 " in output
    assert ("--resume FOLDER" in output) == ("--vec-env envpool" in output) == (name == "train")


@pytest.mark.parametrize(("arguments", "problem"), [([], "a command is missing"), (["play"], "there is no command 'play'")])
def test_wrong_command_is_explained(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: sb3-trpo")
    assert problem in error


@pytest.mark.parametrize("name", ["train", "report", "enjoy", "record-video", "record-training"])
def test_every_command_knows_our_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = sys.argv
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: sb3-trpo {name}")
    assert "trpo_ext" in output
    assert sys.argv is arguments


def test_record_training_films_through_our_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RL-Zoo's script starts `rl_zoo3.record_video` in a process of its own, which does not know our key."""
    run_path = tmp_path / "logs" / "trpo_ext" / "CartPole-v1_1"
    run_path.mkdir(parents=True)
    (run_path / "CartPole-v1.zip").touch()
    started: list[list[str]] = []

    def call(command: list[str]) -> int:
        started.append(command)
        return 0

    monkeypatch.chdir(tmp_path)
    # Nothing is looked for that could draw
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.setattr(os, "system", lambda _: 0)
    (tmp_path / "my_envs.py").touch()
    assert main(["record-training", "--env", "CartPole-v1", "--gym-packages", "my_envs", "--verbose", "2"]) == 0
    assert subprocess.call is call
    assert len(started) == 1
    assert started[0][-4:] == ["--verbose", "2", "--gym-packages", "my_envs"]
    assert started[0][:4] == [sys.executable, "-m", "sb3_trpo_ext.zoo", "record-video"]
    assert started[0][started[0].index("--algo") + 1] == "trpo_ext"


# === Both ways in, from training to watching ===


def test_our_command_trains_and_enjoys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        *(sys.executable, "-m", "sb3_trpo_ext.zoo"),
        *("train", "--env", "MountainCar-v0", "-n", "256", "--seed", "0", "--eval-freq", "-1", "--device", "cpu"),
        *(*TINY, "target_kl:'lin_0.02'"),
        cwd=tmp_path,
    )
    folder = tmp_path / "logs" / "trpo_ext" / "MountainCar-v0_1"
    data = saved_data(folder / "MountainCar-v0.zip")
    assert "trust_region" in data
    assert "LinearSchedule" in data["target_kl"][":type:"]
    config = yaml.load((folder / "MountainCar-v0" / "config.yml").read_text(), Loader=yaml.UnsafeLoader)
    assert config["target_kl"] == "lin_0.02"
    assert config["cg_damping"] == HYPERPARAMS["MountainCar-v0"]["cg_damping"]

    monkeypatch.chdir(tmp_path)
    assert main(["enjoy", "--env", "MountainCar-v0", "--no-render", "-n", "600", "--device", "cpu"]) == 0
    assert "Mean reward" in capsys.readouterr().out


def test_masks_are_used_from_training_to_watching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--algo", "trpo_ext_mask", "--env", "sb3_trpo_ext/Blocks-v0", "--device", "cpu"]
    evaluation = ["--eval-freq", "64", "--eval-episodes", "2", "--n-eval-envs", "1"]
    assert main(["train", *options, "-n", "256", "--seed", "0", *evaluation, *TINY]) == 0
    folder = tmp_path / "logs" / "trpo_ext_mask" / "sb3_trpo_ext-Blocks-v0_1"
    # An invalid action ends an episode. Without masks an agent that has learned nothing rarely gets beyond five
    assert np.load(folder / "evaluations.npz")["ep_lengths"].mean() > 7
    for command in (["enjoy", "--no-render", "-n", "100"], ["report", "--n-eval-episodes", "5", "-f", "logs"]):
        assert main([command[0], *options, *command[1:]]) == 0
    lines = capsys.readouterr().out.splitlines()
    lengths = [float(re.split(r"\s+", line.replace(":", ""))[3]) for line in lines if "ean episode length" in line]
    lengths += [float(line.split()[2]) for line in lines if "  episode length" in line]
    assert len(lengths) == 2
    assert min(lengths) > 7


def test_each_thread_of_a_search_has_masks_of_its_own() -> None:
    env = make_vec_env("sb3_trpo_ext/Blocks-v0", 2)
    remember(env)
    thread = threading.Thread(target=remember, args=(make_vec_env("sb3_trpo_ext/Blocks-v0", 3),))
    thread.start()
    thread.join()
    observations: Any = env.reset()
    actions, _ = MaskedAgent("MlpPolicy", env, n_steps=32).predict(observations)
    assert all(masks[action] for masks, action in zip(env.env_method("action_masks"), actions, strict=True))


def test_memory_is_carried_from_training_to_watching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--algo", "trpo_ext_lstm", "--env", "CartPoleNoVel-v1", "--device", "cpu"]
    small = ["policy_kwargs:dict(lstm_hidden_size=8)"]
    assert main(["train", *options, "-n", "256", "--seed", "0", "--eval-freq", "128", *TINY, *small]) == 0
    states: list[Any] = []
    predict = RecurrentTRPO.predict

    def watched(self: Any, observation: Any, state: Any = None, **kwargs: Any) -> Any:
        states.append(state)
        return predict(self, observation, state, **kwargs)

    monkeypatch.setattr(RecurrentTRPO, "predict", watched)
    assert main(["enjoy", *options, "--no-render", "-n", "50"]) == 0
    assert "Mean reward" in capsys.readouterr().out
    assert states[0] is None
    assert all(np.abs(state[0]).max() > 0 for state in states[1:])


def test_stock_command_trains_and_enjoys_our_class(rl_zoo_interpreter: Interpreter, tmp_path: Path) -> None:
    def rl_zoo3(*arguments: str) -> str:
        # What the installed command does, which has imported `main`
        result = rl_zoo_interpreter.run(f"sys.argv = {['rl_zoo3', *arguments]}; sys.exit(main())", tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    plugin = ["--algo", "trpo", "--gym-packages", "sb3_trpo_ext.zoo.plugin", "--env", "Pendulum-v1"]
    settings = ["-conf", "sb3_trpo_ext.zoo.plugin", "--eval-freq", "-1", "-n", "256", "--device", "cpu"]
    rl_zoo3("train", *plugin, *settings, *TINY, "normalize:True")
    folder = tmp_path / "logs" / "trpo" / "Pendulum-v1_1"
    assert "trust_region" in saved_data(folder / "Pendulum-v1.zip")

    output = rl_zoo3("enjoy", *plugin, *("-f", "logs", "--no-render", "-n", "200", "--device", "cpu"))
    assert "Mean reward" in output


def test_training_continues_from_a_saved_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = ["train", "--env", "CartPole-v1", "-n", "256", "--eval-freq", "-1", "--device", "cpu", "--seed", "1"]
    main([*train, *TINY])
    agent = tmp_path / "logs" / "trpo_ext" / "CartPole-v1_1" / "CartPole-v1.zip"
    main([*train, "-i", str(agent), *TINY, "target_kl:'lin_0.02'"])
    continued = tmp_path / "logs" / "trpo_ext" / "CartPole-v1_2" / "CartPole-v1.zip"
    assert "LinearSchedule" in saved_data(continued)["target_kl"][":type:"]


@pytest.mark.slow
def test_record_video_writes_a_film(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    sb3_trpo = [sys.executable, "-m", "sb3_trpo_ext.zoo"]
    run(*sb3_trpo, *("train", "--env", "CartPole-v1", "-n", "128", "--eval-freq", "-1"), *TINY, cwd=tmp_path)
    run(*sb3_trpo, *("record-video", "--env", "CartPole-v1", "-n", "50", "--no-render"), cwd=tmp_path)
    films = list((tmp_path / "logs" / "trpo_ext" / "CartPole-v1_1" / "videos").glob("*.mp4"))
    assert len(films) == 1
    assert films[0].stat().st_size > 0


# === The search space ===


def test_optimize_and_load_the_best_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study_options = ["--storage", storage, "--study-name", "test"]
    train = ["train", "--env", "CartPole-v1", "--device", "cpu", "-n", "1200"]
    search = [
        "-optimize",
        "--n-trials",
        "2",
        "--n-evaluations",
        "2",
        "--eval-episodes",
        "1",
        "--no-optim-plots",
        "--seed",
        "3",
    ]
    assert main([*train, *search, *study_options]) == 0
    output = capsys.readouterr().out
    assert "Number of finished trials:  2" in output
    assert "target_kl" in output

    study = optuna.load_study(study_name="test", storage=storage)
    assert {trial.state for trial in study.trials} <= {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    loader = manager("CartPole-v1", tmp_path, storage=storage, study_name="test", trial_id=1)
    results = loader.setup_experiment()
    assert results is not None
    model = results[0]
    params = study.trials[1].params
    assert isinstance(model, TRPO)
    assert model.n_steps == 2 ** params["n_steps_pow"]
    assert model.gae_lambda == 1 - params["one_minus_gae_lambda"]
    assert model.cg_damping == params["cg_damping"]


@pytest.mark.parametrize("n_envs", [1, 2, 6, 16, 4096, 100_000])
@pytest.mark.parametrize("n_actions", [0, 3])
def test_sampled_and_reloaded_arguments_are_the_same(n_envs: int, n_actions: int) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        sampled = search_space.sample_trpo_params(trial, n_actions, n_envs)
        assert search_space.convert_trpo_params(trial.params) == sampled
        assert sampled["n_steps"] * n_envs >= sampled["batch_size"]
        assert sampled["n_steps"] * n_envs <= 16384 or sampled["n_steps"] == 2
        assert 0.005 <= sampled["target_kl"] <= 0.5
        assert 0.001 <= sampled["cg_damping"] <= 10
        assert ("log_std_init" in sampled["policy_kwargs"]) == (n_actions > 0)
        assert sampled["policy_kwargs"]["activation_fn"] in (nn.Tanh, nn.ReLU)
        assert trial.user_attrs["gamma"] == sampled["gamma"]
        recurrent = search_space.sample_recurrent_params(trial, n_actions, n_envs)
        assert search_space.convert_trpo_params(trial.params) == recurrent
        assert set(recurrent["policy_kwargs"]) == {*sampled["policy_kwargs"], "lstm_hidden_size", "enable_critic_lstm"}


def test_sampled_arguments_construct_our_model() -> None:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    sampled = search_space.sample_trpo_params(trial, n_actions=1, n_envs=1)
    model = TRPO("MlpPolicy", "Pendulum-v1", device="cpu", **sampled)
    log_std = model.policy.log_std.detach().numpy()
    np.testing.assert_allclose(log_std, sampled["policy_kwargs"]["log_std_init"], rtol=1e-6)


# === The record of a training ===


def experiment_of(folder: Path, algo: str, callback: Any = None, **kwargs: Any) -> Manager:
    """A training of two updates."""
    config = folder / "settings.yml"
    entry = {"n_timesteps": 64, "policy": "MlpPolicy", "n_steps": 32, "batch_size": 32}
    entry |= {} if callback is None else {"callback": callback}
    config.write_text(yaml.safe_dump({"CartPole-v1": entry}), encoding="utf-8")
    return manager("CartPole-v1", folder, algo=algo, config=config, log_interval=-1, **kwargs)


@pytest.mark.parametrize(
    ("algo", "callback"),
    [
        (KEY, None),
        (KEY, "sb3_trpo_ext.TrainingRecorder"),
        ("ppo", ["sb3_trpo_ext.callbacks.TrainingRecorder"]),
    ],
)
def test_run_is_recorded_beside_its_other_files(algo: str, callback: Any, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, algo, callback, show_progress=True)
    results = experiment.setup_experiment()
    assert results is not None
    # RL-Zoo closes the first callback alone when training is interrupted: that must be the progress bar
    assert [type(callback).__name__ for callback in experiment.callbacks] == ["ProgressBarCallback", "TrainingRecorder"]
    experiment.learn(results[0])
    lines = (Path(experiment.save_path) / "progress.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["time/total_timesteps", "32", "64"]


def test_recorder_keeps_a_folder_of_its_own(tmp_path: Path) -> None:
    callback = {"sb3_trpo_ext.TrainingRecorder": {"folder": str(tmp_path / "mine")}}
    experiment = experiment_of(tmp_path, KEY, callback)
    experiment.setup_experiment()
    (recorder,) = experiment.callbacks
    assert isinstance(recorder, TrainingRecorder)
    assert recorder.folder == tmp_path / "mine"


def test_every_on_policy_algorithm_is_recorded(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, "ppo")
    experiment.setup_experiment()
    assert [type(callback) for callback in experiment.callbacks] == [TrainingRecorder]


def test_off_policy_algorithms_have_no_updates_to_record(tmp_path: Path) -> None:
    config = tmp_path / "settings.yml"
    entry = {"n_timesteps": 64, "policy": "MlpPolicy", "buffer_size": 100}
    config.write_text(yaml.safe_dump({"CartPole-v1": entry}), encoding="utf-8")
    experiment = manager("CartPole-v1", tmp_path, algo="dqn", config=config, log_interval=-1)
    experiment.setup_experiment()
    assert experiment.callbacks == []


def test_evaluations_are_timed(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, KEY)
    experiment.eval_freq, experiment.n_eval_episodes = 32, 1
    results = experiment.setup_experiment()
    assert results is not None
    evaluation = experiment.callbacks[-1]
    assert isinstance(evaluation, TimedEvalCallback)
    assert evaluation.deterministic
    experiment.learn(results[0])
    with (Path(experiment.save_path) / "progress.csv").open(newline="") as file:
        assert all(float(row["time/evaluation"]) > 0 for row in csv.DictReader(file))
    with np.load(Path(experiment.save_path) / "evaluations.npz") as table:
        assert table["results"].shape == (2, 1)
    assert (Path(experiment.save_path) / "best_model.zip").is_file()


def test_evaluations_of_the_users_are_left_as_they_are(tmp_path: Path) -> None:
    config = tmp_path / "settings.py"
    config.write_text(
        "import gymnasium as gym\n"
        "from stable_baselines3.common.callbacks import EvalCallback\n"
        "from stable_baselines3.common.monitor import Monitor\n"
        f"mine = EvalCallback(Monitor(gym.make('CartPole-v1')), eval_freq=32, n_eval_episodes=1, log_path={str(tmp_path)!r})\n"
        "entry = dict(n_timesteps=64, policy='MlpPolicy', n_steps=32, batch_size=32, callback=[mine])\n"
        "hyperparams = {'CartPole-v1': entry}\n"
    )
    experiment = manager("CartPole-v1", tmp_path / "logs", config=config, log_interval=-1)
    experiment.eval_freq, experiment.n_eval_episodes = 64, 1
    results = experiment.setup_experiment()
    assert results is not None
    assert [type(callback) for callback in experiment.callbacks] == [TrainingRecorder, EvalCallback, TimedEvalCallback]
    experiment.learn(results[0])
    for folder, n_evaluations in ((tmp_path, 2), (Path(experiment.save_path), 1)):
        with np.load(folder / "evaluations.npz") as table:
            assert len(table["results"]) == n_evaluations


def test_all_callbacks_end_after_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ending(BaseCallback):
        n_ends = 0

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            self.n_ends += 1

    def interrupt(_: TRPO) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TRPO, "train", interrupt)
    experiment = experiment_of(tmp_path, KEY)
    results = experiment.setup_experiment()
    assert results is not None
    callbacks = [Ending(), Ending(), Ending()]
    experiment.callbacks = [callbacks[0], *experiment.callbacks, *callbacks[1:]]
    experiment.learn(results[0])
    assert [callback.n_ends for callback in callbacks] == [1, 1, 1]


def test_search_for_hyperparameters_records_nothing(tmp_path: Path) -> None:
    experiment = manager("CartPole-v1", tmp_path, optimize_hyperparameters=True)
    assert experiment.setup_experiment() is None
    assert experiment.specified_callbacks == []
    assert experiment.callbacks == []


def test_environments_of_brax_are_trained_in_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brax's ``fast`` is an environment without physics, for tests like this one."""
    pytest.importorskip("brax")
    monkeypatch.chdir(tmp_path)
    made: list[Any] = []
    train = TRPO.train

    def noted(self: TRPO) -> None:
        made.append(type(self.rollout_buffer).__name__)
        train(self)

    monkeypatch.setattr(TRPO, "train", noted)
    settings = ["--hyperparams", "n_envs:4", "n_steps:16", "batch_size:32", "policy:'MultiInputPolicy'"]
    folder = ["-f", str(tmp_path / "logs"), "--device", "cpu"]
    options = ["-n", "128", "--eval-freq", "64", "--eval-episodes", "2", "--env-kwargs", "use_dict_obs:True"]
    options += ["episode_length:5"]
    assert main(["train", "--env", "brax/fast", *folder, *settings, *options, "--verbose", "0"]) == 0
    assert made == ["TensorRolloutBuffer"] * 2
    run = tmp_path / "logs" / "trpo_ext" / "brax-fast_1"
    assert {"brax-fast.zip", "evaluations.npz", "progress.csv"} <= {path.name for path in run.iterdir()}
    assert main(["enjoy", "--env", "brax/fast", *folder, "--no-render", "-n", "10", "--verbose", "0"]) == 0
    assert main(["report", "--env", "brax/fast", "-f", str(tmp_path / "logs")]) == 0


def test_an_environment_that_brax_does_not_have_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("brax")
    assert main(["train", "--env", "brax/ants", "-f", str(tmp_path), "--device", "cpu"]) == 2
    assert "Brax has no environment 'ants'; did you mean ant" in capsys.readouterr().err
    assert main(["train", "--env", "brax/ant", "-f", str(tmp_path), "--vec-env", "envpool"]) == 2
    assert "environments of brax have none" in capsys.readouterr().err
