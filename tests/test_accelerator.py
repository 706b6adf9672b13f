"""Training on an accelerator, without one: everything lies where it belongs, and how often the host waits for a number."""

import copy
import pathlib
import warnings
from typing import Any

import pytest
import torch as th
from agents import RandomEnv, log_of, make_model
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from helpers import BOX_ACTIONS, DICT, IMAGE, VECTOR, make_batch, make_policy, relative_error
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from tensor_envs import RandomTensorEnv

from sb3_trpo_ext import TRPO, MaskableTRPO, RecurrentTRPO
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

# Older versions of PyTorch have no interface for backends written in Python
accelerator = pytest.importorskip("accelerator", exc_type=ImportError)

POLICIES: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "squashed": {"policy_class": SquashedMlpPolicy},
    "gsde": {"use_sde": True},
    "categorical": {"action_space": spaces.Discrete(3)},
    "multi_categorical": {"action_space": spaces.MultiDiscrete([2, 3])},
    "bernoulli": {"action_space": spaces.MultiBinary(2)},
    "cnn": {"observation_space": IMAGE, "policy_class": CnnPolicy},
}
#: Environment and arguments of a model.
TRAININGS: dict[str, tuple[tuple[spaces.Space, spaces.Space], dict[str, Any]]] = {
    "gaussian": ((VECTOR, BOX_ACTIONS), {}),
    "categorical": ((VECTOR, spaces.Discrete(3)), {}),
    "multi_categorical": ((VECTOR, spaces.MultiDiscrete([2, 3])), {}),
    "bernoulli": ((VECTOR, spaces.MultiBinary(2)), {}),
    "images": ((IMAGE, spaces.Discrete(3)), {"policy": "CnnPolicy"}),
    "dict": ((DICT, BOX_ACTIONS), {"policy": "MultiInputPolicy"}),
    "gsde": ((VECTOR, BOX_ACTIONS), {"use_sde": True, "sde_sample_freq": 4}),
    "squashed": ((VECTOR, BOX_ACTIONS), {"policy": "SquashedMlpPolicy", "ent_coef": 0.01}),
    "clipped": ((VECTOR, BOX_ACTIONS), {"clipped_likelihood": True, "clip_advantage": 1.0}),
    "penalty": ((VECTOR, BOX_ACTIONS), {"trust_region": "penalty"}),
    "huber": ((VECTOR, BOX_ACTIONS), {"vf_loss": "huber", "clip_range_vf": 0.2, "max_grad_norm": 1.0}),
    "thinned": ((VECTOR, BOX_ACTIONS), {"sub_sampling_factor": 2, "cg_tolerance": 1e-6, "cg_damping": 0.01}),
    "fused": ((VECTOR, BOX_ACTIONS), {"policy_kwargs": {"net_arch": [8], "optimizer_kwargs": {"fused": True}}}),
}


def moved(batch: Batch) -> Batch:
    """The same batch on the device."""
    assert isinstance(batch.observations, th.Tensor)
    return Batch(batch.observations.to(accelerator.NAME), *(column.to(accelerator.NAME) for column in batch[1:]))


def update(policy: ActorCriticPolicy, batch: Batch, **kwargs: Any) -> UpdateResult:
    """One update of a policy, where it is."""
    constraint = KLConstraint(**{"cg_max_steps": 60, "cg_tolerance": 1e-12, "cg_damping": 0.1, **kwargs})
    with no_argument_checks:
        return constraint.update(Surrogate(policy, split_policy(policy).actor_params, batch), 0.01)


def params_of(policy: ActorCriticPolicy) -> th.Tensor:
    """All parameters as one vector on the CPU."""
    return flatten(list(policy.parameters())).cpu()


def random_model(training: str, device: str) -> TRPO:
    """A model on random observations and rewards."""
    env_spaces, kwargs = TRAININGS[training]
    return make_model(RandomEnv(*env_spaces), device=device, **copy.deepcopy(kwargs))


