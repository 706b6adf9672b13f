"""Each cell of the tables of docs/spaces.md."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import support
import torch as th
from interpreters import Interpreter, run_processes
from support import Case, model_of, state_of
from test_deployed import as_inputs, run, samples_of

from sb3_trpo_ext import TRPO, MaskableTRPO, RecurrentTRPO, export
from sb3_trpo_ext.deployed import DeployedPolicy

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "spaces.md").read_text()


def cells() -> list[tuple[Case, str, str]]:
    """Row, column and content of all cells."""
    found = []
    for title, text in re.findall(r"^## (\w+)\n\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
        found += [((title, row[0]), column, cell) for row in rows for column, cell in zip(head[1:], row[1:], strict=True)]
    return found


def train(case: Case) -> None:
    model = model_of(case)
    before = state_of(model)
    assert model.learn(64)._n_accepted == 2
    assert not th.equal(state_of(model), before)


def save_and_load(case: Case, algorithm: type[TRPO] = TRPO) -> None:
    model, file = model_of(case, algorithm).learn(64), io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = algorithm.load(file, env=model.env, device="cpu")
    assert th.equal(state_of(loaded), state_of(model))
    observations = samples_of(support.CASES[case][0], 10)
    expected = model.predict(observations, deterministic=True)[0]
    np.testing.assert_equal(list(loaded.predict(observations, deterministic=True)[0]), list(expected))
    loaded.learn(64, reset_num_timesteps=False)


def flat(actions: np.ndarray) -> np.ndarray:
    """Dicts of actions as rows of numbers."""
    return np.stack([np.concatenate([np.ravel(part) for part in action.values()]) for action in actions])


def write_and_run(case: Case, folder: Path) -> None:
    model = model_of(case).learn(64)
    path = export(model, folder / "agent.pt", "torchscript")
    observations = samples_of(support.CASES[case][0], 20)
    (actions,) = run(path, DeployedPolicy(model), as_inputs(observations))
    expected = model.predict(observations, deterministic=True)[0]
    if expected.dtype == object:
        # One vector each in the file
        actions, expected = (flat(rows) for rows in (model.policy.unscale_action(actions), expected))
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-5)


def train_on_device(case: Case) -> None:
    model = model_of(case, env=support.tensors_of(case)).learn(128)
    assert isinstance(model.rollout_buffer.observations, dict | th.Tensor)
    assert model._n_accepted == 2


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, sb3_interpreter: Interpreter) -> list[dict[Case, th.Tensor | str]]:
    """What two processes have made of all cases."""
    folder = tmp_path_factory.mktemp("support")
    run_processes(sb3_interpreter, "support", folder, 2)
    return [th.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_all_kinds_are_in_the_tables() -> None:
    assert {case for case, _, _ in cells()} == set(support.CASES)
    assert {content for _, _, content in cells()} == {"yes", "no"}


@pytest.mark.parametrize(
    ("case", "column", "content"), cells(), ids=[f"{title.lower()}-{row}-{column}" for (title, row), column, _ in cells()]
)
def test_cell(case: Case, column: str, content: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if column == "several processes":
        first, second = (states[case] for states in request.getfixturevalue("two_processes"))
        assert isinstance(first, str) == (content == "no")
        assert first == second if isinstance(first, str) else th.equal(first, second)
        return
    columns = {
        "train": lambda: train(case),
        "save, load": lambda: save_and_load(case),
        "export": lambda: write_and_run(case, tmp_path),
        "on a device": lambda: train_on_device(case),
        "masks": lambda: save_and_load(case, MaskableTRPO),
        "memory": lambda: save_and_load(case, RecurrentTRPO),
    }
    if content == "yes":
        columns[column]()
    else:
        with pytest.raises(ValueError, match=r"(only supports|has no policy|is not supported)"):
            columns[column]()
