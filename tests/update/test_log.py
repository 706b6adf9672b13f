"""What an update logs: numbers for those who average them, and names for people."""

import copy
import csv
import json
import pickle
import re
import warnings
from pathlib import Path

import pytest
from agents import make_model
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, configure

from sb3_trpo_ext.optim import Status, UpdateResult, UpdateStatus
from sb3_trpo_ext.update.critic import CriticResult, CriticStatus
from sb3_trpo_ext.update.log import warn_if_rejected


def test_all_that_is_logged_is_a_number(tmp_path: Path) -> None:
    """Loggers of GAIL and AIRL average all of it, and many a writer calls `float`."""
    model = make_model()
    model.set_logger(configure(str(tmp_path), ["stdout", "csv", "json"]))
    averages = Logger(None, [])

    class Averaging(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            for key, value in self.logger.name_to_value.items():
                assert isinstance(float(value), float)
                averages.record_mean(key, value)

    model.learn(96, callback=Averaging())
    assert averages.name_to_value["train/status"] == averages.name_to_value["train/status_name"] == 0


def test_statuses_are_names_on_the_screen_and_in_csv_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(n_critic_updates=0)
    model.set_logger(configure(str(tmp_path), ["stdout", "csv", "json"]))
    model.learn(96)
    screen = capsys.readouterr().out
    assert re.search(r"\| +status +\| 0 +\|", screen)
    assert re.search(r"\| +status_name +\| accepted +\|", screen)
    assert re.search(r"\| +value_status_name +\| no_epochs +\|", screen)
    with (tmp_path / "progress.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert (last["train/status"], last["train/status_name"]) == ("0", "accepted")
    assert (last["train/value_status"], last["train/value_status_name"]) == ("1", "no_epochs")
    record = json.loads((tmp_path / "progress.json").read_text().splitlines()[-1])
    assert (record["train/status"], record["train/value_status"]) == (0, 1)
    assert "train/status_name" not in record


@pytest.mark.parametrize("status", [*UpdateStatus, *CriticStatus])
def test_a_status_is_a_number_with_a_name(status: Status) -> None:
    assert float(status) == status.value == type(status)[str(status).upper()]
    assert pickle.loads(pickle.dumps(status)) is copy.deepcopy(status) is status
    # Where there is advice, somebody is warned
    assert isinstance(status.advice, str)


@pytest.mark.parametrize("status", UpdateStatus)
def test_warnings_advise_what_helps(status: UpdateStatus) -> None:
    """What comes from too little damping is not blamed on a NaN, and what belongs to the algorithm is not warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_rejected(UpdateResult(status, 0.0, 0.0), CriticResult(0.0, CriticStatus.FITTED))
    messages = [str(each.message) for each in caught]
    if status in (UpdateStatus.CG_NON_POSITIVE_CURVATURE, UpdateStatus.NO_CURVATURE):
        assert len(messages) == 1
        assert f"rejected: {status!s}" in messages[0]
        assert "raise `cg_damping`" in messages[0] and "NaN" not in messages[0]
    elif status in (UpdateStatus.NON_FINITE_OBJECTIVE, UpdateStatus.NON_FINITE_GRADIENT):
        assert "rewards for NaN" in messages[0]
    else:
        is_ordinary = status not in (UpdateStatus.NON_FINITE, UpdateStatus.CG_NON_FINITE)
        assert len(messages) == (not is_ordinary)


@pytest.mark.parametrize("status", CriticStatus)
def test_warnings_of_the_critic(status: CriticStatus) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_rejected(UpdateResult(UpdateStatus.ACCEPTED, 0.0, 1.0), CriticResult(0.0, status))
    is_warned = status in (CriticStatus.NON_FINITE_RETURNS, CriticStatus.NON_FINITE_FIT)
    assert [f"not fitted: {status!s}" in str(each.message) for each in caught] == [True] * is_warned
