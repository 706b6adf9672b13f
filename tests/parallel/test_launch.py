"""Data-parallel training: two processes do together what one does with all samples."""

import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch as th
from agents import RandomEnv, assert_identical, make_model, random_vec_env
from gymnasium import spaces
from helpers import relative_error
from interpreters import Interpreter, run_processes
from stable_baselines3.common.running_mean_std import RunningMeanStd

from sb3_trpo_ext.parallel import launch, moments, reductions
from sb3_trpo_ext.parallel.launch import SharedStatistics, rank_device, rank_seed
from sb3_trpo_ext.parallel.reductions import Shares

Outcomes = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sb3_interpreter: Interpreter) -> Path:
    """Where two processes have written what they saw."""
    path = tmp_path_factory.mktemp("processes")
    run_processes(sb3_interpreter, "ranks", path, ranks.N_PROCESSES)
    return path


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    """What the processes saw."""
    return [th.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks.N_PROCESSES)]


@pytest.mark.parametrize("split", ranks.SPLITS)
def test_policy_update_of_two_is_that_of_one_with_the_joined_batch(outcomes: Outcomes, float64: None, split: str) -> None:
    first, second = (outcome[f"policy_{split}"] for outcome in outcomes)
    assert_identical(first, second)
    for name, expected in ranks.policy_facts(slice(None)).items():
        assert relative_error(first[name].flatten(), expected.flatten()) < 1e-10, name


@pytest.mark.parametrize("split", ranks.SPLITS)
def test_penalty_update_of_two_is_that_of_one(outcomes: Outcomes, float64: None, split: str) -> None:
    first, second = (outcome[f"penalty_{split}"] for outcome in outcomes)
    assert th.equal(first, second)
    assert relative_error(first, ranks.penalty_facts(slice(None))) < 1e-10


@pytest.mark.parametrize("split", ranks.SPLITS)
@pytest.mark.parametrize("kind", ranks.CRITICS)
def test_critic_of_two_is_that_of_one_with_joined_minibatches(
    outcomes: Outcomes, float64: None, kind: str, split: str
) -> None:
    n_first, batch_size = ranks.SPLITS[split]
    first, second = (outcome[f"{kind}_{split}"] for outcome in outcomes)
    assert th.equal(first, second)
    n_second = ranks.N_SAMPLES - n_first
    n_steps = math.ceil(ranks.N_SAMPLES / (2 * batch_size))
    cuts = [
        [th.arange(n).split(batch_size), th.arange(n).tensor_split(n_steps)][n_first != n_second] for n in (n_first, n_second)
    ]
    order = th.cat([th.cat([left, right + n_first]) for left, right in zip(*cuts, strict=True)])
    expected = ranks.critic_facts(kind, slice(None), 2 * batch_size, lambda _: order)
    assert relative_error(first, expected) < 1e-10
    # The order matters, so that the test could fail
    assert relative_error(first, ranks.critic_facts(kind, slice(None), 2 * batch_size, th.arange)) > 1e-6


def test_processes_stay_identical_over_twenty_updates_of_cartpole(outcomes: Outcomes) -> None:
    first, second = (outcome["cartpole"] for outcome in outcomes)
    assert_identical(first["params"], second["params"])
    for left, right in zip(first["statistics"], second["statistics"], strict=True):
        assert np.array_equal(left, right)
    # Neither are they the same process twice, nor did nothing happen
    assert not th.equal(first["first_params"], second["first_params"])
    assert not np.array_equal(first["actions"][:, :2], second["actions"])
    assert first["n_updates"] == second["n_updates"] == 20


def test_timesteps_count_all_processes(outcomes: Outcomes) -> None:
    for outcome in outcomes:
        assert outcome["cartpole"]["num_timesteps"] == 20 * 16 * (3 + 2)


