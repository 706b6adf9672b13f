"""Trained policies in files that run without Stable-Baselines3."""

import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import nn

from sb3_trpo_ext._checks import ArgumentError, check_choice
from sb3_trpo_ext._files import replacing
from sb3_trpo_ext._observations import parts_of, vec_normalizes
from sb3_trpo_ext.update.mixed import MixedDistribution
from sb3_trpo_ext.update.settings import no_argument_checks

#: What a file can be, and its ending.
FORMATS = {"onnx": ".onnx", "torchscript": ".pt"}
#: Names of the inputs that are not observations.
_STATE, _MASKS = ("hidden", "cell", "episode_start"), "action_masks"


class _VecNormalized(nn.Module):
    """Normalizes observations as a ``VecNormalize`` does, with its statistics as they are now."""

    def __init__(self, normalize: VecNormalize, parts: dict[str, spaces.Space[Any]]):
        super().__init__()
        self.clip = normalize.clip_obs
        rms = normalize.obs_rms
        for key, moments in (rms if isinstance(rms, dict) else {"": rms}).items():
            if key not in parts or moments.mean.shape != parts[key].shape:
                raise ArgumentError(
                    f"`env`: its VecNormalize has statistics of shape {moments.mean.shape}, and the policy has no observation "
                    "like that. Wrappers that change observations, such as VecFrameStack, must be below VecNormalize."
                )
            std = np.sqrt(moments.var + normalize.epsilon)
            for name, value in (("mean", moments.mean), ("std", std)):
                self.register_buffer(f"{name}_{key}", th.as_tensor(value, dtype=th.float32))

    def forward(self, key: str, observations: th.Tensor) -> th.Tensor:
        """Normalize the observations of a key, if it has statistics."""
        if not hasattr(self, f"mean_{key}"):
            return observations
        mean, std = getattr(self, f"mean_{key}"), getattr(self, f"std_{key}")
        return ((observations.float() - mean) / std).clamp(-self.clip, self.clip)


def _normalizing(env: Any) -> VecNormalize | None:
    """The ``VecNormalize`` that normalizes the observations of an environment; ``None`` without one."""
    if env is not None and not isinstance(env, VecEnv):
        raise ArgumentError(f"`env` must be a VecEnv of SB3, such as the VecNormalize of the training, got {env!r}.")
    found = [wrapper for wrapper in vec_normalizes(env) if wrapper.norm_obs]
    if len(found) > 1:
        raise ArgumentError("`env` has two VecNormalize that both normalize observations: leave it to one of them.")
    return found[0] if found else None