def test_tensors_of_two_devices_do_not_mix() -> None:
    number = th.ones(3, device=accelerator.NAME)
    assert number.device.type == accelerator.NAME
    assert (number * th.tensor(2.0)).sum().item() == 6
    with pytest.raises(RuntimeError, match="same device"):
        number + th.ones(3)
    with pytest.raises((RuntimeError, TypeError)):
        number.numpy()


def test_double_precision_can_be_missing() -> None:
    with accelerator.without_float64(), pytest.raises(TypeError, match="float64"):
        th.ones(3, dtype=th.float64, device=accelerator.NAME)


def test_a_look_at_a_number_is_counted() -> None:
    with accelerator.counted() as waits:
        number = th.ones(3, device=accelerator.NAME).sum()
        assert not waits and not waits.sent
        float(number), bool(number > 2), number.tolist(), number.cpu(), th.zeros(()).copy_(number)
        number.copy_(th.ones(())), th.ones(3).to(number.device)
    assert waits == {"outside": 5}
    assert waits.sent == {"outside": 2}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", POLICIES)
def test_an_update_is_that_of_the_cpu(name: str) -> None:
    policy = make_policy(**POLICIES[name])
    batch = make_batch(policy, 64)
    twin = copy.deepcopy(policy).to(accelerator.NAME)
    # Steps of convolutions take long, and these are enough here
    kwargs = {"cg_max_steps": 15} if name == "cnn" else {}
    results = update(policy, batch, **kwargs), update(twin, moved(batch), **kwargs)
    assert results[0].is_accepted
    assert results[1].kl == pytest.approx(results[0].kl, rel=1e-8)
    assert relative_error(params_of(twin), params_of(policy)) < 1e-10


@pytest.mark.parametrize("name", POLICIES)
def test_the_host_waits_once_per_solution_and_once_per_trial(name: str) -> None:
    policy = make_policy(**POLICIES[name])
    batch = moved(make_batch(policy, 64))
    policy.to(accelerator.NAME)
    for cg_max_steps in (2, 7):
        with accelerator.counted() as waits:
            result = update(policy, batch, cg_max_steps=cg_max_steps, cg_tolerance=1e-6, cg_damping=1e-3, precondition=False)
        assert result.is_accepted
        assert result.cg_steps == cg_max_steps
        assert waits == {
            "updates._before_update": 1,
            "conjugate_gradient.conjugate_gradient": 1,
            # Length of the direction and predicted improvement
            "updates.update": 1,
            "updates._evaluated": result.n_trials,
        }


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["gaussian", "categorical"])
def test_a_preconditioner_is_that_of_the_cpu_and_its_factors_make_one_journey(name: str) -> None:
    policy = make_policy(**POLICIES[name])
    batch = make_batch(policy, 64)
    vector = th.randn(flatten(split_policy(policy).actor_params).shape)
    results, costs = [], []
    for device in (th.device("cpu"), th.device(accelerator.NAME)):
        policy.to(device)
        surrogate = Surrogate(policy, split_policy(policy).actor_params, batch if device.type == "cpu" else moved(batch))
        fisher = surrogate.fisher()
        costs.append(fisher.preconditioner_cost)
        with accelerator.counted() as waits:
            preconditioner = fisher.preconditioner(0.1)
        assert preconditioner is not None
        results.append((preconditioner @ vector.to(device)).cpu())
    assert relative_error(results[1], results[0]) < 1e-10
    assert waits == {"kfac._eigen": 1}
    # The numbers of the sampled score, and the eigenvectors on their way back
    assert waits.sent == {"devices.sent_to": 2}
    # The host's part does not get faster with the device
    assert costs[1] > 5 * costs[0]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("is_mlp", [True, False])
