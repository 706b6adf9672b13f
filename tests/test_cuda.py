"""The update on a GPU, where there is one: the same numbers as on the CPU, and no waiting for it in conjugate gradient."""

import copy
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import make_batch, make_policy, relative_error
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.optim.updates import KLConstraint, UpdateResult
from sb3_trpo_ext.optim.vectors import flatten
from sb3_trpo_ext.policies import CnnPolicy, SquashedMlpPolicy
from sb3_trpo_ext.update.batch import Batch
from sb3_trpo_ext.update.critic import CriticFit, CriticStatus, fit_critic
from sb3_trpo_ext.update.settings import no_argument_checks
from sb3_trpo_ext.update.structure import split_policy
from sb3_trpo_ext.update.surrogate import Surrogate

pytestmark = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")

POLICIES: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "squashed": {"policy_class": SquashedMlpPolicy},
    "categorical": {"action_space": spaces.Discrete(3)},
    "bernoulli": {"action_space": spaces.MultiBinary(2)},
    "cnn": {
        # SB3 divides pixels by 255 in single precision, and a GPU rounds half of the results otherwise
        "observation_space": spaces.Box(0, 1, (1, 36, 36), np.float32),
        "policy_class": CnnPolicy,
        "normalize_images": False,
        "features_extractor_kwargs": {"normalized_image": True},
    },
}


def to_gpu(batch: Batch) -> Batch:
    """The same batch on the GPU."""
    assert isinstance(batch.observations, th.Tensor)
    return Batch(batch.observations.cuda(), *(column.cuda() for column in batch[1:]))


def update(policy: ActorCriticPolicy, batch: Batch) -> UpdateResult:
    """One update of a policy, on its device, with an exact direction: without convergence, rounding is amplified."""
    problem = Surrogate(policy, split_policy(policy).actor_params, batch)
    with no_argument_checks:
        return KLConstraint(300, cg_tolerance=1e-12, cg_damping=0.1).update(problem, 0.01)


def values(model: TRPO, observations: np.ndarray) -> np.ndarray:
    """What the critic says of raw observations, which the policy normalizes."""
    with th.no_grad():
        return model.policy.predict_values(model.policy.obs_to_tensor(observations)[0]).cpu().numpy()


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error for everything that makes the host wait for the GPU."""
    th.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        th.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", POLICIES)
def test_an_update_is_that_of_the_cpu(name: str) -> None:
    policy = make_policy(**POLICIES[name])
    batch = make_batch(policy, 64)
    twin = copy.deepcopy(policy).cuda()
    results = update(policy, batch), update(twin, to_gpu(batch))
    assert results[0].is_accepted
    assert results[1].kl == pytest.approx(results[0].kl, rel=1e-6)
    assert relative_error(flatten(list(twin.parameters())).cpu(), flatten(list(policy.parameters()))) < 1e-8


@pytest.mark.usefixtures("float64")
def test_a_fit_of_the_critic_is_that_of_the_cpu() -> None:
    policy = make_policy()
    batch = make_batch(policy, 64)
    twin = copy.deepcopy(policy).cuda()
    for each, rollout in ((policy, batch), (twin, to_gpu(batch))):
        parts = split_policy(each)
        each.optimizer = th.optim.Adam(parts.critic_params, lr=1e-2, fused=True)
        th.manual_seed(0)
        result = fit_critic(each, parts.critic_params, parts.critic_modules, rollout, CriticFit(n_epochs=5, batch_size=16))
        assert result.status is CriticStatus.FITTED
    assert relative_error(flatten(list(twin.parameters())).cpu(), flatten(list(policy.parameters()))) < 1e-8


@pytest.mark.parametrize("name", POLICIES)
def test_the_host_waits_neither_in_a_fisher_product_nor_in_a_trial(name: str) -> None:
    policy = make_policy(**POLICIES[name])
    batch = to_gpu(make_batch(policy, 64))
    policy.cuda()
    actor_params = split_policy(policy).actor_params
    with no_argument_checks:
        surrogate = Surrogate(policy, actor_params, batch)
        fisher = surrogate.fisher()
        vector = th.randn_like(flatten(actor_params))
        with no_waiting():
            product = fisher @ vector
            with th.no_grad():
                _, kl = surrogate.evaluate()
    assert bool(th.isfinite(product).all())
    assert float(kl) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_learn_save_and_go_on_elsewhere(env: str, tmp_path: pathlib.Path) -> None:
    model = TRPO("MlpPolicy", env, n_steps=256, device="cuda", seed=0)
    model.learn(1024)
    assert all(param.device.type == "cuda" and bool(th.isfinite(param).all()) for param in model.policy.parameters())
    assert model._n_accepted > 0
    model.save(tmp_path / "model.zip")
    observations = np.stack([model.observation_space.sample() for _ in range(8)])
    expected = values(model, observations)
    for device in ("cpu", "cuda"):
        loaded = TRPO.load(tmp_path / "model.zip", env=model.get_env(), device=device)
        np.testing.assert_allclose(values(loaded, observations), expected, rtol=1e-4, atol=1e-4)
        loaded.learn(512)