class DeployedPolicy(nn.Module):
    """
    What ``model.predict`` does, in tensors alone: observations in, actions for the environment out.

    Inputs and outputs have names and are given by position, in the order of :attr:`inputs` and :attr:`outputs`. The batch is
    their first axis; for the states of an LSTM, it is the second.

    :param model: with an actor-critic policy
    :param env: whose ``VecNormalize`` normalizes the observations; ``None`` for the model's own environment
    :param deterministic: whether to take the mode of the distribution, not a sample
    :raises ValueError: for another policy, samples with gSDE, a ``VecNormalize`` that does not fit, or a clash of names
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, model: BaseAlgorithm, env: VecEnv | None = None, deterministic: bool = True):
        super().__init__()
        policy: Any = model.policy
        if not hasattr(policy, "get_distribution"):
            raise ArgumentError(
                f"`model` must have an actor-critic policy, as TRPO and PPO have, got {type(policy).__name__}."
            )
        if model.use_sde and not deterministic:
            raise ArgumentError("`deterministic=False` with gSDE: its noise lasts for many steps. Use `deterministic=True`.")
        self.policy: Any = policy
        self.deterministic = deterministic
        if env is None and model.env is None and not getattr(model, "norm_obs", False):
            warnings.warn(
                "The model has no environment. If it was trained in a VecNormalize, pass that as `env`, or the file lacks it.",
                stacklevel=3,
            )
        self._parts = parts_of(model.observation_space)
        wrapper = _normalizing(model.env if env is None else env)
        self.normalize: _VecNormalized | None = None
        if wrapper is not None:
            self.normalize = _VecNormalized(wrapper, self._parts).to(policy.device)
        self.is_recurrent = hasattr(policy, "lstm_actor")
        self.has_masks = _MASKS in inspect.signature(policy.get_distribution).parameters
        self._action_shape = model.action_space.shape or ()
        if isinstance(model.action_space, spaces.Box):
            for name in ("low", "high"):
                bound = th.as_tensor(getattr(model.action_space, name), dtype=th.float32, device=policy.device)
                self.register_buffer(name, bound)
        #: Names of the inputs: a part of the observations each, then masks or the state of an LSTM.
        self.inputs = [key or "observation" for key in self._parts]
        self.inputs += list(_STATE) * self.is_recurrent + [_MASKS] * self.has_masks
        #: Names of the outputs.
        self.outputs = ["action", *(f"next_{name}" for name in _STATE[:2] * self.is_recurrent)]
        names = [*self.inputs, *self.outputs]
        if len(set(names)) < len(names):
            raise ArgumentError(
                f"`model`: a key of {model.observation_space} is the name of another input or output: {names}."
            )

    def examples(self, n_batch: int = 2) -> tuple[th.Tensor, ...]:
        """
        Inputs of the right shapes and types, all zero: single precision for every kind of floating point numbers.

        :param n_batch: size of the batch
        :return: in the order of :attr:`inputs`
        """
        tensors = [th.as_tensor(np.zeros((n_batch, *(part.shape or ())), part.dtype)) for part in self._parts.values()]
        tensors = [tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors]
        if self.is_recurrent:
            lstm = self.policy.lstm_actor
            tensors += [th.zeros(lstm.num_layers, n_batch, lstm.hidden_size) for _ in range(2)]
            tensors.append(th.zeros(n_batch))
        if self.has_masks:
            dist = self.policy.action_dist
            n_masks = sum(dist.action_dims) if hasattr(dist, "action_dims") else dist.action_dim
            tensors.append(th.ones(n_batch, n_masks, dtype=th.bool))
        return tuple(tensor.to(self.policy.device) for tensor in tensors)

    def forward(self, *inputs: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        Act.

        :param inputs: in the order of :attr:`inputs`
        :return: in the order of :attr:`outputs`
        """
        parts = dict(zip(self._parts, inputs, strict=False))
        if self.normalize is not None:
            parts = {key: self.normalize(key, value) for key, value in parts.items()}
        observations: Any = parts.get("", parts)
        states: tuple[th.Tensor, ...] = ()
        if self.is_recurrent:
            distribution, states = self._recurrent(observations, *inputs[len(parts) :])
        else:
            distribution = self.policy.get_distribution(observations, *inputs[len(parts) :])
        actions = self._chosen(distribution).reshape(-1, *self._action_shape)
        if self.policy.squash_output and not isinstance(distribution, MixedDistribution):
            actions = self.low + 0.5 * (actions + 1.0) * (self.high - self.low)
        elif hasattr(self, "low"):
            actions = actions.clamp(self.low, self.high)
        return actions, *states

    def _chosen(self, distribution: Any) -> th.Tensor:
        """The mode of a distribution, or a sample of it."""
        if isinstance(distribution, MixedDistribution):
            return th.cat([self._chosen(part).float() for part in distribution.parts], dim=1)
        inner = getattr(distribution, "distribution", None)
        if isinstance(inner, th.distributions.Bernoulli) and not self.deterministic:
            # PyTorch's exporter makes all samples of `bernoulli` the same
            return (th.rand_like(inner.probs) < inner.probs).float()
        return distribution.get_actions(deterministic=self.deterministic)

    def _recurrent(self, observations: Any, hidden: th.Tensor, cell: th.Tensor, start: th.Tensor) -> tuple[Any, Any]:
        """One step of the LSTM, as sb3-contrib makes it, without its branch on whether an episode begins."""
        features = BasePolicy.extract_features(self.policy, observations, self.policy.pi_features_extractor)
        kept = (1.0 - start)[None, :, None]
        outputs, states = self.policy.lstm_actor(features[None], (hidden * kept, cell * kept))
        latent = self.policy.mlp_extractor.forward_actor(outputs[0])
        return self.policy._get_action_dist_from_latent(latent), states


