"""The page of diagnostics: what is read from a run, what is drawn of it, and what is said where there is nothing to draw."""

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import yaml
from interpreters import Interpreter

from sb3_trpo_ext.tools import diagnostics, plots
from sb3_trpo_ext.zoo import runs
from sb3_trpo_ext.zoo.command import main
from sb3_trpo_ext.zoo.runs import Curve

RESULTS = Path(__file__).resolve().parents[2] / "results"


def write_run(folder: Path, env_id: str = "CartPole-v1", n_updates: int = 5, table: str = "progress.csv") -> Path:
    """A made-up run of two environments, with an evaluation every other update; the third update is rejected."""
    (folder / env_id).mkdir(parents=True)
    for index in range(2):
        rows = [f"{10.0 * episode + index},{50},{0.1 * episode}" for episode in range(1, n_updates + 1)]
        lines = [f'#{{"t_start": 0.0, "env_id": "{env_id}"}}', "r,l,t", *rows]
        (folder / f"{index}.monitor.csv").write_text("\n".join(lines) + "\n")
    steps = 100 * np.arange(1, n_updates + 1)
    np.savez(folder / "evaluations.npz", timesteps=steps[::2], results=np.outer(steps[::2], [0.1, 0.3]), ep_lengths=1)
    accepted = np.arange(1, n_updates + 1) != 3
    updates = {
        "time/total_timesteps": steps,
        "time/rollout": 2.0,
        "time/update": 1.0,
        "time/policy_update": 0.25,
        "time/critic_update": 0.5,
        "train/kl_divergence_loss": np.where(accepted, 0.0098, 0.0),
        "train/target_kl": 0.01,
        "train/status": np.where(accepted, "accepted", "no_improvement"),
        "train/improvement": 0.02,
        "train/predicted_improvement": 0.03,
        "train/step_size": 1.0,
        "train/line_search_trials": 2,
        "train/cg_steps": 4,
        "train/cg_residual": 10.0 ** -np.arange(1, n_updates + 1),
        "train/entropy": 0.6,
        "train/std": 0.5,
        "train/explained_variance": 0.9,
        "train/value_loss": 12.0,
    }
    pandas.DataFrame(updates).to_csv(folder / table, index=False)
    config = OrderedDict(n_envs=2, n_steps=50, target_kl=0.01)
    (folder / env_id / "config.yml").write_text(yaml.dump(config))
    (folder / env_id / "args.yml").write_text(yaml.dump(OrderedDict(seed=7)))
    return folder