def test_first_process_alone_runs_callbacks_and_hears_of_all_episodes(outcomes: Outcomes) -> None:
    first, second = (outcome["cartpole"] for outcome in outcomes)
    # 5 environments x 20 x 16 steps; an episode of a policy that learns this little has less than 50
    assert first["episodes"] > second["episodes"] > 0
    assert (first["n_logged"], second["n_logged"]) == (20, 0)


def test_first_process_alone_saves(outcomes: Outcomes, folder: Path) -> None:
    assert (folder / "model0.zip").is_file()
    assert not (folder / "model1.zip").exists()


@pytest.mark.parametrize(
    ("name", "status"),
    [("nan_advantage", ("non_finite_objective", "fitted")), ("nan_returns", ("accepted", "non_finite_returns"))],
)
def test_nan_on_one_process_makes_all_reject(outcomes: Outcomes, name: str, status: tuple[str, str]) -> None:
    first, second = (outcome[name] for outcome in outcomes)
    assert first["status"] == second["status"] == status
    assert_identical(first["after"], second["after"])
    for outcome in (first, second):
        assert outcome["actor_is_same"] == (name == "nan_advantage")
        assert all(bool(th.isfinite(tensor).all()) for tensor in outcome["after"])


@pytest.mark.parametrize("kind", ["masks", "memory", "tensors"])
def test_masks_memory_and_tensors_train_in_several_processes(outcomes: Outcomes, kind: str) -> None:
    (n_first, first), (n_second, second) = (outcome[kind] for outcome in outcomes)
    assert n_first == n_second == 3
    assert th.equal(first, second)


def test_processes_that_come_apart_end_the_run(outcomes: Outcomes) -> None:
    for outcome in outcomes:
        assert outcome["apart"].startswith("RuntimeError: The processes of this run have come apart")
        assert "they differ in action_net.bias. Either" in outcome["apart"]


def test_settings_that_differ_are_refused(outcomes: Outcomes) -> None:
    for outcome in outcomes:
        assert outcome["settings"].startswith("ValueError: `gamma` must be the same on all processes, got [0.9, 0.95")
        assert outcome["networks"].startswith("ValueError: `policy` must be the same on all processes")


def test_devices_of_two_kinds_are_refused(outcomes: Outcomes) -> None:
    for outcome in outcomes:
        assert outcome["devices"].startswith("ValueError: `device` must be the same on all processes, got ['cpu', 'cuda']")


def test_callback_ends_the_training_of_all_after_the_rollout(outcomes: Outcomes) -> None:
    # At the 40th step, in the second rollout of 32 steps of 2 x 2 environments
    assert [outcome["stopped"] for outcome in outcomes] == [(2 * 32 * 4, 40), (2 * 32 * 4, 0)]


def test_dead_process_is_named(outcomes: Outcomes) -> None:
    assert outcomes[0]["lost"].startswith("RuntimeError: Process 0 of 2 has lost the connection to another one")
    assert "torchrun --max-restarts" in outcomes[0]["lost"]


def test_merged_statistics_are_those_of_all_samples(outcomes: Outcomes) -> None:
    joint = RunningMeanStd(shape=(3,))
    for rank in range(ranks.N_PROCESSES):
        for samples in ranks.raw_samples(rank):
            joint.update(samples)
    for outcome in outcomes:
        mean, var, count = outcome["merged"]
        np.testing.assert_allclose(mean, joint.mean, rtol=1e-12)
        np.testing.assert_allclose(var, joint.var, rtol=1e-9)
        assert count == pytest.approx(joint.count, rel=1e-12)


def test_agents_know_the_observations_and_rewards_of_all_processes(outcomes: Outcomes) -> None:
    samples = np.concatenate([batch for rank in range(2) for batch in ranks.raw_samples(rank)])
    for outcome in outcomes:
        mean, var, n_samples, scale = outcome["normalization"]
        np.testing.assert_allclose(mean, samples.mean(0), rtol=1e-6)
        # Buffers of policies are in single precision
        np.testing.assert_allclose(var, samples.var(0), rtol=1e-4)
        assert n_samples == len(samples)
        assert scale == pytest.approx(samples[:, 0].std(), rel=1e-8)


