"""The benchmarks run: what they time, they find by name."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of benchmarks/."""
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("a source distribution has no benchmarks")
    monkeypatch.syspath_prepend(str(ROOT))
    yield importlib.import_module(f"benchmarks.{request.param}")
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.mark.parametrize("benchmark", ["throughput"], indirect=True)
def test_throughput_says_where_the_time_goes(benchmark: Any) -> None:
    case = benchmark.Case("CartPole-v1", n_envs=2, n_steps=32, net_arch=[8])
    result = benchmark.compare(case, n_repetitions=1, n_timed=1, n_critic_updates=1, batch_size=32)
    assert result["ratio"] > 0
    for name in ("ours", "theirs"):
        shares = result["shares"][name]
        assert {"env_step", "actor_step", "buffer", "callbacks", "values_and_gae"} <= set(shares)
        assert all(share > 0 for share in shares.values()) and sum(shares.values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("benchmark", ["update"], indirect=True)
def test_update_is_timed_and_its_quality_measured(benchmark: Any) -> None:
    case = benchmark.Case("CartPole-v1", "MlpPolicy", 2, 32, [8], {})
    pair = benchmark.make_pair(case, n_critic_updates=1)
    times = benchmark.compare_times(pair, n_repetitions=1, n_critic_updates=1)
    assert times["actor"]["ratio"] > 0 and times["train"]["ratio"] > 0
    assert all(seconds > 0 for seconds in benchmark.phases(pair.ours, case).values())
    _, callback = pair.ours._setup_learn(1, None, reset_num_timesteps=False)
    quality = benchmark.step_quality(pair, 2, callback)
    # Both climb, on the samples that they were computed from
    assert quality["ours"]["in_sample"] > 0 and quality["theirs"]["in_sample"] > 0
