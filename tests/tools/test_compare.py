"""The comparison: settings, trainings side by side that can be interrupted, statistics and table."""

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import yaml
from rl_zoo3 import ALGOS

from sb3_trpo_ext.tools import compare, comparison_settings, comparison_table
from sb3_trpo_ext.zoo.command import main
from sb3_trpo_ext.zoo.manager import register
from sb3_trpo_ext.zoo.runs import Curve, Run
from sb3_trpo_ext.zoo.settings import load_hyperparams

register()

#: A stand-in for a training: leaves the files of one behind, in no time. Its first argument says how it ends.
FAKE = """
import shutil, sys, time
how, files, folder = sys.argv[1:4]
shutil.copytree(files, folder)
if how == "hang":
    time.sleep(60)
if how == "crash":
    raise RuntimeError("no more memory")
"""


def run_compare(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Run the command; returns its exit status and what it prints."""
    try:
        status: Any = main(["compare", *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals of a hundred draws: thousands take a second, in each comparison twice."""
    monkeypatch.setattr(comparison_table, "N_BOOTSTRAP", 100)


@pytest.fixture(scope="module")
def files_of_seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What trainings with three seeds have left."""
    folders = []
    for seed in range(3):
        folders.append(tmp_path_factory.mktemp("training"))
        columns = "time/total_timesteps,time/time_elapsed,time/evaluation"
        (folders[-1] / "progress.csv").write_text(f"{columns}\n50,3.0,2.0\n100,10.0,4.0\n")
        results = [[1.0, 3.0], [10.0 + seed, 10.0 + seed]]
        np.savez(folders[-1] / "evaluations.npz", timesteps=[50, 100], results=results)
    return folders


@pytest.fixture
def fake(files_of_seeds: list[Path], few_draws: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Replaces trainings by stand-ins; returns the list of those that were started."""
    started: list[str] = []
    make_jobs = compare.make_jobs

    def install(**ends: str) -> list[str]:
        def make(args: argparse.Namespace, settings: Any) -> list[compare.Job]:
            jobs = []
            for job in make_jobs(args, settings):
                how = ends.get(f"{job.algo}_{job.seed}", "succeed")
                files, run = str(files_of_seeds[job.seed]), str(job.folder / job.algo / f"{args.env}_1")
                command = [sys.executable, "-c", FAKE, how, files, run]
                jobs.append(dataclasses.replace(job, command=command))
            return jobs

        start = compare.start

        def note(job: compare.Job, lock: tuple[int, ...]) -> Any:
            started.append(job.name)
            return start(job, lock)

        monkeypatch.setattr(compare, "make_jobs", make)
        monkeypatch.setattr(compare, "start", note)
        return started

    return install


def arguments(folder: Path, *others: Any) -> list[Any]:
    """A small comparison."""
    return ["--env", "CartPole-v1", "--algos", "trpo_ext", "ppo", "--seeds", 2, "-n", 100, "-f", folder, *others]


# === Settings ===


@pytest.mark.parametrize(
    ("algo", "env_id", "source"),
    [
        ("trpo_ext", "Hopper-v5", "sb3-trpo-ext's Hopper-v5"),
        ("trpo", "Hopper-v5", "RL-Zoo's Hopper-v4"),
        ("ppo", "HumanoidStandup-v5", "RL-Zoo's HumanoidStandup-v2"),
        ("ppo", "CartPole-v1", "RL-Zoo's CartPole-v1"),
        ("trpo", "Taxi-v3", "RL-Zoo's default"),
    ],
)
def test_settings_of_the_nearest_version_are_taken(algo: str, env_id: str, source: str) -> None:
    settings = comparison_settings.find_settings(algo, env_id)
    assert settings.source == source


def test_nearest_version_prefers_the_newer_of_two() -> None:
    entries: dict[str, Any] = {"A-v1": {}, "A-v3": {}, "A-v9": {}, "BA-v2": {}, "A-v2x": {}}
    assert comparison_settings.nearest_version("A-v2", entries) == "A-v3"
    assert comparison_settings.nearest_version("A-v8", entries) == "A-v9"
    assert comparison_settings.nearest_version("C-v1", entries) is None
    assert comparison_settings.nearest_version("A", entries) is None


def test_settings_of_rl_zoo_are_otherwise_unchanged() -> None:
    path = Path(sys.modules["rl_zoo3"].__path__[0]) / "hyperparams" / "trpo.yml"
    theirs = yaml.safe_load(path.read_text())["Hopper-v4"]
    entry = comparison_settings.find_settings("trpo", "Hopper-v5").entry
    assert entry == theirs


def test_equal_kl_is_ours_in_their_units() -> None:
    ours = load_hyperparams()["Humanoid-v5"]
    theirs = comparison_settings.find_settings("trpo", "Humanoid-v5")
    converted = comparison_settings.with_equal_kl(theirs, "Humanoid-v5")
    # It falls linearly from 0.5, which sb3-contrib cannot do: the mean
    assert ours["target_kl"] == "lin_0.5"
    assert converted.entry["target_kl"] == pytest.approx(0.25 / 17)
    assert converted.entry["cg_damping"] == pytest.approx(ours["cg_damping"] / 17)
    unchanged = {key: value for key, value in converted.entry.items() if key not in ("target_kl", "cg_damping")}
    assert unchanged == {key: value for key, value in theirs.entry.items() if key in unchanged}
    assert "x 17" in converted.source


def test_equal_kl_needs_numbers() -> None:
    with pytest.raises(ValueError, match=r"--equal-kl needs numbers.* Reacher-v5 leave `target_kl`"):
        comparison_settings.with_equal_kl(comparison_settings.find_settings("trpo", "Hopper-v5"), "Reacher-v5")


@pytest.mark.parametrize(("env_id", "n_dims"), [("MountainCar-v0", 1), ("Hopper-v5", 3), ("MountainCarContinuous-v0", 1)])
def test_equal_kl_divides_by_the_number_of_action_dimensions(env_id: str, n_dims: int) -> None:
    converted = comparison_settings.with_equal_kl(comparison_settings.find_settings("trpo", env_id), env_id)
    ours = load_hyperparams()[env_id]["cg_damping"]
    assert converted.entry["cg_damping"] == pytest.approx(ours / n_dims)


# === Statistics ===


def runs_of(*finals: float) -> list[Run]:
    """One run for each final return, which they reach on a straight line from zero, with 10 steps per second."""
    steps = np.array([0, 50, 100])
    nothing = Curve(np.zeros(0), np.zeros(0))
    updates = pandas.DataFrame({"timesteps": [100], "time/time_elapsed": [14.0], "time/evaluation": [4.0]})
    curves = [Curve(steps, np.outer(steps, [final / 100] * 2)) for final in finals]
    return [Run(Path("."), None, nothing, curve, updates, {}) for curve in curves]


def test_figures_of_a_table() -> None:
    finals = (1.0, 2.0, 3.0, 4.0, 100.0, 6.0, 7.0, 8.0)
    table = comparison_table.make_table({"a": runs_of(*finals), "b": runs_of(5.0), "c": []}, threshold=3.5)
    first, single, nothing = (row for _, row in table.iterrows())
    assert first["final return"] == pytest.approx(np.mean(finals))
    assert first["std over seeds"] == pytest.approx(np.std(finals, ddof=1))
    # Without the two best and the two worst
    assert first["IQM"] == pytest.approx(np.mean([3, 4, 6, 7]))
    assert 1 <= first["IQM low"] < first["IQM"] < first["IQM high"] <= 100
    assert first["area under curve"] == pytest.approx(np.mean(finals) / 2)
    assert first["worst seed"] == 1.0
    # 7 and 100 and 8 are at 3.5 after half of the training, 4 and 6 at its end
    assert first["steps to 3.5"] == 50.0
    assert first["seeds that reach 3.5"] == 5
    assert first["steps/s"] == 10.0
    assert single["IQM"] == 5.0
    assert np.isnan(single["IQM low"])
    assert nothing["seeds"] == 0

    lines = comparison_table.as_markdown(table).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert "50 (5 of 8 seeds)" in lines[2]
    assert "[-, -]" in lines[3]
    assert "nan" not in "".join(lines)


def test_intervals_are_the_same_every_time_and_leave_numpy_alone(few_draws: None) -> None:
    scores = np.arange(10.0)[:, None]
    np.random.seed(3)  # noqa: NPY002
    first = comparison_table.interquartile_means(scores)
    drawn = np.random.rand()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    assert np.random.rand() == drawn  # noqa: NPY002
    np.testing.assert_array_equal(comparison_table.interquartile_means(scores)[1], first[1])


def test_curves_of_different_length_meet_at_the_shortest() -> None:
    short, long = runs_of(10.0)[0].evaluations, Curve(np.array([0, 30, 120]), np.array([[0.0], [30.0], [120.0]]))
    steps, curves = comparison_table.common_curves([short, long])
    np.testing.assert_array_equal(steps, [0, 50, 100])
    np.testing.assert_allclose(curves, [[0, 5, 10], [0, 50, 100]])


def test_speed_leaves_evaluations_out_and_is_not_guessed(few_draws: None) -> None:
    table = pandas.DataFrame({"timesteps": [50, 100], "time/time_elapsed": [3.0, 10.0], "time/evaluation": [2.0, 4.0]})
    assert comparison_table.speed_of(table) == 25.0
    assert np.isnan(comparison_table.speed_of(table.drop(columns="time/evaluation")))
    assert np.isnan(comparison_table.speed_of(table[:0]))
    unknown = [run._replace(updates=run.updates[:0]) for run in runs_of(1.0, 2.0)]
    rows = comparison_table.make_table({"a": unknown, "b": [*unknown[:1], *runs_of(1.0)]}, None)
    assert rows["steps/s"].iloc[1] == 10.0
    lines = comparison_table.as_markdown(rows).splitlines()
    assert lines[2].endswith("| - |")
    assert lines[3].endswith("| 10 |")


def test_help_tells_each_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("compare", "report"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "None" not in text
        assert "[]" not in text
        assert not re.search(r"\(default[^)]*\) \(default", text)
        assert "(default: cpu)" in text or "(default: auto)" in text


# === Running ===


def test_comparison_writes_table_and_curves(
    tmp_path: Path, fake: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    started = fake()
    status, output, _ = run_compare(capsys, *arguments(tmp_path))
    assert status == 0
    # Both algorithms have a seed before one has two
    assert started == ["trpo_ext seed 0", "ppo seed 0", "trpo_ext seed 1", "ppo seed 1"]
    folder = tmp_path / "CartPole-v1"
    text = (folder / "comparison.md").read_text()
    assert "| trpo_ext | 2 | 10.5 ± 0.707 | 10.5 [10, 11] |" in text
    # 100 steps in 10 seconds, 6 of them evaluations
    assert text.count("| 25 |") == 2
    assert "* ppo: settings are RL-Zoo's CartPole-v1." in text
    assert text in output
    assert (folder / "comparison.csv").read_text().startswith("algorithm,seeds,final return")
    assert (folder / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_finished_seeds_are_not_run_again(
    tmp_path: Path, fake: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    started = fake()
    run_compare(capsys, *arguments(tmp_path))
    started.clear()
    assert run_compare(capsys, *arguments(tmp_path))[0] == 0
    assert started == []
    # More seeds and more algorithms add to what is there
    assert run_compare(capsys, *arguments(tmp_path, "--seeds", 3, "--algos", "trpo_ext", "a2c", "a2c"))[0] == 0
    assert started == ["a2c seed 0", "a2c seed 1", "trpo_ext seed 2", "a2c seed 2"]


def test_crashed_training_is_reported_and_tried_again(
    tmp_path: Path, fake: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    started = fake(ppo_0="crash")
    status, output, _ = run_compare(capsys, *arguments(tmp_path))
    assert status == 1
    assert "ppo seed 0 crashed: RuntimeError: no more memory" in output
    text = (tmp_path / "CartPole-v1" / "comparison.md").read_text()
    assert "| trpo_ext | 2 |" in text
    assert "| ppo | 1 |" in text
    assert "* ppo seed 0 crashed" in text
    started.clear()
    fake()
    assert run_compare(capsys, *arguments(tmp_path))[0] == 0
    assert set(started) == {"ppo seed 0"}


def test_without_a_finished_training_there_is_no_table(
    tmp_path: Path, fake: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(ppo_0="crash")
    assert run_compare(capsys, *arguments(tmp_path, "--seeds", 1, "--algos", "ppo"))[0] == 1
    assert not (tmp_path / "CartPole-v1" / "comparison.md").exists()


def test_other_settings_are_not_mixed(
    tmp_path: Path, fake: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    fake()
    run_compare(capsys, *arguments(tmp_path))
    status, _, error = run_compare(capsys, *arguments(tmp_path, "-n", 200))
    assert status == 2
    assert "was trained with other settings (-n, --eval-freq): take another --folder" in error
    assert error.count("\n") == 1
    status, _, error = run_compare(capsys, *arguments(tmp_path, "--vec-env", "dummy"))
    assert status == 2
    assert "was trained with other settings (--vec-env)" in error


def test_half_a_marker_is_an_interrupted_training(
    tmp_path: Path, fake: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    started = fake()
    run_compare(capsys, *arguments(tmp_path))
    marker = tmp_path / "CartPole-v1" / "ppo" / "seed_1" / "done.json"
    marker.write_text(marker.read_text()[:30])
    started.clear()
    assert run_compare(capsys, *arguments(tmp_path))[0] == 0
    assert started == ["ppo seed 1"]


@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_damaged_result_ends_in_one_line(
    damage: str, tmp_path: Path, fake: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    fake()
    run_compare(capsys, *arguments(tmp_path))
    path = tmp_path / "CartPole-v1" / "ppo" / "seed_1" / "ppo" / "CartPole-v1_1" / "evaluations.npz"
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else whole[: len(whole) // 2])
    status, _, error = run_compare(capsys, *arguments(tmp_path))
    assert status == 2
    assert error.startswith("sb3-trpo compare: error: ")
    assert error.count("\n") == 1
    assert "evaluations" in error


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_interruption_ends_all_trainings_and_can_be_continued(
    tmp_path: Path, fake: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = fake(ppo_0="hang", trpo_ext_1="hang")
    processes: list[subprocess.Popen[bytes]] = []
    start = compare.start

    def remember(job: compare.Job, lock: tuple[int, ...]) -> subprocess.Popen[bytes]:
        processes.append(start(job, lock))
        return processes[-1]

    sleep = time.sleep

    def interrupt(_: float) -> None:
        sleep(0.05)
        if sum("hang" in process.args and process.poll() is None for process in processes) == 2:  # type: ignore[operator]
            raise KeyboardInterrupt

    monkeypatch.setattr(compare, "start", remember)
    monkeypatch.setattr(time, "sleep", interrupt)
    status, _, error = run_compare(capsys, *arguments(tmp_path))
    assert status == 130
    assert error == "sb3-trpo compare: interrupted; run the same command again to go on\n"
    assert len(processes) == 3
    assert not any(is_alive(process.pid) for process in processes)

    monkeypatch.setattr(time, "sleep", sleep)
    started.clear()
    fake()
    assert run_compare(capsys, *arguments(tmp_path))[0] == 0
    assert "trpo_ext seed 0" not in started
    assert {"ppo seed 0", "trpo_ext seed 1", "ppo seed 1"} == set(started)


def test_interruption_while_a_training_starts_ends_it(
    tmp_path: Path, fake: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(trpo_ext_0="hang")
    processes: list[subprocess.Popen[bytes]] = []
    start = compare.start

    def start_and_interrupt(job: compare.Job, lock: tuple[int, ...]) -> subprocess.Popen[bytes]:
        processes.append(start(job, lock))
        os.kill(os.getpid(), signal.SIGTERM)
        # Where a handler in Python runs
        time.sleep(0.01)
        return processes[-1]

    monkeypatch.setattr(compare, "start", start_and_interrupt)
    assert run_compare(capsys, *arguments(tmp_path))[0] == 130
    assert len(processes) == 1
    assert not is_alive(processes[0].pid)


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fcntl")
    with compare.locked(tmp_path / "CartPole-v1"):
        status, _, error = run_compare(capsys, *arguments(tmp_path))
    assert status == 2
    assert "another comparison is at work" in error


@pytest.mark.parametrize(
    ("others", "problem"),
    [
        (["--algos", "trpo_ex"], "--algos: there is no algorithm 'trpo_ex'; did you mean trpo_ext or trpo"),
        (["--env", "CartPole-v7"], "--env: there is no environment 'CartPole-v7'; did you mean CartPole-v"),
        (["--seeds", 0], "--seeds must be at least 1, got 0"),
        (["--jobs", 0], "--jobs must be at least 1, got 0"),
        (["-n", 0], "--n-timesteps must be at least 1, got 0"),
        (["--eval-freq", 1000], "--eval-freq must be between 1 and --n-timesteps, got 1000"),
        (["--equal-kl"], "--equal-kl converts the settings of sb3-contrib's trpo, which is not among --algos"),
        (["--gym-packages", "no_such_module"], "--gym-packages no_such_module: No module named 'no_such_module'"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    others: list[Any], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = run_compare(capsys, *arguments(tmp_path, *others))
    assert status == 2
    assert error.startswith(f"sb3-trpo compare: error: {problem}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_progress_is_read_by_the_name_of_the_column(tmp_path: Path) -> None:
    job = compare.Job("ppo", "CartPole-v1", 0, tmp_path, [], {})
    assert job.n_steps_done() == 0
    run = tmp_path / "ppo" / "CartPole-v1_1"
    run.mkdir(parents=True)
    assert job.n_steps_done() == 0
    (run / "progress.csv").write_text("train/loss,time/total_timesteps\n0.5,50\n0.25,100\n0.1")
    assert job.n_steps_done() == 100


def test_command_of_a_training(tmp_path: Path) -> None:
    others = ["--eval-freq", 10, "--vec-env", "envpool"]
    args = compare._parser().parse_args([str(part) for part in arguments(tmp_path, *others)])
    settings = {algo: comparison_settings.find_settings(algo, args.env) for algo in args.algos}
    job = compare.make_jobs(args, settings)[-1]
    assert job.name == "ppo seed 1"
    options = dict(zip(job.command[4::2], job.command[5::2], strict=True))
    assert options["--algo"] == "ppo"
    assert options["--seed"] == "1"
    assert options["-n"] == "100"
    assert options["--eval-freq"] == "10"
    assert options["--vec-env"] == "envpool"
    assert options["--algo"] in ALGOS


def test_settings_are_under_the_whole_id_of_the_environment(tmp_path: Path) -> None:
    """Folders are named after it, and an id such as ALE/Pong-v5 makes two of them."""
    settings = {"n_steps": 16}
    job = compare.Job("ppo", "ALE/Pong-v5", 0, tmp_path / "ALE/Pong-v5/ppo/seed_0", ["true"], {"settings": settings})
    compare.start(job, ()).wait()
    assert yaml.safe_load((job.folder / "settings.yml").read_text()) == {"ALE/Pong-v5": settings}


@pytest.mark.slow
def test_three_algorithms_and_three_seeds_with_an_interruption(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sb3_trpo_ext.zoo",
        "compare",
        "--env",
        "CartPole-v1",
        "--algos",
        "trpo_ext",
        "trpo",
        "ppo",
    ]
    command += ["--seeds", "3", "-n", "3000", "--jobs", "2", "--eval-episodes", "2", "-f", str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    finished = []
    for line in first.stdout:
        finished += [line.split(" in ")[0]] if line.startswith("finished") else []
        if len(finished) == 2:
            break
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 130

    done = {path: path.read_bytes() for path in tmp_path.rglob("done.json")}
    assert len(done) >= 2
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"9 trainings, {len(done)} of them finished before" in second.stdout
    assert second.stdout.count("\nfinished") == 9 - len(done)
    assert all(path.read_bytes() == content for path, content in done.items())
    assert len(list(tmp_path.rglob("done.json"))) == 9

    folder = tmp_path / "CartPole-v1"
    text = (folder / "comparison.md").read_text()
    for algo in ("trpo_ext", "trpo", "ppo"):
        assert f"| {algo} | 3 | " in text
        for seed in range(3):
            assert json.loads((folder / algo / f"seed_{seed}" / "done.json").read_text())["seconds"] > 0
            run = folder / algo / f"seed_{seed}" / algo / "CartPole-v1_1"
            assert {"progress.csv", "evaluations.npz", "0.monitor.csv"} <= {path.name for path in run.iterdir()}
    assert (folder / "learning_curves.png").is_file()
