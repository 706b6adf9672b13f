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
from gymnasium.envs.classic_control import CartPoleEnv
from helpers import BOX_ACTIONS, VECTOR, make_batch, make_policy, relative_error
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import set_random_seed
from tensor_envs import RandomTensorEnv

from sb3_trpo_ext import TRPO, MaskableTRPO, RecurrentTRPO
from sb3_trpo_ext.envs import TensorCartPole
from sb3_trpo_ext.envs.blocks import Blocks
from sb3_trpo_ext.optim.updates import KLConstraint, UpdateResult
from sb3_trpo_ext.optim.vectors import flatten
from sb3_trpo_ext.policies import CnnPolicy, SquashedMlpPolicy
from sb3_trpo_ext.rollout.tensors import TensorRolloutBuffer
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


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["gaussian", "categorical"])
def test_a_preconditioner_is_that_of_the_cpu(name: str) -> None:
    policy = make_policy(**POLICIES[name])
    batch = make_batch(policy, 64)
    vector = th.randn(flatten(split_policy(policy).actor_params).shape)
    results = []
    for device, rollout in (("cpu", batch), ("cuda", to_gpu(batch))):
        policy.to(device)
        preconditioner = Surrogate(policy, split_policy(policy).actor_params, rollout).fisher().preconditioner(0.1)
        assert preconditioner is not None
        results.append((preconditioner @ vector.to(device)).cpu())
    assert relative_error(results[1], results[0]) < 1e-8


@pytest.mark.parametrize(
    ("algorithm", "policy", "make_env", "policy_kwargs"),
    [
        (MaskableTRPO, "MlpPolicy", Blocks, {"net_arch": [8]}),
        (RecurrentTRPO, "MlpLstmPolicy", CartPoleEnv, {"net_arch": [], "lstm_hidden_size": 4}),
        (RecurrentTRPO, "MlpLstmPolicy", CartPoleEnv, {"lstm_hidden_size": 64, "n_lstm_layers": 2}),
    ],
    ids=["masks", "memory", "two layers"],
)
def test_masks_and_memory_are_those_of_the_cpu(
    algorithm: type[TRPO], policy: str, make_env: Any, policy_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    for device in ("cpu", "cuda"):
        env = make_vec_env(make_env, 2, seed=0)
        model = algorithm(policy, env, n_steps=32, policy_kwargs=policy_kwargs, norm_obs=False, seed=0, device=device)
        with monkeypatch.context() as patch:
            patch.setattr(model, "train", lambda: None)
            model.learn(64)
        models.append(model)
    # A GPU draws other actions: both models get the rollout and the weights of the first
    parameters: Any = models[0].get_parameters()
    models[1].set_parameters(parameters)
    models[1].rollout_buffer = copy.deepcopy(models[0].rollout_buffer)
    models[1].rollout_buffer.device = models[1].device
    changes = []
    for model in models:
        before = flatten(list(model.policy.parameters())).cpu()
        set_random_seed(0)
        model.train()
        assert model._n_accepted == 1
        changes.append(flatten(list(model.policy.parameters())).cpu() - before)
    assert relative_error(changes[1], changes[0]) < 1e-2


class NoStepWaits(BaseCallback):
    """An error for everything that makes the host wait for the GPU, from the second step of a rollout to its last but one."""

    def _on_step(self) -> bool:
        index = (self.n_calls - 1) % self.model.n_steps  # type: ignore[attr-defined]
        th.cuda.set_sync_debug_mode("error" if 1 <= index < self.model.n_steps - 2 else "default")  # type: ignore[attr-defined]
        return True


def test_no_step_in_an_environment_of_tensors_waits_for_the_gpu() -> None:
    model = TRPO("MlpPolicy", TensorCartPole(64, device="cuda"), n_steps=16, seed=0)
    try:
        model.learn(3 * 64 * 16, NoStepWaits())
    finally:
        th.cuda.set_sync_debug_mode("default")
    assert isinstance(model.rollout_buffer, TensorRolloutBuffer)


@pytest.mark.parametrize("actions", [BOX_ACTIONS, spaces.Discrete(3)], ids=["continuous", "discrete"])
def test_learn_in_an_environment_of_tensors(actions: spaces.Space) -> None:
    model = TRPO("MlpPolicy", RandomTensorEnv(VECTOR, actions, device="cuda"), n_steps=16, batch_size=64, seed=0)
    model.learn(3 * 64)
    assert model.device.type == "cuda"
    assert isinstance(model.rollout_buffer, TensorRolloutBuffer)
    assert model._n_accepted > 0


def test_tensor_environments_train_on_the_gpu() -> None:
    model = TRPO("MlpPolicy", TensorCartPole(64, device="cuda"), seed=0).learn(60_000)
    assert np.mean([info["r"] for info in model.ep_info_buffer or ()]) > 100