def test_a_fit_of_the_critic_is_that_of_the_cpu_and_the_host_waits_twice(is_mlp: bool) -> None:
    policy = make_policy(**POLICIES["gaussian" if is_mlp else "cnn"])
    batch = make_batch(policy, 64)
    twin = copy.deepcopy(policy).to(accelerator.NAME)
    for each, rollout in ((policy, batch), (twin, moved(batch))):
        parts = split_policy(each)
        each.optimizer = th.optim.Adam(parts.critic_params, lr=1e-2, fused=True)
        th.manual_seed(0)
        with accelerator.counted() as waits:
            result = fit_critic(each, parts.critic_params, parts.critic_modules, rollout, CriticFit(n_epochs=5, batch_size=16))
        assert result.status is CriticStatus.FITTED
    # Are the returns finite, and are the new parameters; and the order of each epoch
    assert waits == {"critic.fit_critic": 2}
    assert waits.sent == {"devices.sent_to": 5}
    assert relative_error(params_of(twin), params_of(policy)) < 1e-10


@pytest.mark.parametrize("training", TRAININGS)
def test_learn_is_that_of_the_cpu_and_needs_no_double_precision(training: str) -> None:
    models, steps = [], []
    for device in ("cpu", accelerator.NAME):
        with accelerator.without_float64():
            # It seeds the random numbers
            models.append(random_model(training, device))
            before = params_of(models[-1].policy)
            models[-1].learn(32)
            steps.append(params_of(models[-1].policy) - before)
    assert all(param.device.type == accelerator.NAME for param in models[1].policy.parameters())
    assert [model._n_accepted for model in models] == [1, 1]
    assert relative_error(steps[1], steps[0]) < 1e-4
    assert log_of(models[1])["train/policy_objective"] == pytest.approx(log_of(models[0])["train/policy_objective"], rel=1e-3)

    # The next update begins with what this one has left
    with accelerator.without_float64():
        models[1].learn(32, reset_num_timesteps=False)


@pytest.mark.parametrize(
    ("algorithm", "policy", "make_env", "policy_kwargs"),
    [
        (MaskableTRPO, "MlpPolicy", Blocks, {"net_arch": [8]}),
        (RecurrentTRPO, "MlpLstmPolicy", CartPoleEnv, {"net_arch": [], "lstm_hidden_size": 4}),
    ],
    ids=["masks", "memory"],
)
def test_masks_and_memory_are_those_of_the_cpu(
    algorithm: type[TRPO], policy: str, make_env: Any, policy_kwargs: dict[str, Any]
) -> None:
    steps = []
    for device in ("cpu", accelerator.NAME):
        env = make_vec_env(make_env, 2, seed=0)
        model = algorithm(policy, env, n_steps=32, policy_kwargs=policy_kwargs, norm_obs=False, seed=0, device=device)
        before = params_of(model.policy)
        model.learn(64)
        assert model._n_accepted == 1
        steps.append(params_of(model.policy) - before)
    assert relative_error(steps[1], steps[0]) < 1e-3


def test_normalization_needs_no_double_precision_and_is_that_of_the_cpu() -> None:
    extractors: list[Any] = []
    for device in ("cpu", accelerator.NAME):
        with accelerator.without_float64():
            model = make_model(RandomEnv(), device=device, norm_obs=True, norm_reward=True)
            model.learn(96)
        extractors.append(model.policy.features_extractor)
    for name, buffer in extractors[0].state_dict().items():
        th.testing.assert_close(extractors[1].state_dict()[name].cpu(), buffer)
    assert extractors[1].normalizations["observation"].mean.device.type == accelerator.NAME


@pytest.mark.parametrize("training", ["gaussian", "categorical", "multi_categorical", "bernoulli", "squashed"])
def test_an_mlp_makes_the_host_wait_once_per_step_of_the_environment(training: str) -> None:
    model = random_model(training, accelerator.NAME)
    with accelerator.counted() as waits:
        model.learn(32)
    assert waits.pop("actors._on_host") == 32
    # Values, log-probabilities and what episodes cut short would have had, with PyTorch's checks of arguments
    n_ends = sum(waits.pop(name) for name in ("actors.evaluate", "lean._evaluate", "lean._finish"))
    assert n_ends <= 8
    assert waits.pop("conjugate_gradient.conjugate_gradient") <= 3
    assert waits.pop("updates._evaluated") == log_of(model)["train/line_search_trials"]
    assert waits == {
        "updates._before_update": 1,
        "updates.update": 1,
        "log.warn_if_another": 1,
        "surrogate.summary": 1,
        "critic.fit_critic": 2,
    }