def plot(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """Run the command; returns its exit status and what it prints."""
    try:
        status: Any = main(["plot", *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    output = capsys.readouterr()
    return status, output.out + output.err


def panel_of(made: list[plots.Panel], title: str) -> plots.Panel:
    """The panel whose title begins so."""
    return next(panel for panel in made if panel.title.startswith(title))


def test_run_is_read_in_full(tmp_path: Path) -> None:
    run = runs.read_run(write_run(tmp_path / "trpo_ext" / "CartPole-v1_1"))
    assert (run.label, run.env_id) == ("trpo_ext/CartPole-v1_1", "CartPole-v1")
    assert run.settings == {"n_envs": 2, "n_steps": 50, "target_kl": 0.01}
    np.testing.assert_array_equal(run.episodes.steps, np.repeat(100 * np.arange(1, 6), 2))
    np.testing.assert_array_equal(run.evaluations.steps, [100, 300, 500])
    np.testing.assert_array_equal(run.updates["timesteps"], 100 * np.arange(1, 6))
    assert list(run.updates["cg_steps"]) == [4] * 5


def test_settings_run_no_code_of_a_stranger(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(f"!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    assert runs.read_settings(path) == {}
    assert not (tmp_path / "made").exists()


def test_every_quantity_has_its_panel(tmp_path: Path) -> None:
    run = runs.read_run(write_run(tmp_path / "CartPole-v1_1"))
    made = diagnostics.make_panels([run], ["#000000"])
    expected: dict[str, list[float]] = {
        "explained variance": [0.9] * 5,
        "entropy": [0.6] * 5,
        "standard deviation": [0.5] * 5,
        "step size": [1.0] * 5,
        "trials": [2] * 5,
        "conjugate gradient: steps": [4] * 5,
        "conjugate gradient: relative residual": [0.1, 0.01, 0.001, 1e-4, 1e-5],
        "loss of the critic": [12.0] * 5,
    }
    for title, values in expected.items():
        np.testing.assert_allclose(panel_of(made, title).lines[0].y, values, err_msg=title)
    assert panel_of(made, "conjugate gradient: relative").is_log
    assert not panel_of(made, "loss").is_log
    actual, predicted = panel_of(made, "improvement").lines
    assert (actual.label, predicted.label) == ("actual", "predicted")
    assert (actual.y[0], predicted.y[0]) == (0.02, 0.03)

    kl, bound, rejected = panel_of(made, "KL").lines
    np.testing.assert_array_equal(kl.y, [0.0098, 0.0098, 0, 0.0098, 0.0098])
    np.testing.assert_array_equal(bound.y, [0.01] * 5)
    assert (rejected.kind, list(rejected.x)) == ("crosses", [300])

    points, band, average, spread, evaluations, solved = made[0].lines
    assert spread.upper is not None
    np.testing.assert_allclose((spread.upper - spread.y) / 2, [10, 30, 50])
    assert len(points.x) == 10
    np.testing.assert_array_equal(average.x, [100, 200, 300, 400, 500])
    assert average.y[-1] in (50.0, 51.0)
    assert band.upper is not None
    assert (band.y <= band.upper).all()
    np.testing.assert_allclose(evaluations.y, [20, 60, 100])
    assert (solved.label, solved.y[0]) == ("CartPole-v1: solved at 475", 475)

    assert diagnostics.phases([run]).to_dict("list") == {"rollout": [2.0], "policy": [0.25], "critic": [0.5]}


def test_evaluations_have_a_phase_of_their_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1")
    table = pandas.read_csv(folder / "progress.csv")
    table["time/evaluation"] = [0.0, 5.0, 0.0, 0.0, 0.0]
    table.to_csv(folder / "progress.csv", index=False)
    seconds = diagnostics.phases([runs.read_run(folder)])
    assert seconds.to_dict("list") == {"rollout": [2.0], "evaluation": [1.0], "policy": [0.25], "critic": [0.5]}
    assert set(seconds) <= set(diagnostics.PHASE_COLORS)


TEXTS = ["accepted", "no_improvement", "zero_target_kl", "accepted", "kl_too_large"]


@pytest.mark.parametrize(
    ("columns", "rejected"),
    [
        ({"status": TEXTS}, [200, 500]),
        # A number, and what it means
        ({"status": [0, 2, 9, 0, 1], "status_name": TEXTS}, [200, 500]),
        # The actor is frozen, to fit the critic first
        ({"status": [11, 2, 10, 0, 1], "status_name": ["nothing_to_train", *TEXTS[1:]]}, [200, 500]),
        # A run that was begun by an earlier version
        ({"status": ["accepted", "no_improvement", "9", "0", "1"], "status_name": [None, None, *TEXTS[2:]]}, [200, 500]),
        ({"status": [0, 2, 9, 0, 1], "is_line_search_success": [1, 0, 1, 1, 0]}, [200, 500]),
        ({"is_line_search_success": [1, 0, 1, 1, 0]}, [200, 500]),
        ({}, []),
    ],
)
def test_rejected_updates_are_those_that_failed(columns: dict[str, list[Any]], rejected: list[int], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1")
    table = pandas.read_csv(folder / "progress.csv").drop(columns="train/status")
    table.assign(**{f"train/{name}": values for name, values in columns.items()}).to_csv(folder / "progress.csv", index=False)
    assert list(diagnostics.rejected_steps(runs.read_run(folder))) == rejected


def test_single_outliers_do_not_hide_all_other_values() -> None:
    values = np.sin(np.arange(200.0))
    values[[50, 120]] = 1000, np.nan
    line = plots.Line("line", "actual", "black", np.arange(200.0), values)
    limits = plots.Panel("improvement of the objective", [line], "outliers").limits
    assert limits is not None
    assert -1.3 < limits[0] < -0.9
    assert 0.9 < limits[1] < 1.3
    calm = line._replace(y=np.sin(np.arange(200.0)))
    assert plots.Panel("improvement of the objective", [calm], "outliers").limits is None
    assert plots.Panel("step size", [line]).limits is None


def test_band_holds_the_middle_four_fifths(tmp_path: Path) -> None:
    run = runs.read_run(write_run(tmp_path / "CartPole-v1_1", n_updates=600))
    episodes = Curve(np.arange(1.0, 1001), np.tile(np.arange(100.0), 10))
    lines = diagnostics.returns_panel([run._replace(episodes=episodes)], ["#000000"]).lines
    band = next(line for line in lines if line.upper is not None)
    assert band.upper is not None
    assert (band.y[-1], band.upper[-1]) == pytest.approx((9.9, 89.1))


def test_run_of_ppo_shows_what_it_has(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1")
    table = {"time/total_timesteps": [64, 128], "train/approx_kl": [0.01, 0.02], "train/entropy_loss": [-0.6, -0.5]}
    pandas.DataFrame(table).to_csv(folder / "progress.csv", index=False)
    made = diagnostics.make_panels([runs.read_run(folder)], ["#000000"])
    assert [panel.title for panel in made] == ["return of an episode", "KL divergence of an update", "entropy of the policy"]
    np.testing.assert_array_equal(made[2].lines[0].y, [0.6, 0.5])
    # The bound is of the settings
    np.testing.assert_array_equal(made[1].lines[1].y, [0.01, 0.01])


def test_repeated_steps_are_those_of_the_later_training(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1")
    table = {"time/total_timesteps": [10, 20, 30, 20, 30, 40], "train/loss": [1, 2, 3, 4, 5, 6]}
    pandas.DataFrame(table).to_csv(folder / "progress.csv", index=False)
    assert list(runs.read_run(folder).updates["loss"]) == [1, 4, 5, 6]


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1")
    with (folder / "progress.csv").open("a") as file:
        file.write("600,2.0,1.")
    assert len(runs.read_run(folder).updates) == 5


def test_picture_of_one_run_lies_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "trpo_ext" / "CartPole-v1_1")
    status, output = plot(capsys, folder)
    assert status == 0
    assert str(folder / "diagnostics.png") in output
    assert (folder / "diagnostics.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_lie_over_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path / algo / "CartPole-v1_1", n_updates=n) for algo, n in (("trpo", 3), ("trpo_ext", 200))]
    assert plot(capsys, *folders, "-o", tmp_path / "both.png")[0] == 0
    assert (tmp_path / "both.png").is_file()


def test_published_run_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RESULTS / "trpo_ext" / "Humanoid-v5_29"
    assert plot(capsys, folder, "-o", tmp_path / "page.png")[0] == 0
    run = runs.read_run(folder)
    assert (run.env_id, run.evaluations.steps[-1]) == ("Humanoid-v5", 9_999_360)
    assert [panel.title for panel in diagnostics.make_panels([run], ["#000000"])] == ["return of an episode"]


@pytest.mark.parametrize("name", ["progress.csv", "evaluations.npz", "0.monitor.csv"])
@pytest.mark.parametrize("kind", ["empty", "half", "garbage"])
def test_damaged_file_ends_in_one_line(name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1")
    whole = (folder / name).read_bytes()
    damaged = {"empty": b"", "half": whole[: len(whole) // 2], "garbage": b"\x00\xff\xfe\n1,2,3\n4,5,6,7,8\n"}[kind]
    (folder / name).write_bytes(damaged)
    status, output = plot(capsys, folder)
    if kind == "half" and name.endswith(".csv"):
        # What is whole of a table of rows can be drawn
        assert status == 0
        return
    assert status == 2
    assert output.startswith("sb3-trpo plot: error: ")
    assert output.count("\n") == 1
    assert str(folder) in output
    assert "empty or damaged" in output


def test_page_needs_no_rl_zoo(sb3_interpreter: Interpreter, tmp_path: Path) -> None:
    code = "import sys; sys.modules['rl_zoo3'] = None; import sb3_trpo_ext.tools.diagnostics"
    result = sb3_interpreter.run(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_missing_run_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nothing").mkdir()
    for folder in (tmp_path / "missing", tmp_path / "nothing"):
        status, output = plot(capsys, folder)
        assert status == 2
        assert output.startswith(f"sb3-trpo plot: error: there is no run in {folder}: ")
        assert output.count("\n") == 1


def test_output_must_be_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "CartPole-v1_1")
    assert plot(capsys, folder, "-o", "page.jpg") == (
        2,
        "sb3-trpo plot: error: --output must be a file that ends in .png, got 'page.jpg' (--verbose 2 shows the traceback)\n",
    )
    assert "sb3_trpo_ext.tools.diagnostics" in sys.modules
