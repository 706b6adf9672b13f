"""Fixtures for all tests."""

import signal
import threading
from collections.abc import Iterator

import pytest
from interpreters import Interpreter

# PyTorch and SB3 are imported by the fixtures: the process of pytest-xdist that hands out the tests reads this file too, and
# needs neither.

if threading.current_thread() is threading.main_thread():
    # What a shell starts in the background ignores Ctrl-C, and with it the tests that interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """
    New tensors and networks are in double precision, and so are the observations that an SB3 policy feeds to its networks.

    SB3 turns observations into float32 wherever they come from; here these float32 numbers are the exact input.
    """
    import stable_baselines3.common.policies as sb3_policies
    import torch as th
    from stable_baselines3.common.preprocessing import preprocess_obs

    def preprocess(*args, **kwargs):
        observations = preprocess_obs(*args, **kwargs)
        if isinstance(observations, dict):
            return {key: value.double() for key, value in observations.items()}
        return observations.double()

    monkeypatch.setattr(sb3_policies, "preprocess_obs", preprocess)
    before = th.get_default_dtype()
    th.set_default_dtype(th.float64)
    yield
    th.set_default_dtype(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch computes with two threads, and does so again when the test is over."""
    import torch as th

    from sb3_trpo_ext.update import settings

    if not settings.CAN_SET_THREADS:
        pytest.skip("the number of threads cannot be changed")
    before = th.get_num_threads()
    th.set_num_threads(2)
    yield
    th.set_num_threads(before)


@pytest.fixture(scope="session")
def sb3_interpreter() -> Iterator[Interpreter]:
    """An interpreter that has imported SB3 and nothing of ours."""
    interpreter = Interpreter("import stable_baselines3")
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session")
def rl_zoo_interpreter() -> Iterator[Interpreter]:
    """An interpreter that has imported RL-Zoo as the stock command does, and nothing of ours."""
    interpreter = Interpreter("from rl_zoo3.cli import main\nimport torch._dynamo")
    yield interpreter
    interpreter.close()


@pytest.fixture(autouse=True)
def _log_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """SB3 makes a folder for a log that nobody has asked for: one that goes away, and not a new one per `learn`."""
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path_factory.getbasetemp() / "log"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random numbers, whichever tests ran before it."""
    import torch as th

    th.manual_seed(0)