def export(
    model: BaseAlgorithm, path: str | Path, format: str = "onnx", *, env: VecEnv | None = None, deterministic: bool = True
) -> Path:
    """
    Write the policy of a model to a file: observations in, actions out, with everything between them.

    That is normalization, one-hot encoding, networks, distribution, and the clipping or scaling to the bounds of the actions.
    Inputs and outputs are those of :class:`DeployedPolicy`, of which the file is a copy; the size of the batch is free.

    :param model: an algorithm with an actor-critic policy, such as TRPO or PPO
    :param path: of the file; an existing one is replaced, and folders that are missing are made
    :param format: ``"onnx"``, which needs the extra ``export``, or ``"torchscript"``
    :param env: whose ``VecNormalize`` normalizes the observations; ``None`` for the model's own environment
    :param deterministic: whether the file takes the mode of the distribution, not a sample
    :return: the path
    :raises ValueError: for a policy that cannot be exported, a ``VecNormalize`` that does not fit, or a bad path
    :raises ImportError: if the extra is missing
    """
    return write(DeployedPolicy(model, env, deterministic), path, format)


def write(policy: DeployedPolicy, path: str | Path, format: str = "onnx") -> Path:
    """
    Write a policy to a file; see :func:`export`.

    :param policy: the policy
    :param path: of the file
    :param format: ``"onnx"`` or ``"torchscript"``
    :return: the path
    :raises ValueError: for a bad path or format
    :raises ImportError: if the extra is missing
    """
    check_choice("format", format, tuple(FORMATS))
    path = Path(path)
    if path.is_dir():
        raise ArgumentError(f"`path` must be a file, and {path} is a folder: {path / ('policy' + FORMATS[format])} would do.")
    if path.suffix != FORMATS[format] and path.suffix in FORMATS.values():
        raise ArgumentError(f"`path` must not end in {path.suffix} with format={format!r}, got {path}: use {FORMATS[format]}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    policy.policy.set_training_mode(False)
    # Tracing a policy that samples draws random numbers, which must not change a training
    devices = [policy.policy.device] if policy.policy.device.type == "cuda" else []
    with th.no_grad(), no_argument_checks, th.random.fork_rng(devices), replacing(path) as partial, warnings.catch_warnings():
        # PyTorch calls TorchScript deprecated, and comments on constants of a trace
        warnings.simplefilter("ignore")
        if format == "onnx":
            _write_onnx(policy, partial)
        else:
            # Frozen: the parameters of a trace would require gradients
            th.jit.freeze(th.jit.trace(policy.eval(), policy.examples(), check_trace=False)).save(str(partial))
    return path


def _write_onnx(policy: DeployedPolicy, path: Path) -> None:
    """Write a policy as ONNX, with its weights in the same file."""
    # It warns if torchvision is missing, which is not needed here
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch = th.export.Dim("batch")
    states = _STATE[:2] if policy.is_recurrent else ()
    axes = tuple({1 if name in states else 0: batch} for name in policy.inputs)
    try:
        program = th.onnx.export(
            policy,
            policy.examples(),
            input_names=policy.inputs,
            output_names=policy.outputs,
            dynamic_shapes=(axes,),
            dynamo=True,
            verbose=False,
        )
    except ModuleNotFoundError as error:
        raise ImportError(f"ONNX needs {error.name}: pip install 'sb3-trpo-ext[export]'.") from error
    assert program is not None
    program.save(path, external_data=False)
