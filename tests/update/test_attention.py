"""Networks with attention, whose fast kernels have no second derivative."""

from typing import Any

import pytest
import torch as th
from agents import RandomEnv, collect, log_of, make_model, train
from gymnasium import spaces
from helpers import relative_error
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn import functional as F

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.update.settings import twice_differentiable_attention
from sb3_trpo_ext.update.surrogate import Surrogate

TOKENS = spaces.Box(-1.0, 1.0, (4, 8))


class Encoder(BaseFeaturesExtractor):
    """A layer of a transformer."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, 8)
        self.encoder = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.encoder(observations).mean(dim=1)


class Attention(BaseFeaturesExtractor):
    """Attention as a function, of which no module tells."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, 8)
        self.project = nn.Linear(8, 24)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        query, key, value = self.project(observations).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(query, key, value).mean(dim=1)


def make(extractor: type[BaseFeaturesExtractor], **kwargs: Any) -> TRPO:
    policy_kwargs = {"features_extractor_class": extractor, "net_arch": [8]}
    return make_model(RandomEnv(TOKENS), policy_kwargs=policy_kwargs, **kwargs)


@pytest.mark.parametrize("extractor", [Encoder, Attention])
@pytest.mark.parametrize("trust_region", ["constraint", "penalty"])
def test_policies_with_attention_train(extractor: type[BaseFeaturesExtractor], trust_region: str) -> None:
    model = make(extractor, trust_region=trust_region)
    before = {name: param.detach().clone() for name, param in model.policy.named_parameters()}
    model.learn(96)
    assert log_of(model)["train/status_name"] == "accepted"
    assert log_of(model)["train/value_status_name"] == "fitted"
    assert not {name for name, param in model.policy.named_parameters() if th.equal(param, before[name])}


@pytest.mark.parametrize("extractor", [Encoder, Attention])
def test_fisher_matrix_through_attention_is_the_hessian_of_the_kl(extractor: type[BaseFeaturesExtractor]) -> None:
    model = collect(make(extractor, n_steps=8, batch_size=8))
    model.policy.set_training_mode(False)
    params = model._parts.actor_params
    with twice_differentiable_attention:
        surrogate = Surrogate(model.policy, params, model._full_batch())
        n_params = sum(param.numel() for param in params)
        fisher = surrogate.fisher()
        direction = th.randn(n_params)
        _, kl = surrogate.evaluate()
        gradient = th.cat([part.flatten() for part in th.autograd.grad(kl, params, create_graph=True)])
        parts = th.autograd.grad(gradient, params, direction, materialize_grads=True)
        hessian_product = th.cat([part.flatten() for part in parts])
    assert relative_error(fisher @ direction, hessian_product) < 1e-3


def test_the_choice_of_kernels_is_as_before_after_an_update() -> None:
    enabled = (
        th.backends.cuda.flash_sdp_enabled,
        th.backends.cuda.mem_efficient_sdp_enabled,
        th.backends.cuda.math_sdp_enabled,
    )
    before = [is_enabled() for is_enabled in enabled]
    train(collect(make(Encoder)))
    assert [is_enabled() for is_enabled in enabled] == before
    with twice_differentiable_attention:
        assert not th.backends.cuda.flash_sdp_enabled()
    assert [is_enabled() for is_enabled in enabled] == before