def test_advantages_are_normalized_over_all_processes(outcomes: Outcomes) -> None:
    joint = th.cat([outcome["advantages"] for outcome in outcomes])
    assert abs(joint.mean()) < 1e-6
    assert joint.std() == pytest.approx(1, abs=1e-6)
    # Each by itself is not
    assert all(abs(outcome["advantages"].mean()) > 0.1 for outcome in outcomes)


def test_advantages_are_clipped_by_the_deviation_over_all_processes(outcomes: Outcomes) -> None:
    joint = th.cat([outcome["advantages"] for outcome in outcomes]).clamp(-0.5, 0.5)
    expected = (joint - joint.mean()) / joint.std()
    th.testing.assert_close(th.cat([outcome["clipped_advantages"] for outcome in outcomes]), expected, rtol=0, atol=1e-5)


def test_traffic_is_what_the_formula_says(outcomes: Outcomes) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "studies" / "traffic.py"
    if not path.exists():
        pytest.skip("a source distribution has no benchmarks")
    formula = runpy.run_path(str(path))
    seen = outcomes[0]["traffic"]
    assert (seen["calls"], seen["n_bytes"]) == (outcomes[1]["traffic"]["calls"], outcomes[1]["traffic"]["n_bytes"])
    # 3 observations, 8 hidden units, 2 actions; each process has 64 samples in minibatches of 16, three times
    network = formula["Network"](
        seen["n_actor"], seen["n_critic"], seen["n_tensors"], 0, 0, ((3, 8), (8, 2)), n_log_std=2, n_normalized=3
    )
    logged = seen["logged"][0]
    update = formula["Update"](logged["train/cg_steps"], logged["train/line_search_trials"], 12, seen["is_preconditioned"])
    messages = formula["messages"](network, update)
    assert seen["calls"] == sum(message.calls for message in messages)
    assert seen["n_bytes"] == sum(message.calls * message.n_bytes for message in messages)


@pytest.mark.parametrize(("name", "policy"), [("humanoid", "MlpPolicy"), ("nature_cnn", "CnnPolicy")])
def test_formula_knows_the_shapes_of_the_networks(name: str, policy: str) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "studies" / "traffic.py"
    if not path.exists():
        pytest.skip("a source distribution has no benchmarks")
    network = runpy.run_path(str(path))[name]()
    if policy == "MlpPolicy":
        env = RandomEnv(spaces.Box(-1, 1, (348,)), spaces.Box(-1, 1, (17,)))
        model = make_model(env, policy_kwargs={"net_arch": [256, 256]})
    else:
        model = make_model(RandomEnv(spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(6)), policy, policy_kwargs={})
    assert network.n_actor == sum(param.numel() for param in model._parts.actor_params)
    assert network.n_critic == sum(param.numel() for param in model._parts.critic_params)
    assert network.n_tensors == len(model.policy.state_dict())


def test_one_process_reduces_nothing() -> None:
    """Every reduction hands back the very tensor, and no process group is needed."""
    tensor = th.ones(2)
    assert all(f(tensor) is tensor for f in (Shares().mean, Shares.of(5).mean, reductions.all_sum, reductions.all_max))
    assert reductions.all_gathered(tensor) is tensor
    tensors = [tensor]
    assert Shares().means(tensors) is tensors
    part = moments.moments_of(tensor)
    assert moments.all_joined(part) is part
    assert reductions.all_true(True)
    assert not reductions.all_true(False)
    reductions.average_(tensor, 0.5)
    assert tensor.tolist() == [1, 1]
    assert Shares().minibatch_weights(10, 4) == [1, 1, 1]
    assert (reductions.rank(), reductions.world_size(), rank_seed(3), rank_seed(None)) == (0, 1, 3, None)
    assert rank_device("auto") == "auto"
    model = make_model(random_vec_env(1))
    launch.check_identical(model)
    launch.join_process_group()
    assert not reductions.is_parallel()


