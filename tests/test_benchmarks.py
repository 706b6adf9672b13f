"""The benchmarks run: what they time, they find by name."""

import importlib
from typing import Any

import pytest
from scripts import importable_benchmarks


@pytest.fixture
def throughput() -> Any:
    """The script of that name."""
    with importable_benchmarks():
        yield importlib.import_module("benchmarks.throughput")


@pytest.fixture
def update() -> Any:
    """The script of that name."""
    with importable_benchmarks():
        yield importlib.import_module("benchmarks.update")


def test_throughput_says_where_the_time_goes(throughput: Any) -> None:
    case = throughput.Case("CartPole-v1", n_envs=2, n_steps=32, net_arch=[8])
    result = throughput.compare(case, n_repetitions=1, n_timed=1, n_critic_updates=1, batch_size=32)
    assert result["ratio"] > 0
    for name in ("ours", "theirs"):
        shares = result["shares"][name]
        assert {"env_step", "actor_step", "buffer", "callbacks", "values_and_gae"} <= set(shares)
        assert all(share > 0 for share in shares.values()) and sum(shares.values()) == pytest.approx(1, abs=1e-3)


def test_update_is_timed_and_its_quality_measured(update: Any) -> None:
    case = update.Case("CartPole-v1", "MlpPolicy", 2, 32, [8], {})
    pair = update.make_pair(case, n_critic_updates=1)
    times = update.compare_times(pair, n_repetitions=1, n_critic_updates=1)
    assert times["actor"]["ratio"] > 0 and times["train"]["ratio"] > 0
    assert all(seconds > 0 for seconds in update.phases(pair.ours, case).values())
    _, callback = pair.ours._setup_learn(1, None, reset_num_timesteps=False)
    quality = update.step_quality(pair, 2, callback)
    # Both climb, on the samples that they were computed from
    assert quality["ours"]["in_sample"] > 0 and quality["theirs"]["in_sample"] > 0


def test_pictures_of_the_results_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    with importable_benchmarks():
        returns = importlib.import_module("benchmarks.returns")
        if not returns.SUITE.exists():
            pytest.skip("a source distribution has no results")
        monkeypatch.setattr(returns.Figure, "savefig", lambda figure, path, **_: drawn.append(path.name))
        monkeypatch.setattr(returns, "draw_learning_curve", lambda path, *_: drawn.append(path.name))
        returns.draw_humanoid()
        returns.draw_suite()
    assert drawn == ["humanoid.png", "suite.png"]
