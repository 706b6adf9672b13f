"""TRPO with backpropagation through time, for sb3-contrib's LSTM policies and buffers."""

from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_trpo_ext import arguments
from sb3_trpo_ext._checks import ArgumentError
from sb3_trpo_ext.rollout.collect import collect_rollouts
from sb3_trpo_ext.trpo import TRPO
from sb3_trpo_ext.update.batch import take
from sb3_trpo_ext.update.calls import PolicyCalls
from sb3_trpo_ext.update.sequences import RecurrentCalls

SelfRecurrentTRPO = TypeVar("SelfRecurrentTRPO", bound="RecurrentTRPO")
#: Methods that `RecurrentCalls` replaces or relies on: a policy that overrides one is refused.
_METHODS = (
    *("forward", "get_distribution", "predict_values", "evaluate_actions", "extract_features"),
    *("_process_sequence", "_get_action_dist_from_latent"),
)


class _OwnExtractors:
    """Actor and critic have a features extractor each by default, unless they share the LSTM."""

    def __init__(self, *args: Any, share_features_extractor: bool | None = None, shared_lstm: bool = False, **kwargs: Any):
        share = shared_lstm if share_features_extractor is None else share_features_extractor
        super().__init__(*args, **kwargs, share_features_extractor=share, shared_lstm=shared_lstm)  # type: ignore[call-arg]


class CnnLstmPolicy(_OwnExtractors, RecurrentActorCriticCnnPolicy):
    """sb3-contrib's policy for images, whose actor and critic have a features extractor each by default."""


class MultiInputLstmPolicy(_OwnExtractors, RecurrentMultiInputActorCriticPolicy):
    """sb3-contrib's policy for Dict observations, whose actor and critic have a features extractor each by default."""


class RecurrentTRPO(TRPO):
    """
    TRPO for policies with an LSTM, for tasks where one observation does not determine the state.

    Objective, KL and Fisher matrix are means over all steps of a rollout. Derivatives are propagated back through time to the
    beginning of the episode, or of the rollout if the episode began before it. Nothing is padded.

    Arguments are those of :class:`~sb3_trpo_ext.trpo.TRPO`. ``batch_size`` and ``sub_sampling_factor`` apply to whole
    sequences: a minibatch has at least one, and the Fisher matrix is computed on every k-th. Policies are those of
    sb3-contrib's ``RecurrentPPO``, with ``lstm_hidden_size``, ``n_lstm_layers``, ``shared_lstm`` and ``enable_critic_lstm``
    in ``policy_kwargs``; ``predict`` takes and returns their states.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": RecurrentActorCriticPolicy,
        "CnnLstmPolicy": CnnLstmPolicy,
        "MultiInputLstmPolicy": MultiInputLstmPolicy,
    }
    policy_base: ClassVar[str | None] = RecurrentActorCriticPolicy.__name__
    calls_class: ClassVar[type[PolicyCalls]] = RecurrentCalls

    def _setup_policy(self) -> None:
        """Create policy and buffer; in this order, because the buffer holds the states of the LSTM."""
        kind = self.policy_class
        own = [name for name in _METHODS if getattr(kind, name) is not getattr(RecurrentActorCriticPolicy, name)]
        if own:
            raise ArgumentError(
                f"`policy`: {kind.__name__} has a method {own[0]!r} of its own, which an update through time would not call: "
                "change the features extractor or the networks instead."
            )
        if self.n_steps == 1:
            raise ArgumentError(
                "`n_steps` must be at least 2 for a recurrent policy, got 1: there is no sequence in one step."
            )
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        policy: Any = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **self.policy_kwargs
        )
        self.policy = policy.to(self.device)
        for lstm in (policy.lstm_actor, policy.lstm_critic):
            if isinstance(lstm, nn.LSTM) and (lstm.bidirectional or lstm.proj_size or lstm.batch_first):
                names = "`bidirectional`, `proj_size` and `batch_first`"
                raise ArgumentError(f"`policy_kwargs['lstm_kwargs']`: {names} change the shapes of an LSTM: leave them out.")
        shape = (policy.lstm_actor.num_layers, self.n_envs, policy.lstm_actor.hidden_size)
        if self.rollout_buffer_class is None:
            is_dict = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = RecurrentDictRolloutBuffer if is_dict else RecurrentRolloutBuffer
        kinds = (RecurrentRolloutBuffer, RecurrentDictRolloutBuffer)
        arguments.check_buffer(
            self.rollout_buffer_class, kinds, "for recurrent policies", "take the steps of a sequence apart"
        )
        buffer_class: Any = self.rollout_buffer_class
        self.rollout_buffer = buffer_class(
            self.n_steps,
            self.observation_space,
            self.action_space,
            hidden_state_shape=(self.n_steps, *shape),
            device=self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
            **self.rollout_buffer_kwargs,
        )
        zeros = th.zeros(shape, device=self.device)
        #: After the last step, of each environment.
        self._last_lstm_states = RNNStates((zeros, zeros), (zeros, zeros))

    def _collect(self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, *args: Any) -> bool:
        return collect_rollouts(self, env, callback, rollout_buffer, *args, loop=RecurrentPPO.collect_rollouts)

    @th.no_grad()
    def _renew_states(self, buffer: Any) -> None:
        """Compute the states in a full buffer again, with the policy as it is now."""
        policy: Any = self.policy
        names = ("hidden_states_pi", "cell_states_pi", "hidden_states_vf", "cell_states_vf")
        first = [th.as_tensor(getattr(buffer, name)[0], device=self.device) for name in names]
        states = RNNStates((first[0], first[1]), (first[2], first[3]))
        for step in range(buffer.buffer_size):
            for name, state in zip(names, (*states.pi, *states.vf), strict=True):
                getattr(buffer, name)[step] = state.cpu().numpy()
            observations: Any = obs_as_tensor(take(buffer.observations, step), self.device)  # type: ignore[arg-type]
            starts = th.as_tensor(buffer.episode_starts[step], device=self.device)
            *_, states = policy(observations, states, starts)
        self._last_lstm_states = states

    def _last_values(self) -> th.Tensor:
        policy: Any = self.policy
        starts = th.as_tensor(self._last_episode_starts, dtype=th.float32, device=self.device)
        return policy.predict_values(obs_as_tensor(self._last_obs, self.device), self._last_lstm_states.vf, starts)  # type: ignore[arg-type]

    def _terminal_value(self, buffer: Any, step: int, index: int, observation: Any) -> float:
        policy: Any = self.policy
        lstm = policy.lstm_actor if policy.shared_lstm else policy.lstm_critic
        arrays = (buffer.hidden_states_vf[step], buffer.cell_states_vf[step])
        states = tuple(th.as_tensor(array[:, [index]], device=self.device) for array in arrays)
        if lstm is not None:
            # Those of the buffer are from before the step
            last = policy.obs_to_tensor(take(buffer.observations, (step, index)))[0]
            start = th.as_tensor(buffer.episode_starts[step, [index]], device=self.device)
            features = BasePolicy.extract_features(policy, last, policy.vf_features_extractor)
            _, states = policy._process_sequence(features, states, start, lstm)
        terminal = policy.obs_to_tensor(observation)[0]
        return float(policy.predict_values(terminal, states, th.zeros(1, device=self.device)))

    def learn(
        self: SelfRecurrentTRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "RecurrentTRPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfRecurrentTRPO:
        """Train the model: as :meth:`sb3_trpo_ext.trpo.TRPO.learn`."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _excluded_save_params(self) -> list[str]:
        """Attributes that are not pickled."""
        return [*super()._excluded_save_params(), "_last_lstm_states"]