def test_a_rollout_is_sent_once_for_the_update() -> None:
    model = random_model("gaussian", accelerator.NAME)
    with accelerator.counted() as waits:
        model.learn(32)
    # Observations, actions, values, log-probabilities, advantages and returns; bounds of the actions; orders of the critic
    n_epochs = model.n_critic_updates
    assert waits.sent["devices.sent_to"] == 8 + n_epochs
    assert not {name for name in waits.sent if name.startswith("batch")}


@pytest.mark.parametrize("training", ["gaussian", "categorical", "bernoulli"])
def test_a_nan_in_the_actor_is_noticed_before_the_environment_steps(training: str) -> None:
    model = random_model(training, accelerator.NAME)
    with th.no_grad():
        dict(model.policy.named_parameters())["action_net.bias"].fill_(float("nan"))
    with pytest.raises(ValueError, match="returns a NaN"):
        model.learn(32)
    assert model.num_timesteps == 0


def test_save_and_go_on_on_the_cpu(tmp_path: pathlib.Path) -> None:
    model = random_model("gaussian", accelerator.NAME)
    model.learn(32)
    model.save(tmp_path / "model.zip")
    loaded = TRPO.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert all(param.device.type == "cpu" for param in loaded.policy.parameters())
    assert th.equal(params_of(loaded.policy), params_of(model.policy))
    loaded.learn(32)
    assert loaded._n_accepted == 2


ON_DEVICE = {
    "gaussian": ("MlpPolicy", VECTOR, BOX_ACTIONS),
    "categorical": ("MlpPolicy", VECTOR, spaces.Discrete(3)),
    "dict": ("MultiInputPolicy", DICT, BOX_ACTIONS),
}


@pytest.mark.parametrize("case", ON_DEVICE)
def test_a_rollout_in_an_environment_of_tensors_makes_the_host_wait_at_its_ends_alone(case: str) -> None:
    """However many steps it has: nothing is read in between."""
    policy, observations, actions = ON_DEVICE[case]
    counts = []
    for n_steps in (16, 64):
        env = RandomTensorEnv(observations, actions, device=accelerator.NAME)
        with warnings.catch_warnings():
            # SB3 recommends the CPU for an MLP, which is right for environments of arrays
            warnings.simplefilter("error")
            model = TRPO(policy, env, n_steps=n_steps, batch_size=n_steps * 4, seed=0)
        assert model.device.type == accelerator.NAME
        model.learn(n_steps * 4)
        with accelerator.counted() as waits:
            model.learn(n_steps * 4, reset_num_timesteps=False)
        for varies in ("updates._evaluated", "conjugate_gradient.conjugate_gradient"):
            waits.pop(varies)
        counts.append(waits)
        # The environment of this test draws its random numbers on the host
        assert {name for name, n in waits.sent.items() if n >= n_steps} <= {"tensor.advance"}
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) <= 50


@pytest.mark.parametrize("case", ON_DEVICE)
def test_a_training_in_an_environment_of_tensors_is_that_of_the_cpu(case: str) -> None:
    policy, observations, actions = ON_DEVICE[case]
    trained = []
    for device in (accelerator.NAME, "cpu"):
        env = RandomTensorEnv(observations, actions, device=device)
        trained.append(TRPO(policy, env, n_steps=16, batch_size=64, seed=0).learn(3 * 64))
        assert isinstance(trained[-1].rollout_buffer, TensorRolloutBuffer)
    th.testing.assert_close(params_of(trained[0].policy), params_of(trained[1].policy), rtol=1e-3, atol=1e-4)
    assert [info["l"] for info in trained[0].ep_info_buffer or ()] == [info["l"] for info in trained[1].ep_info_buffer or ()]