@pytest.mark.parametrize(
    ("counts", "batch_size", "sizes"),
    [
        ([10, 10], 4, [[4, 4, 2], [4, 4, 2]]),
        ([8, 8], 4, [[4, 4], [4, 4]]),
        ([10, 20], 5, [[4, 3, 3], [7, 7, 6]]),
        ([1, 100], 5, [[1], [100]]),
    ],
)
def test_minibatches_are_as_many_on_all_processes_and_never_empty(
    counts: list[int], batch_size: int, sizes: list[list[int]]
) -> None:
    shares = Shares(counts)
    assert [shares.minibatch_sizes(count, batch_size) for count in counts] == sizes
    assert shares.minibatch_weights(counts[0], batch_size) == [
        first / (first + second) for first, second in zip(*sizes, strict=True)
    ]


def test_statistics_of_one_process_are_left_as_they_are() -> None:
    stats, alone = RunningMeanStd(shape=(3,)), RunningMeanStd(shape=(3,))
    shared = SharedStatistics({"": stats})
    for samples in ranks.raw_samples(0):
        stats.update(samples)
        shared.merge_()
        alone.update(samples)
    np.testing.assert_allclose(stats.mean, alone.mean, rtol=1e-12)
    np.testing.assert_allclose(stats.var, alone.var, rtol=1e-9)


def test_moments_come_apart_as_they_were_joined() -> None:
    samples = 1e4 + th.randn(50, 4, dtype=th.float64)
    first, second = moments.moments_of(samples[:20]), moments.moments_of(samples[20:])
    total = moments.joined(first, second)
    assert relative_error(total.mean, samples.mean(dim=0)) < 1e-14
    assert relative_error(total.variance, samples.var(dim=0, correction=0)) < 1e-10
    again = moments.difference(total, first)
    assert again.n == 30
    assert relative_error(again.mean, second.mean) < 1e-12
    assert relative_error(again.m2, second.m2) < 1e-8
    assert not any(part.any() for part in moments.difference(total, total))


def test_hash_sees_single_bits_and_order() -> None:
    tensor = th.randn(1000)
    other = tensor.clone()
    other[7] = th.nextafter(other[7], th.tensor(9.0))
    other[8] = th.nextafter(other[8], th.tensor(-9.0))
    swapped = tensor[th.arange(1000).roll(1)]
    hashes = {int(launch._hash(each)) for each in (tensor, other, swapped, tensor.double(), th.zeros(3), -th.zeros(3))}
    assert len(hashes) == 6
    assert launch._hash(tensor) == launch._hash(tensor.clone())
    assert min(hashes) >= 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the fourth of four processes on one machine."""
    for name, value in {"RANK": 3, "LOCAL_RANK": 3, "WORLD_SIZE": 4, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    return monkeypatch


def test_each_process_of_a_machine_has_its_own_gpu(launched: pytest.MonkeyPatch) -> None:
    chosen: list[th.device] = []
    launched.setattr(th.cuda, "device_count", lambda: 4)
    launched.setattr(th.cuda, "set_device", chosen.append)
    assert rank_device("cuda") == rank_device("auto") == th.device("cuda", 3)
    assert rank_device("cpu") == "cpu"
    assert rank_device("cuda:1") == th.device("cuda", 1)
    assert chosen == [th.device("cuda", 3), th.device("cuda", 3), th.device("cuda", 1)]


def test_process_without_a_gpu_of_its_own_is_refused(launched: pytest.MonkeyPatch) -> None:
    launched.setattr(th.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="`device` is 'auto', but there is no GPU for process 3 of this machine, which has 2"):
        rank_device("auto")
