"""Policies that their users freeze, unfreeze, replace, hook into, pretrain and copy."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from agents import assert_identical, collect, copies, log_of, make_model, random_vec_env, train
from helpers import DICT, IMAGE, make_policy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn.modules import module as torch_module

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.update.optimizers import expanded_state, follow_
from sb3_trpo_ext.update.structure import drop_graph_, mlp_structure, split_policy

MODELS: dict[str, Callable[[], TRPO]] = {
    "mlp": lambda: make_model(),
    "penalty": lambda: make_model(trust_region="penalty"),
    "squashed": lambda: make_model(policy="SquashedMlpPolicy"),
    "gsde": lambda: make_model(use_sde=True),
    "cnn": lambda: make_model(random_vec_env(1, IMAGE), "CnnPolicy"),
    "dict": lambda: make_model(random_vec_env(1, DICT), "MultiInputPolicy"),
}


def make(name: str, loaded: bool, folder: Path) -> TRPO:
    """A model as it was made, or as it comes out of a file."""
    model = MODELS[name]()
    if not loaded:
        return model
    model.save(folder / "model")
    return TRPO.load(folder / "model", env=model.env, device="cpu")


def moved(model: TRPO, before: dict[str, th.Tensor]) -> set[str]:
    """Names of the parameters that are no longer what they were, to the last bit."""
    return {name for name, param in model.policy.named_parameters() if not th.equal(param, before[name])}


def named_copies(model: TRPO) -> dict[str, th.Tensor]:
    return {name: param.detach().clone() for name, param in model.policy.named_parameters()}


# --- Frozen and unfrozen -------------------------------------------------------------------------------------------------

#: Prefixes of the parameters that are frozen.
FROZEN = {
    "actor's body": ("mlp_extractor.policy_net", "pi_features_extractor"),
    "actor's head": ("action_net",),
    "log std": ("log_std",),
    "critic's body": ("mlp_extractor.value_net", "vf_features_extractor"),
    "critic's head": ("value_net",),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("part", FROZEN)
@pytest.mark.parametrize("name", MODELS)
def test_frozen_parameters_stay_and_all_others_move(name: str, part: str, loaded: bool, tmp_path: Path) -> None:
    model = make(name, loaded, tmp_path)
    frozen = {each for each, _ in model.policy.named_parameters() if each.startswith(FROZEN[part])}
    for each, param in model.policy.named_parameters():
        param.requires_grad_(each not in frozen)
    before = named_copies(model)
    model.learn(32)
    assert log_of(model)["train/status_name"] == "accepted"
    assert log_of(model)["train/value_status_name"] == "fitted"
    assert moved(model, before) == before.keys() - frozen

    # Unfrozen, they move with the next update, and the fast route is taken again
    for param in model.policy.parameters():
        param.requires_grad_(True)
    before = named_copies(model)
    model.learn(32, reset_num_timesteps=False)
    assert moved(model, before) == before.keys()
    is_mlp = name in ("mlp", "penalty", "squashed")
    assert (mlp_structure(model.policy, model._parts.actor_params) is not None) == is_mlp


def test_what_a_callback_freezes_stays_from_the_next_update_on() -> None:
    class Freezing(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 40:
                self.model.policy.get_submodule("mlp_extractor.policy_net").requires_grad_(False)
                self.kept = copies(self.model.policy.get_submodule("mlp_extractor.policy_net").parameters())
            return True

    model, callback = make_model(), Freezing()
    before = copies(model.policy.mlp_extractor.policy_net.parameters())
    model.learn(96, callback=callback)
    assert not th.equal(before[0], callback.kept[0])
    assert_identical(copies(model.policy.mlp_extractor.policy_net.parameters()), callback.kept)


def test_model_that_was_saved_while_frozen_loads(tmp_path: Path) -> None:
    model = make_model()
    model.policy.mlp_extractor.value_net.requires_grad_(False)
    model.learn(32).save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=model.env, device="cpu")
    assert_identical(loaded.get_parameters(), model.get_parameters())
    before = named_copies(loaded)
    assert moved(loaded.learn(32), before) == before.keys()


@pytest.mark.parametrize(
    ("prefixes", "status", "value_status", "warned"),
    [
        (("mlp_extractor.policy_net", "action_net", "log_std"), "nothing_to_train", "fitted", "action distribution"),
        (("mlp_extractor.value_net", "value_net"), "accepted", "nothing_to_train", "value function"),
    ],
)
def test_part_that_is_frozen_entirely(prefixes: tuple[str, ...], status: str, value_status: str, warned: str) -> None:
    model = make_model()
    for name, param in model.policy.named_parameters():
        param.requires_grad_(not name.startswith(prefixes))
    before = named_copies(model)
    with pytest.warns(UserWarning, match=f"The {warned} of ActorCriticPolicy .* will not be trained"):
        model.learn(32)
    assert log_of(model)["train/status_name"] == status
    assert log_of(model)["train/value_status_name"] == value_status
    assert moved(model, before) == {name for name in before if not name.startswith(prefixes)}


@pytest.mark.parametrize("trust_region", ["constraint", "penalty"])
def test_nothing_to_train_is_an_error_before_anything_moves(trust_region: str) -> None:
    model = make_model(trust_region=trust_region)
    model.policy.requires_grad_(False)
    before = model.get_parameters()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"No parameter of ActorCriticPolicy .* nothing to train"):
        model.learn(32)
    assert model.num_timesteps == 0
    assert_identical(model.get_parameters(), before)
    # An error is not the end: unfrozen, it trains
    model.policy.requires_grad_(True)
    model.learn(32)
    assert log_of(model)["train/status_name"] == "accepted"


# --- Replaced ------------------------------------------------------------------------------------------------------------


def replace_head(policy: Any) -> None:
    policy.action_net = nn.Linear(policy.action_net.in_features, 2)


def replace_values(policy: Any) -> None:
    policy.value_net = nn.Linear(policy.value_net.in_features, 1)


def replace_log_std(policy: Any) -> None:
    policy.log_std = nn.Parameter(th.full_like(policy.log_std, -0.5))


def replace_body(policy: Any) -> None:
    size = policy.mlp_extractor.policy_net[0].in_features
    policy.mlp_extractor.policy_net = nn.Sequential(nn.Linear(size, policy.action_net.in_features), nn.Tanh())


REPLACED: dict[str, tuple[Callable[[Any], None], str]] = {
    "head": (replace_head, "action_net"),
    "values": (replace_values, "value_net"),
    "log std": (replace_log_std, "log_std"),
    "body": (replace_body, "mlp_extractor.policy_net"),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("part", REPLACED)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("cnn", "dict")] + ["dict"])
def test_replaced_parts_are_trained(name: str, part: str, loaded: bool, tmp_path: Path) -> None:
    model = make(name, loaded, tmp_path)
    model.learn(32)
    if part == "head" and name == "gsde":
        # The noise of gSDE depends on the features, not on the head: nothing else is special
        assert model.use_sde
    replace, prefix = REPLACED[part]
    replace(model.policy)
    before = named_copies(model)
    model.learn(32, reset_num_timesteps=False)
    assert log_of(model)["train/status_name"] == "accepted"
    assert moved(model, before) == before.keys()
    assert any(each.startswith(prefix) for each in before)
    # The optimizer holds what is there, in the order in which a new one would, so that a saved model loads
    held = [id(param) for param in model.policy.optimizer.param_groups[0]["params"]]
    assert held == [id(param) for param in model.policy.parameters()]
    assert {id(param) for param in model.policy.optimizer.state} <= set(held)
    model.save(tmp_path / "replaced")


@pytest.mark.parametrize("trust_region", ["constraint", "penalty"])
def test_another_models_policy_is_trained(trust_region: str) -> None:
    model, other = make_model(trust_region=trust_region), make_model(seed=1)
    model.learn(32)
    model.policy = other.policy
    before = named_copies(other)
    model.learn(32, reset_num_timesteps=False)
    assert log_of(model)["train/status_name"] == "accepted"
    assert moved(other, before) == before.keys()


@pytest.mark.parametrize("part", [*REPLACED, "policy"])
def test_replacing_in_the_middle_of_a_rollout(part: str) -> None:
    """Steps before have values and log-probabilities of the policy before: those of SB3's loop, which asks in each step."""

    class Replacing(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 15:
                th.manual_seed(1)
                if part == "policy":
                    self.model.policy = make_policy(net_arch=[8])
                else:
                    REPLACED[part][0](self.model.policy)
            return True

    reference, model = make_model(), make_model()
    for each, loop in ((reference, super(TRPO, TRPO).collect_rollouts), (model, TRPO.collect_rollouts)):
        th.manual_seed(0)
        _, callback = each._setup_learn(100, Replacing())
        assert loop(each, each.env, callback, each.rollout_buffer, each.n_steps)  # type: ignore[arg-type]
    for array in ("actions", "values", "log_probs", "rewards", "advantages"):
        expected, found = getattr(reference.rollout_buffer, array), getattr(model.rollout_buffer, array)
        assert th.allclose(th.as_tensor(found), th.as_tensor(expected), rtol=1e-4, atol=1e-5), array
    model.train()
    assert log_of(model)["train/status_name"] == "accepted"


def test_an_optimizer_follows_what_has_been_replaced_and_keeps_the_rest() -> None:
    old, kept, new, ignored = (nn.Parameter(th.ones(2)) for _ in range(4))
    optimizer = th.optim.Adam([{"params": [old, kept], "lr": 0.5}])
    for param in (old, kept):
        param.grad = th.ones(2)
    optimizer.step()
    state = copy.deepcopy(optimizer.state[kept])
    # `ignored` has been there and was never held: its owner has left it out
    follow_(optimizer, {"a": old, "b": kept, "c": ignored}, {"a": new, "b": kept, "c": ignored})
    (group,) = optimizer.param_groups
    assert [id(param) for param in group["params"]] == [id(new), id(kept)]
    assert group["lr"] == 0.5
    assert_identical(dict(optimizer.state[kept]), dict(state))
    assert set(map(id, optimizer.state)) == {id(kept)}
    before = copy.deepcopy(optimizer.state_dict())
    follow_(optimizer, {"a": new, "b": kept, "c": ignored}, {"a": new, "b": kept, "c": ignored})
    assert_identical(optimizer.state_dict(), before)


def test_a_new_parameter_joins_the_group_of_the_one_that_had_its_name() -> None:
    actor, critic, new, further = (nn.Parameter(th.ones(2)) for _ in range(4))
    optimizer = th.optim.AdamW([{"params": [actor], "weight_decay": 0.5}, {"params": [critic], "weight_decay": 0.0}])
    follow_(optimizer, {"actor": actor, "critic": critic}, {"actor": actor, "critic": new, "further": further})
    groups = [[id(param) for param in group["params"]] for group in optimizer.param_groups]
    assert groups == [[id(actor), id(further)], [id(new)]]


# --- The optimizer, and pretraining --------------------------------------------------------------------------------------


def test_optimizer_holds_all_parameters_as_elsewhere_in_sb3() -> None:
    model = make_model()
    (group,) = model.policy.optimizer.param_groups
    assert [id(param) for param in group["params"]] == [id(param) for param in model.policy.parameters()]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("own_optimizer", [False, True])
def test_gradients_left_from_pretraining_move_nothing(own_optimizer: bool, foreach: bool) -> None:
    """The critic's fit used to make steps of the actor along them, behind the back of the trust region."""
    reference, model = collect(make_model(target_kl=1e-6)), collect(make_model(target_kl=1e-6))
    if own_optimizer:
        for each in (reference, model):
            each.policy.optimizer = th.optim.Adam(each.policy.parameters(), lr=0.01, foreach=foreach)
    for param in model.policy.parameters():
        param.grad = th.ones_like(param)
    for each in (reference, model):
        th.manual_seed(5)
        train(each)
    assert_identical(copies(model._parts.actor_params), copies(reference._parts.actor_params))
    assert_identical(copies(model._parts.critic_params), copies(reference._parts.critic_params))


def test_behavior_cloning_with_the_policys_optimizer_trains_the_actor() -> None:
    model = make_model(learning_rate=0.01)
    observations, actions = th.randn(64, 3), th.full((64, 2), 0.5)
    losses = []
    for _ in range(50):
        _, log_prob, _ = model.policy.evaluate_actions(observations, actions)
        loss = -log_prob.mean()
        model.policy.optimizer.zero_grad()
        loss.backward()
        model.policy.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    model.learn(32)
    assert log_of(model)["train/status_name"] == "accepted"
    assert log_of(model)["train/kl_divergence_loss"] <= model.target_kl


def test_optimizer_of_one_layer_trains_that_layer() -> None:
    model = make_model()
    model.policy.optimizer = th.optim.Adam(model.policy.value_net.parameters(), lr=0.01)
    before = named_copies(model)
    model.learn(32)
    names = {name for name in moved(model, before) if "value_net" in name}
    assert names == {"value_net.weight", "value_net.bias"}


@pytest.mark.parametrize("trust_region", ["constraint", "penalty"])
def test_states_of_optimizers_over_one_part_are_read(trust_region: str) -> None:
    """Earlier versions saved an optimizer of the critic's parameters alone, and one of the actor's."""
    model = make_model(trust_region=trust_region).learn(32)
    parameters: dict[str, Any] = model.get_parameters()
    all_params = list(model.policy.parameters())

    def cut(state: dict[str, Any], params: list[nn.Parameter]) -> dict[str, Any]:
        position = {id(param): index for index, param in enumerate(all_params)}
        kept = [position[id(param)] for param in params]
        (group,) = state["param_groups"]
        return {
            "state": {new: state["state"][old] for new, old in enumerate(kept)},
            "param_groups": [{**group, "params": list(range(len(kept)))}],
        }

    old: dict[str, Any] = {**parameters, "policy.optimizer": cut(parameters["policy.optimizer"], model._parts.critic_params)}
    assert expanded_state(old["policy.optimizer"], model._parts.critic_params, all_params) == parameters["policy.optimizer"]
    if trust_region == "penalty":
        penalty = parameters["kl_penalty"]
        old["kl_penalty"] = {**penalty, "optimizer": cut(penalty["optimizer"], model._parts.actor_params)}
    other = make_model(trust_region=trust_region, seed=1)
    other.set_parameters(old)
    assert_identical(other.get_parameters(), parameters)


# --- Hooks ---------------------------------------------------------------------------------------------------------------

#: For each kind how a module or its weight is hooked into; each returns a handle.
HOOKS: dict[str, Callable[[nn.Linear, Callable[..., None]], Any]] = {
    "tensor": lambda layer, hook: layer.weight.register_hook(hook),
    "after accumulation": lambda layer, hook: layer.weight.register_post_accumulate_grad_hook(hook),
    "full backward": lambda layer, hook: layer.register_full_backward_hook(hook),
    "full backward pre": lambda layer, hook: layer.register_full_backward_pre_hook(hook),
    "backward": lambda layer, hook: layer.register_backward_hook(hook),
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "forward pre": lambda layer, hook: layer.register_forward_pre_hook(hook),
    "all forward": lambda _, hook: torch_module.register_module_forward_hook(hook),
    "all forward pre": lambda _, hook: torch_module.register_module_forward_pre_hook(hook),
    "all full backward": lambda _, hook: torch_module.register_module_full_backward_hook(hook),
    "all full backward pre": lambda _, hook: torch_module.register_module_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["mlp", "gsde", "penalty"])
@pytest.mark.parametrize("part", ["action_net", "value_net"])
def test_hooks_hear_of_an_update_and_change_nothing(part: str, name: str, kind: str) -> None:
    reference, model = collect(MODELS[name]()), collect(MODELS[name]())
    calls = []
    handle = HOOKS[kind](getattr(model.policy, part), lambda *_: calls.append(kind))
    try:
        for each in (reference, model):
            th.manual_seed(5)
            assert train(each)["train/status_name"] == "accepted"
    finally:
        handle.remove()
    assert calls
    for found, expected in zip(model.policy.parameters(), reference.policy.parameters(), strict=True):
        assert th.allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "gsde", "dict", "squashed"])
