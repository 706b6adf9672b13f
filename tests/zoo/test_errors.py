"""How every command ends in an error: one line for what a user can put right, a traceback for a crash in training."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from interpreters import Interpreter
from rl_zoo3.exp_manager import ExperimentManager

from sb3_trpo_ext import __version__
from sb3_trpo_ext.zoo import command
from sb3_trpo_ext.zoo.command import COMMANDS, main
from sb3_trpo_ext.zoo.errors import EXTRAS, one_line

SMALL = ["--eval-freq", "-1", "--device", "cpu", "--verbose", "0", "-n", "64"]
TINY = ["-params", "n_envs:1", "n_steps:64", "batch_size:64", "n_critic_updates:1"]
#: Registers an environment that fails in its tenth step.
BROKEN = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Broken(CartPoleEnv):
    n_steps = 0
    def step(self, action):
        self.n_steps += 1
        if self.n_steps == 10:
            raise ValueError("the pole broke")
        return super().step(action)

gymnasium.register("Broken-v0", entry_point=Broken)
"""


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that ends in one line."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("sb3-trpo ")]
    assert len(lines) == 1
    assert "Traceback" not in error
    assert lines[0].startswith(f"sb3-trpo {arguments[0]}: error: ")
    assert lines[0].endswith(" (--verbose 2 shows the traceback)")
    return lines[0].removeprefix(f"sb3-trpo {arguments[0]}: error: ")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--hyperparams", "target_klx:0.1"], "there is no hyperparameter 'target_klx' of TRPO; did you mean target_kl"),
        (["-params", "n_env:2"], "there is no hyperparameter 'n_env' of TRPO; did you mean n_envs"),
        (["--algo", "ppo", "-params", "clip:0.1"], "there is no hyperparameter 'clip' of PPO; there are batch_size, "),
        (["-params", "seed:1"], "'seed' is not a hyperparameter but an option: --seed"),
        (["-params", "target_kl:lin_a"], "`target_kl` must be a number or a linear schedule such as 'lin_0.1', got 'lin_a'"),
        (["-params", "target_kl"], "--hyperparams target_kl: must be NAME:VALUE"),
        (["-params", "policy:MlpPolicy"], "--hyperparams policy:MlpPolicy: must be NAME:VALUE with a Python value"),
        (["--env-kwargs", "render_mode:human"], "--env-kwargs render_mode:human: must be NAME:VALUE"),
        (["--env-kwargs", "gravity:1"], "TypeError: CartPoleEnv.__init__() got an unexpected keyword argument 'gravity'"),
        (["-params", "target_kl:-0.1"], "`target_kl` must be"),
        (["-params", "policy:'nowhere.Policy'"], "No module named 'nowhere'"),
        (["--gym-packages", "nowhere"], "--gym-packages nowhere: No module named 'nowhere'"),
        (["-conf", "nowhere.yml"], "nowhere.yml: No such file or directory"),
        (["-i", "nowhere.zip"], "The trained_agent must be a valid path to a .zip file"),
        (["-f", "a_file"], "a_file/trpo_ext"),
        (["--device", "gpu"], "Expected one of cpu, cuda"),
        (["-optimize", "--storage", "nonsense", "--study-name", "a"], "Could not parse SQLAlchemy URL"),
        (["--storage", "sqlite:///new.db", "--study-name", "a", "--trial-id", "3"], "KeyError: 'Record does not exist.'"),
    ],
)
def test_wrong_option_of_train(arguments: list[str], problem: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a_file").touch()
    assert problem in error_of(capsys, "train", "--env", "CartPole-v1", *SMALL, *arguments)
    # A name of a hyperparameter is looked at before there is a folder
    assert "hyperparameter" not in problem or not (folder / "logs").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["train"], "--env is missing: give the id of an environment, such as --env Humanoid-v5"),
        (["enjoy"], "--env is missing"),
        (["record-video"], "--env is missing"),
        (["record-training"], "--env is missing"),
        (["train", "--env", "CartPole-v7"], "--env: there is no environment 'CartPole-v7'; did you mean CartPole-v"),
        (["enjoy", "--env", "CartPole-v7"], "--env: there is no environment 'CartPole-v7'; did you mean CartPole-v"),
        (["report", "--env", "CartPole-v7"], "--env: there is no environment 'CartPole-v7'; did you mean CartPole-v"),
        (["enjoy", "--env", "CartPole-v1", "--no-render"], "there is no run of CartPole-v1 in logs/trpo_ext: is it in"),
        (["record-training", "--env", "CartPole-v1"], "there is no run of CartPole-v1 in logs/trpo_ext: is it in"),
        (["train", "--resume", "nowhere"], "`--resume`: there is no run of `sb3-trpo train` in "),
        (["plot", "nowhere"], "there is no run in "),
        (["plot-from-file", "-i", "nowhere.pkl"], "nowhere.pkl: No such file or directory"),
        (["all-plots", "--gym-packages", "nowhere"], "--gym-packages nowhere: No module named 'nowhere'"),
    ],
)
def test_wrong_option_of_a_command(
    arguments: list[str], problem: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(capsys, *arguments).startswith(problem)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no archive", b"half"])
def test_damaged_agent(content: bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--env", "CartPole-v1", *SMALL, *TINY]) == 0
    agent = folder / "logs" / "trpo_ext" / "CartPole-v1_1" / "CartPole-v1.zip"
    agent.write_bytes(agent.read_bytes()[:2000] if content == b"half" else content)
    for name in (["enjoy", "--no-render"], ["report"]):
        assert str(Path("logs/trpo_ext/CartPole-v1_1/CartPole-v1.zip")) in error_of(capsys, *name, "--env", "CartPole-v1")


@pytest.mark.parametrize("command", ["train", "report", "plot", "compare", "enjoy", "record-video", "all-plots"])
def test_traceback_is_shown_where_it_is_asked_for(command: str, folder: Path) -> None:
    with pytest.raises(ImportError, match="nowhere"):
        main([command, "--gym-packages", "nowhere", "--verbose", "2"])


def test_crash_in_training_keeps_its_traceback(folder: Path) -> None:
    (folder / "broken_env.py").write_text(BROKEN)
    train = ["train", "--env", "Broken-v0", "--gym-packages", "broken_env", *SMALL, *TINY]
    with pytest.raises(ValueError, match="the pole broke"):
        main(train)


def test_search_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(ExperimentManager, "objective", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        main(["train", "--env", "CartPole-v1", "-optimize", "--n-trials", "1", *SMALL])


@pytest.mark.parametrize("error", [ZeroDivisionError("1/0"), NameError("name 'x' is not defined")])
def test_fault_of_a_program_is_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(command, "run", fail)
    with pytest.raises(type(error)):
        main(["train"])


#: Runs commands where some packages are not installed, and prints the status of each.
BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

assert {{name.partition(".")[0] for name in sys.modules}}.isdisjoint({blocked})
sys.meta_path.insert(0, Blocker())
from sb3_trpo_ext.zoo.command import main
for command in {commands}:
    print("status", main(command))
"""


WithoutPackages = Callable[..., tuple[list[str], str]]


@pytest.fixture
def without_packages(sb3_interpreter: Interpreter, tmp_path: Path) -> WithoutPackages:
    """Runs commands as if some packages were not installed, and returns what they print and what they say on stderr."""

    def run(blocked: list[str], *commands: list[str]) -> tuple[list[str], str]:
        result = sb3_interpreter.run(BLOCKED.format(blocked=blocked, commands=commands), tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines(), result.stderr

    return run


def test_missing_extra_is_named(without_packages: WithoutPackages) -> None:
    names = [name for name in COMMANDS if name not in ("init", "plot")]
    output, errors = without_packages(["rl_zoo3"], *([name, "--env", "CartPole-v1"] for name in names))
    assert output == ["status 2"] * len(names)
    advice = "install it with `pip install 'sb3-trpo-ext[zoo]'`"
    for name, line in zip(names, errors.splitlines(), strict=True):
        assert line.startswith(f"sb3-trpo {name}: error: RL-Zoo is missing: {advice}")


def test_no_extra_is_needed_to_ask_for_help(without_packages: WithoutPackages) -> None:
    output, errors = without_packages(list(EXTRAS), ["--help"], ["--version"])
    assert errors == ""
    assert output[0].startswith("usage: sb3-trpo")
    assert output[-3:] == ["status 0", f"sb3-trpo-ext {__version__}", "status 0"]


def test_record_of_a_training_is_drawn_without_rl_zoo(without_packages: WithoutPackages, tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text("time/total_timesteps,train/kl_divergence_loss\n32,0.01\n64,0.02\n")
    blocked = [module for module, extra in EXTRAS.items() if extra == "zoo"]
    output, errors = without_packages(blocked, ["plot", "."])
    assert output[-1] == "status 0", errors
    assert list(tmp_path.glob("*.png"))
    output, errors = without_packages([*EXTRAS], ["plot", "."])
    assert output == ["status 2"]
    assert "is missing: install it with `pip install 'sb3-trpo-ext[plots]'`" in errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "a b"),
        (KeyError("a"), "KeyError: 'a'"),
        (AssertionError(), "AssertionError"),
        (FileNotFoundError(2, "No such file or directory", "a.yml"), "a.yml: No such file or directory"),
        (OSError("no display"), "no display"),
        (yaml.YAMLError("bad"), "bad"),
    ],
)
def test_error_is_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


def test_status_of_the_process_is_2(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sb3-trpo", "train", "--env", "CartPole-v1", "-params", "target_klx:1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("sb3_trpo_ext.zoo", run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("sb3-trpo train: error: there is no hyperparameter 'target_klx'")


@pytest.mark.parametrize("option", ["-params", "--hyperparams"])
def test_our_notation_needs_no_quotes(option: str, folder: Path) -> None:
    arguments = ["--env", "CartPole-v1", *SMALL, option, *TINY[1:], "target_kl:lin_0.02", "learning_rate:lin_1e-3"]
    assert main(["train", *arguments, "cg_damping:'lin_0.1'"]) == 0
    config = yaml.load((folder / "logs/trpo_ext/CartPole-v1_1/CartPole-v1/config.yml").read_text(), Loader=yaml.UnsafeLoader)
    assert (config["target_kl"], config["learning_rate"], config["cg_damping"]) == ("lin_0.02", "lin_1e-3", "lin_0.1")