def test_a_hook_on_a_parameter_hears_of_the_gradient_alone(name: str) -> None:
    """It is called once per update, on the gradient and not on products with the Fisher matrix, without a graph."""
    model = collect(MODELS[name]())
    seen: dict[str, list[th.Tensor]] = {}
    for each, param in model.policy.named_parameters():
        param.register_hook(lambda gradient, each=each: seen.setdefault(each, []).append(gradient))
    log = train(model)
    assert log["train/status_name"] == "accepted"
    actor = {id(param) for param in model._parts.actor_params}
    gradients = [seen[each] for each, param in model.policy.named_parameters() if id(param) in actor]
    assert [len(found) for found in gradients] == [1] * len(gradients)
    assert not any(found[0].requires_grad for found in gradients)
    norm = th.cat([found[0].flatten() for found in gradients]).norm()
    assert norm.item() == pytest.approx(log["train/grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", ["action_net", "value_net"])
def test_a_hook_that_sets_a_gradient_to_zero_freezes(part: str, name: str) -> None:
    model = collect(MODELS[name]())
    weight = getattr(model.policy, part).weight
    mask = th.ones_like(weight)
    mask[:, :3] = 0
    weight.register_hook(lambda gradient: gradient * mask)
    before, other = weight.detach().clone(), getattr(model.policy, part).bias.detach().clone()
    log = train(model)
    assert (log["train/status_name"], log["train/value_status_name"]) == ("accepted", "fitted")
    assert th.equal(weight[:, :3], before[:, :3])
    assert not th.equal(weight[:, 3:], before[:, 3:])
    assert not th.equal(getattr(model.policy, part).bias, other)


def test_a_step_along_what_a_hook_has_left_is_the_natural_gradient_of_that() -> None:
    """A hook that zeroes a parameter's gradient and `requires_grad_(False)` on it lead to the same update."""
    kwargs: dict[str, Any] = {"cg_tolerance": 1e-6, "cg_max_steps": 200}
    hooked, frozen = collect(make_model(**kwargs)), collect(make_model(**kwargs))
    hooked.policy.action_net.weight.register_hook(th.zeros_like)
    frozen.policy.action_net.weight.requires_grad_(False)
    for each in (hooked, frozen):
        th.manual_seed(5)
        assert train(each)["train/status_name"] == "accepted"
    for found, expected in zip(hooked.policy.parameters(), frozen.policy.parameters(), strict=True):
        assert th.allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_a_hook_that_only_looks_leaves_the_preconditioner_in_place() -> None:
    """On inputs that are badly scaled it decides how far conjugate gradient gets."""

    def run(is_hooked: bool) -> tuple[dict[str, Any], th.Tensor]:
        model = make_model(cg_damping=1e-3, n_steps=128, policy_kwargs={"net_arch": [16]})
        with th.no_grad():
            model.policy.get_parameter("mlp_extractor.policy_net.0.weight").mul_(th.tensor([100.0, 1.0, 0.01]))
        if is_hooked:
            for param in model.policy.parameters():
                param.register_hook(lambda gradient: None)
        collect(model)
        th.manual_seed(5)
        return train(model), th.cat([param.detach().flatten() for param in model._parts.actor_params])

    (expected_log, expected), (log, found) = run(False), run(True)
    assert log["train/cg_steps"] == expected_log["train/cg_steps"]
    assert th.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_telling_the_parts_from_each_other_runs_no_hook() -> None:
    model = make_model()
    calls = []
    for param in model.policy.parameters():
        param.register_hook(lambda gradient: calls.append(gradient))
    model.policy.value_net.requires_grad_(False)
    assert model._parts.critic_params
    assert not calls


# --- Optimizers of users' own ----------------------------------------------------------------------------------------------


class Clearing(th.optim.SGD):
    """Leaves no gradient behind."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.zero_grad(set_to_none=True)
        return loss


class Rebinding(th.optim.SGD):
    """Puts tensors of its own into the place of the gradients."""

    def step(self, closure: Any = None) -> Any:
        for param in (param for group in self.param_groups for param in group["params"] if param.grad is not None):
            param.grad = param.grad.clone()
        return super().step(closure)


@pytest.mark.parametrize("kind", [Clearing, Rebinding])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
def test_optimizers_that_change_the_gradients_fit_the_critic(kind: type[th.optim.SGD], activation: type[nn.Module]) -> None:
    fitted = []
    for make_optimizer in (th.optim.SGD, kind):
        model = collect(make_model(policy_kwargs={"net_arch": [8], "activation_fn": activation}))
        model.policy.optimizer = make_optimizer(model.policy.parameters(), lr=0.05)
        model.learning_rate = model.lr_schedule = lambda _: 0.05
        th.manual_seed(5)
        train(model)
        fitted.append(copies(model._parts.critic_params))
    for found, expected in zip(*fitted, strict=True):
        assert th.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_optimizer_of_the_last_layer_that_clears_its_gradients() -> None:
    fitted = []
    for make_optimizer in (th.optim.SGD, Clearing):
        model = collect(make_model())
        model.policy.optimizer = make_optimizer(model.policy.value_net.parameters(), lr=0.05)
        th.manual_seed(5)
        train(model)
        fitted.append(copies(model.policy.value_net.parameters()))
    assert_identical(*fitted)


def test_an_optimizer_that_holds_nothing_of_the_critic_has_nothing_to_train() -> None:
    model = make_model()
    model.policy.optimizer = th.optim.Adam(model.policy.action_net.parameters(), lr=0.01)
    before = copies(model._parts.critic_params)
    model.learn(32)
    assert log_of(model)["train/value_status_name"] == "nothing_to_train"
    assert_identical(copies(model._parts.critic_params), before)


def test_old_states_of_optimizers_load_into_a_model_that_is_frozen() -> None:
    model = make_model().learn(32)
    state: Any = model.policy.optimizer.state_dict()
    critic = [
        index for index, param in enumerate(model.policy.parameters()) if id(param) in map(id, model._parts.critic_params)
    ]
    (group,) = state["param_groups"]
    old = {
        "state": {new: state["state"][index] for new, index in enumerate(critic)},
        "param_groups": [{**group, "params": list(range(len(critic)))}],
    }
    other = make_model(seed=1)
    other.policy.mlp_extractor.value_net.requires_grad_(False)
    parameters: dict[str, Any] = {**model.get_parameters(), "policy.optimizer": old}
    other.set_parameters(parameters)
    assert_identical(other.get_parameters(), model.get_parameters())
    assert not any(param.requires_grad for param in other.policy.mlp_extractor.value_net.parameters())


# --- Running statistics --------------------------------------------------------------------------------------------------


class Normed(BaseFeaturesExtractor):
    """A layer of some kind in front of the actor and the critic."""

    def __init__(self, observation_space: Any, make_layer: Callable[[], nn.Module]) -> None:
        super().__init__(observation_space, 3)
        self.layer = make_layer()

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layer(observations)


LAYERS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "batch norm": (lambda: nn.BatchNorm1d(3), "BatchNorm1d features_extractor.layer"),
    "without statistics": (lambda: nn.LayerNorm(3), None),
    "batch norm without statistics": (lambda: nn.GroupNorm(1, 3), None),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), "_SpectralNorm .*layer"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), "Linear features_extractor.layer"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_running_statistics_of_the_actor_are_warned_of_once(case: str) -> None:
    make_layer, expected = LAYERS[case]
    kwargs = {"features_extractor_class": Normed, "features_extractor_kwargs": {"make_layer": make_layer}, "net_arch": [4]}
    kwargs["share_features_extractor"] = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_model(policy_kwargs=kwargs).learn(64)
    found = [str(each.message) for each in caught if "running statistics" in str(each.message)]
    if expected is None:
        assert not found
    else:
        assert len(found) == 1
        with pytest.warns(UserWarning, match=f"The actor of ActorCriticPolicy .* never learn: {expected}.*VecNormalize"):
            make_model(policy_kwargs=kwargs)


# --- Copies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_policy_can_be_copied_at_any_time(name: str) -> None:
    class Copying(BaseCallback):
        def _on_step(self) -> bool:
            self.copy = copy.deepcopy(self.model.policy)
            return True

        def _on_rollout_end(self) -> None:
            copy.deepcopy(self.model.policy)

    model = MODELS[name]()
    copy.deepcopy(model.policy)
    callback = Copying()
    model.learn(64, callback=callback)
    assert_identical(copy.deepcopy(model.policy).state_dict(), model.policy.state_dict())
    assert len(list(callback.copy.parameters())) == len(list(model.policy.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_can_be_copied_and_goes_on(name: str) -> None:
    """With sb3-contrib's TRPO that works."""
    model = MODELS[name]().learn(64)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        th.manual_seed(0)
        each.learn(64, reset_num_timesteps=False)
    assert_identical(twin.get_parameters(), model.get_parameters())
    assert twin.policy is not model.policy


def test_a_trained_model_can_be_pickled() -> None:
    model = make_model().learn(64)
    assert_identical(pickle.loads(pickle.dumps(model)).get_parameters(), model.get_parameters())


def test_a_loaded_policy_with_noise_of_its_own_can_be_copied(tmp_path: Path) -> None:
    make_model(use_sde=True).save(tmp_path / "model")
    copy.deepcopy(TRPO.load(tmp_path / "model", device="cpu").policy)


def test_a_distribution_without_its_graph_has_the_same_numbers() -> None:
    policy = make_policy()
    distribution: Any = policy.get_distribution(th.ones(2, 3))
    mean = distribution.distribution.loc
    assert mean.requires_grad
    drop_graph_(distribution)
    assert not distribution.distribution.loc.requires_grad
    assert th.equal(distribution.distribution.loc, mean)


def test_split_does_not_keep_a_graph() -> None:
    policy = make_policy()
    split_policy(policy)
    copy.deepcopy(policy)
