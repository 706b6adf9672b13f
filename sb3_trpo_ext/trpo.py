"""TRPO for Stable-Baselines3: the glue between SB3 and the mathematics in :mod:`sb3_trpo_ext.optim`."""

import functools
import math
import time
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext import arguments, defaults
from sb3_trpo_ext._checks import ArgumentError, check_seed, closest, is_known
from sb3_trpo_ext._names import explaining_names
from sb3_trpo_ext.envs.envpool import was_interrupted
from sb3_trpo_ext.envs.tensor import TensorVecEnv
from sb3_trpo_ext.envs.vector import VectorEnvAdapter
from sb3_trpo_ext.optim import AdaptiveKLPenalty, KLConstraint, PolicyUpdate, UpdateResult, UpdateStatus
from sb3_trpo_ext.parallel import launch
from sb3_trpo_ext.parallel.reductions import Shares, is_parallel, rank, world_size
from sb3_trpo_ext.policies import POLICY_ALIASES, mixed_policy
from sb3_trpo_ext.rollout.collect import collect_rollouts
from sb3_trpo_ext.rollout.device import TensorRollout
from sb3_trpo_ext.rollout.normalization import Normalization
from sb3_trpo_ext.rollout.returns import set_returns_
from sb3_trpo_ext.rollout.snapshot import Snapshot
from sb3_trpo_ext.rollout.stagger import Stagger
from sb3_trpo_ext.rollout.tensors import TensorRolloutBuffer
from sb3_trpo_ext.saving import SavingAlgorithm
from sb3_trpo_ext.update.batch import Batch, rollout_batch
from sb3_trpo_ext.update.clipping import action_bounds
from sb3_trpo_ext.update.critic import CriticFit, fit_critic
from sb3_trpo_ext.update.distributions import family_of
from sb3_trpo_ext.update.log import record_update, warn_if_another, warn_if_rejected
from sb3_trpo_ext.update.mixed import MixedActions
from sb3_trpo_ext.update.normalization import RewardScale, normalized_extractors
from sb3_trpo_ext.update.optimizers import fast_optimizer
from sb3_trpo_ext.update.settings import no_argument_checks, twice_differentiable_attention
from sb3_trpo_ext.update.structure import PolicyParts, drop_graph_
from sb3_trpo_ext.update.surrogate import Surrogate
from sb3_trpo_ext.update.watch import PolicyWatch

SelfTRPO = TypeVar("SelfTRPO", bound="TRPO")


class TRPO(SavingAlgorithm):
    """
    Trust Region Policy Optimization (Schulman et al. 2015, https://arxiv.org/abs/1502.05477).

    Maximizes ``mean(ratio * advantage) + ent_coef * mean(entropy)`` subject to ``mean KL(old || new) <= target_kl``. The KL is
    that of the joint distribution: **summed over action dimensions**, averaged over states. Damping is added to the Fisher
    matrix of that KL. (sb3-contrib averages over action dimensions for Box and MultiBinary actions: multiply its ``target_kl``
    and ``cg_damping`` by their number to get the same trust region here.)

    Arguments up to ``_init_setup_model`` have sb3-contrib's names and positions. The defaults are for a task that nobody has
    tuned: the class chooses what depends on the task, see :mod:`sb3_trpo_ext.defaults`.

    :param policy: The policy model to use: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, the same with "Squashed"
        in front (tanh-squashed Gaussian for bounded Box actions), or a class
    :param env: The environment to learn from (if registered in Gymnasium, can be a str); a vector environment of Gymnasium is
        wrapped in :class:`~sb3_trpo_ext.envs.VectorEnvAdapter`
    :param learning_rate: The learning rate of the value function, a number or a function of the progress remaining (1 to 0)
    :param n_steps: The number of steps to run for each environment per update; ``None`` for about 2048 samples in all, and at
        least 16 steps
    :param batch_size: Minibatch size for the value function, in each process of a data-parallel run; ``None`` for 64, or more
        in a rollout of more than 8,192 samples, which then has up to 128 minibatches
    :param gamma: Discount factor
    :param cg_max_steps: Maximum number of Fisher-vector products in conjugate gradient
    :param cg_damping: Damping added to the diagonal of the Fisher matrix, a number or a schedule; ``"auto"`` for 0.2 per
        action dimension
    :param line_search_shrinking_factor: Shrinks a step whose KL does not tell the line search how far to go
    :param line_search_max_iter: Maximum number of trials of the line search
    :param n_critic_updates: Number of passes of the value function over the rollout, per policy update
    :param gae_lambda: Trade-off of bias against variance in Generalized Advantage Estimation
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE)
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE (-1: only at the start of the rollout)
    :param rollout_buffer_class: Rollout buffer class to use. If ``None``, it is selected automatically
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param normalize_advantage: Whether to normalize the advantage
    :param target_kl: Radius of the trust region, a number or a schedule; ``"auto"`` for one that falls linearly to zero, so
        that the KL of all updates of a training adds up to one nat per action dimension, or in a longer training to one for
        each 250,000 steps. ``learn(..., reset_num_timesteps=False)`` after its end spends as much per step
    :param sub_sampling_factor: Take the Fisher matrix on every k-th sample only. Gradient, objective and KL always see
        the whole rollout (sb3-contrib thins them too). ``None`` for every sample of a rollout of less than 49,152, and for
        at least 16,384 of a longer one
    :param stats_window_size: Number of episodes that the reported means are taken over
    :param tensorboard_log: The log location for TensorBoard (if ``None``, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 no output, 1 info, 2 debug
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param ent_coef: Weight of the entropy in the objective, a number or a schedule
    :param cg_tolerance: Conjugate gradient ends when its residual relative to the gradient is below this
    :param trust_region: ``"constraint"`` for TRPO, or ``"penalty"`` for the penalized form (Schulman et al. 2017, section 4:
        ``surrogate - beta KL`` by Adam, where beta adapts so that the KL comes out near ``target_kl``)
    :param trust_region_kwargs: Options of :class:`~sb3_trpo_ext.optim.KLConstraint` (``fill``, ``damped_scale``,
        ``precondition``) or :class:`~sb3_trpo_ext.optim.AdaptiveKLPenalty` (``learning_rate``, ``n_epochs``, ``batch_size``,
        ``beta``)
    :param vf_lambda: Like ``gae_lambda``, for the targets of the value function, which are TD(lambda) returns; ``None`` for
        the same number, as in SB3
    :param vf_loss: ``"mse"``, or ``"huber"``, which is linear in errors of the values above 1
    :param clip_range_vf: Values farther than this from those of the rollout are not fitted any further (as in SB3's PPO; it
        depends on the scaling of the rewards), a number or a schedule; ``None`` for no limit
    :param max_grad_norm: Maximum norm of the value function's gradient, ``None`` or 0 for no limit. (For weight decay pass
        ``policy_kwargs=dict(optimizer_class=th.optim.AdamW)``: the policy's optimizer makes the value function's steps.)
    :param clipped_likelihood: Whether the likelihood of a continuous action is that of the action the environment gets,
        clipped to the bounds of the action space: the same gradient on average, with less noise (Fujita and Maeda 2018,
        https://arxiv.org/abs/1802.07564). If not, it is that of the Gaussian, as elsewhere
    :param clip_advantage: The normalized advantages are clipped to plus or minus this many standard deviations, and normalized
        again; ``None`` for no limit. Where a few of them are very large (falls), their noise hides the others
        (Garg et al. 2021, https://arxiv.org/abs/2102.10264)
    :param norm_obs: Whether the policy normalizes observations that are vectors, by statistics that are saved with it and
        change only between an update and the next rollout, and scales one-hot vectors by the square root of their length.
        ``"auto"``: with SB3's policies and features extractors, unless the environment is wrapped in a ``VecNormalize`` that
        does it
    :param stagger_episodes: Whether to desynchronize environments whose episodes begin and end together: after each of the
        first rollouts some begin a new episode, and no sample is lost. In ``DummyVecEnv``, ``SubprocVecEnv``,
        ``EnvPoolVecEnv``, ``VectorEnvAdapter`` and environments of tensors, without wrappers. ``"auto"``: where ``n_steps``
        is left to the class
    :param norm_reward: Whether rewards are divided by the standard deviation of the discounted return. ``"auto"``: unless a
        ``VecNormalize`` does it
    :raises ValueError: for a bad argument, with its name
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = POLICY_ALIASES
    #: The class of sb3-contrib whose policies this class is for.
    policy_base: ClassVar[str | None] = None

    @explaining_names
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | VectorEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int | None = None,
        batch_size: int | None = None,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float | Schedule | str = "auto",
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.9,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float | Schedule | str = "auto",
        sub_sampling_factor: int | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        ent_coef: float | Schedule = 0.0,
        cg_tolerance: float = 0.1,
        trust_region: str = "constraint",
        trust_region_kwargs: dict[str, Any] | None = None,
        vf_lambda: float | None = 0.95,
        vf_loss: str = "mse",
        clip_range_vf: float | Schedule | None = None,
        max_grad_norm: float | None = None,
        clipped_likelihood: bool = True,
        clip_advantage: float | None = None,
        norm_obs: bool | str = "auto",
        norm_reward: bool | str = "auto",
        stagger_episodes: bool | str = "auto",
    ):
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,  # type: ignore[arg-type]
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=0.0,  # may be a schedule, which the base class does not know: set below
            vf_coef=0.0,  # no common loss: the value function is fitted after the policy's update
            max_grad_norm=max_grad_norm,  # type: ignore[arg-type]
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=env.device if device == "auto" and isinstance(env, TensorVecEnv) else launch.rank_device(device),
            seed=seed,
            _init_setup_model=False,
        )
        self.batch_size: int = batch_size  # type: ignore[assignment]
        self.normalize_advantage = normalize_advantage
        self.n_critic_updates = n_critic_updates
        self.target_kl = target_kl
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping
        self.cg_tolerance = cg_tolerance
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.sub_sampling_factor = sub_sampling_factor
        self.ent_coef = ent_coef  # type: ignore[assignment]
        self.trust_region = trust_region
        self.trust_region_kwargs = trust_region_kwargs or {}
        self.vf_lambda = vf_lambda
        self.vf_loss = vf_loss
        self.clip_range_vf = clip_range_vf
        self.clipped_likelihood = clipped_likelihood
        self.clip_advantage = clip_advantage
        self.norm_obs = norm_obs
        self.norm_reward = norm_reward
        self.stagger_episodes = stagger_episodes
        #: Whether actor and critic have a features extractor each by default; not in models of earlier versions.
        self._own_extractors = True
        #: `n_steps` and `batch_size` as the class chose them; None if the user did.
        self._auto_n_steps: int | None = None
        self._auto_batch_size: int | None = None
        self.kl_penalty: AdaptiveKLPenalty | None = None
        self._stagger = Stagger()
        #: The policy that acted in the last rollout; None if there was none, or another loop collected it.
        self._acted: Snapshot | None = None
        #: KL that `target_kl="auto"` gave the updates so far and they did not use.
        self._unspent_kl = 0.0
        #: Timesteps before the training that this budget is for.
        self._budget_start = 0
        #: Number of updates that moved the policy, out of `_n_updates`.
        self._n_accepted = 0
        #: Where the last line searches ended, as a share of the full step: where the next one starts.
        self._step_share = 1.0

        if _init_setup_model:
            self._setup_model()

    @staticmethod
    def _wrap_env(env: GymEnv | VectorEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """
        Wrap an environment as SB3 does, and explain what is wrong with one that SB3 does not know.

        :param env: what the user gave
        :param verbose: verbosity level
        :param monitor_wrapper: whether to wrap it in a ``Monitor``
        :return: the environment as a ``VecEnv``
        :raises ValueError: if SB3 does not support it
        """
        arguments.check_env(env)
        if isinstance(env, VectorEnv):
            env = VectorEnvAdapter(env)
        return OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        """The policy of a name; raises a ``ValueError`` if there is none."""
        if policy_name not in self.policy_aliases:
            suggestion = closest(policy_name, self.policy_aliases)
            raise ArgumentError(f"`policy`: {type(self).__name__} has no policy {policy_name!r}; {suggestion}")
        return super()._get_policy_from_name(policy_name)

    def _maybe_recommend_cpu(self, mlp_class_name: str = "ActorCriticPolicy") -> None:
        """Recommend the CPU for MLPs, as SB3 does, but not where the environments are on the device too."""
        if not isinstance(self.env, TensorVecEnv):
            super()._maybe_recommend_cpu(mlp_class_name)

    def _setup_model(self) -> None:
        """Check the arguments, and create buffer, policy and optimizer."""
        arguments.check_policy(self.policy_class, self.policy_base)
        arguments.check_settings(self)
        if isinstance(self.action_space, (spaces.Tuple, spaces.Dict)):
            arguments.check_mixed_actions(self)
            self.action_space = MixedActions(self.action_space)
        launch.join_process_group()
        has_batch_size = self.batch_size is not None and self.batch_size != self._auto_batch_size
        if self.n_steps is None or self.n_steps == self._auto_n_steps:
            size = self.batch_size if has_batch_size else defaults.MIN_BATCH_SIZE
            self.n_steps = self._auto_n_steps = defaults.n_steps(self.n_envs, size, world_size())
        if not has_batch_size:
            self.batch_size = self._auto_batch_size = defaults.batch_size(self.n_steps * self.n_envs)
        arguments.check_arguments(self)
        self.norm_obs = defaults.normalizes_observations(self.norm_obs, self.policy_class, self.policy_kwargs, self.env)
        self.norm_reward = defaults.normalizes_rewards(self.norm_reward, self.env)
        given = self.policy_kwargs
        self.policy_kwargs = defaults.policy_kwargs(given, self.policy_class, self.norm_obs, self._own_extractors)
        self._setup_policy()
        self._fit_buffer_to_env()
        self.policy_kwargs = given
        if is_known(self.policy_class):
            defaults.spread_over_bounds_(self.policy, with_std="log_std_init" not in given)
        self.reward_scale = RewardScale(self.gamma)
        self._normalization = Normalization(self.policy, self.reward_scale if self.norm_reward else None)
        self.policy.optimizer = fast_optimizer(self.policy, self.lr_schedule(1))
        if self.trust_region == "penalty":
            if not family_of(self.policy.action_dist).is_batched:
                raise ArgumentError(
                    f"`trust_region='penalty'` needs a distribution that can be cut into minibatches, and "
                    f"{type(self.policy.action_dist).__name__} is not one of those: use `trust_region='constraint'`, or "
                    "register a family for it with `sb3_trpo_ext.register_family`."
                )
            self.kl_penalty = AdaptiveKLPenalty(list(self.policy.parameters()), **self.trust_region_kwargs)
        self._watch = PolicyWatch(self.calls_class)
        self._watch.try_parts(self.policy)
        self._acted = None

    def _setup_policy(self) -> None:
        """Create buffer, policy and optimizer as SB3 does."""
        given = self.policy_class
        if isinstance(self.action_space, MixedActions):
            self.policy_class = mixed_policy(self.policy_class)
        super()._setup_model()
        self.policy_class = given

    def _fit_buffer_to_env(self) -> None:
        """
        Have tensors in the rollout buffer if the environment has tensors, and arrays if not.

        :raises ValueError: if the environment's tensors are on another device than the policy
        """
        own: Any = self.rollout_buffer_class
        is_on_device = isinstance(self.env, TensorVecEnv) and is_known(own) and self.policy_base is None
        if is_on_device:
            arguments.check_device(self.env, self.device)
        if is_on_device == isinstance(self.rollout_buffer, TensorRolloutBuffer):
            return
        kind = TensorRolloutBuffer if is_on_device else own
        self.rollout_buffer = kind(
            self.n_steps,
            self.observation_space,
            self.action_space,
            device=self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
            **({} if is_on_device else self.rollout_buffer_kwargs),
        )

    def set_env(self, env: GymEnv | VectorEnv, force_reset: bool = True) -> None:
        """
        Replace the training environment.

        :param env: the environment, with the same spaces and the same number of environments
        :param force_reset: whether to reset it before the next rollout
        :raises ValueError: if its spaces are others, or its tensors on another device than the policy
        """
        super().set_env(env, force_reset)  # type: ignore[arg-type]
        self._fit_buffer_to_env()

    @property
    def _parts(self) -> PolicyParts:
        """Actor and critic of the policy as it is now."""
        penalty = [] if self.kl_penalty is None else [self.kl_penalty.optimizer]
        return self._watch.parts(self.policy, [self.policy.optimizer, *penalty], self._last_obs)

    def _check_ready(self) -> None:
        """
        Check, before a rollout or an update, what may have changed since the model was made.

        :raises ValueError: for a bad argument, or if no parameter of the policy requires a gradient
        """
        arguments.check_settings(self)
        if (self.trust_region == "penalty") != (self.kl_penalty is not None):
            raise ArgumentError(
                f"`trust_region` has become {self.trust_region!r}, which is decided when a model is made: save it, and load "
                f"it with trust_region={self.trust_region!r}."
            )
        self._normalization.check(self)
        if not self._parts.actor_params and not self._parts.critic_params:
            raise ArgumentError(
                f"No parameter of {type(self.policy).__name__} that actions or values depend on requires a gradient: there is "
                "nothing to train."
            )

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Collect experiences; see :mod:`sb3_trpo_ext.rollout.collect`.

        :param env: The training environment
        :param callback: Callback that is called at each step
        :param rollout_buffer: Buffer to fill
        :param n_rollout_steps: Number of steps to collect per environment
        :return: False if the callback ended the training
        :raises ValueError: if there is nothing to train, or if the environment returned a NaN, an infinity or a wrong shape
            that stopped the policy
        :raises RuntimeError: if a process of the environment has died
        """
        self._check_ready()
        is_staggered = self.n_steps == self._auto_n_steps if self.stagger_episodes == arguments.AUTO else self.stagger_episodes
        self._stagger.before_rollout(self)
        rewards = self._normalization.begin_rollout(self.policy, isinstance(rollout_buffer, TensorRolloutBuffer))
        is_full = self._collect(env, callback, rollout_buffer, n_rollout_steps, self._complete, rewards)
        if is_full and is_staggered:
            self._stagger.after_rollout(self, rollout_buffer)
        return is_full and not (isinstance(callback, launch.RankCallback) and callback.is_over)

    def _collect(self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, *args: Any) -> bool:
        """Fill the buffer, with the arguments of :func:`~sb3_trpo_ext.rollout.collect.collect_rollouts`."""
        is_on_device = isinstance(rollout_buffer, TensorRolloutBuffer)
        rollout_class = functools.partial(TensorRollout, scale=self._normalization.scale) if is_on_device else None
        return collect_rollouts(self, env, callback, rollout_buffer, *args, rollout_class=rollout_class)

    def _complete(self, rollout_buffer: RolloutBuffer, acted: Snapshot) -> None:
        """
        Normalize a full buffer and compute the critic's targets, before a callback's ``on_rollout_end`` that may change them.

        :param rollout_buffer: full
        :param acted: the policy that filled it
        """
        self._acted = acted
        if self._normalization.after_rollout(self, rollout_buffer, acted.is_of(self.policy)):
            self._acted = Snapshot(self.policy)
        set_returns_(self, rollout_buffer, self.vf_lambda)

    def _last_values(self) -> th.Tensor:
        """The values after the last step of a rollout, shape ``(n_envs, 1)``."""
        return self.policy.predict_values(obs_as_tensor(self._last_obs, self.device))  # type: ignore[arg-type]

    def _renew_states(self, buffer: RolloutBuffer) -> None:
        """Recompute a recurrent policy's states in a rollout, after the statistics of observations have changed."""

    def _terminal_value(self, buffer: RolloutBuffer, step: int, index: int, observation: Any) -> float:
        """The value of the last observation of an episode that a time limit ended in a step of a rollout."""
        return float(self.policy.predict_values(self.policy.obs_to_tensor(observation)[0]))

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed the random generators of PyTorch, NumPy, Python and the environments, differently in each process.

        :param seed: of the first process
        """
        super().set_random_seed(launch.rank_seed(check_seed(seed)))

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """Compute the progress remaining, from 1 to 0."""
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may go past the end, where SB3's becomes negative, and with it a schedule that decays to zero
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def train(self) -> None:
        """Update the policy within the trust region, then fit the critic, on the rollouts in the buffers of all processes."""
        self._check_ready()
        # All schedules before anything moves: a bad value must not leave half an update
        arguments.scheduled("learning_rate", self.lr_schedule, self._current_progress_remaining, 0.0)
        n_samples = self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs
        shares = Shares.of(n_samples)
        ent_coef, cg_damping = self._scheduled("ent_coef"), self._cg_damping()
        target_kl = self._target_kl(shares.total(n_samples))
        clip_range_vf = None if self.clip_range_vf is None else self._scheduled("clip_range_vf", 0.0)
        fit = CriticFit(self.n_critic_updates, self.batch_size, self.vf_loss, clip_range_vf, self.max_grad_norm or None)
        # As during the rollout: dropout or BatchNorm in training mode would make the ratio differ from 1 before any step
        self.policy.set_training_mode(False)
        self._update_learning_rate(self.policy.optimizer)
        self._normalization.before_update(self, is_known_loop=self._acted is not None)
        batch, calls = self._full_batch(), self.calls_class.on(self.policy, self.rollout_buffer)
        parts = self._watch.parts_after(self.policy, batch.observations)
        started = time.perf_counter()
        result, entropy, std = self._no_update(UpdateStatus.NOTHING_TO_TRAIN), math.nan, math.nan
        # The likelihood of clipped actions is not in the buffer: the current policy gives it, if it is the one that acted
        has_acted = self._acted is not None and self._acted.is_of(self.policy)
        is_clipped = self.clipped_likelihood and (has_acted or self._acted is None)
        if parts.actor_params:
            with no_argument_checks, twice_differentiable_attention:
                surrogate = Surrogate(
                    self.policy,
                    parts.actor_params,
                    batch,
                    ent_coef=ent_coef,
                    fisher_stride=self._fisher_stride(shares.total(n_samples)),
                    noise_seed=self._n_updates * world_size() + rank(),
                    bounds=action_bounds(self.policy) if is_clipped else None,
                    shares=shares,
                    calls=calls,
                )
                if has_acted:
                    warn_if_another(self.policy, surrogate.deviation, calls, batch)
                result = self._update_policy(surrogate, target_kl + self._carried_kl(target_kl), cg_damping)
                entropy, std = surrogate.summary()
        policy_done = time.perf_counter()
        critic = fit_critic(self.policy, parts.critic_params, parts.critic_modules, batch, fit, shares, calls)
        critic_done = time.perf_counter()
        drop_graph_(self.policy.action_dist)
        self._normalization.after_update(self)
        self._n_updates += 1
        self._n_accepted += result.is_accepted
        self._unspent_kl += target_kl - result.kl
        warn_if_rejected(result, critic)
        record_update(self.logger, result, critic)
        self.logger.record("train/entropy", entropy)
        if not math.isnan(std):
            self.logger.record("train/std", std)
        values, returns = (th.as_tensor(part).flatten() for part in (self.rollout_buffer.values, self.rollout_buffer.returns))
        self.logger.record("train/explained_variance", launch.joint_explained_variance(values, returns))
        self.logger.record("train/n_accepted", self._n_accepted)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("time/policy_update", policy_done - started)
        self.logger.record("time/critic_update", critic_done - policy_done)
        launch.check_identical(self)

    def _full_batch(self) -> Batch:
        """The whole rollout in the buffer, with its advantages normalized and clipped."""
        is_discrete = isinstance(self.action_space, spaces.Discrete)
        return rollout_batch(self.rollout_buffer, is_discrete, self.normalize_advantage, self.clip_advantage)

    def _scheduled(self, name: str, minimum: float = -math.inf) -> float:
        """Current value of an argument that may be a schedule."""
        return arguments.scheduled(name, getattr(self, name), self._current_progress_remaining, minimum)

    def _cg_damping(self) -> float:
        """Current damping of the Fisher matrix."""
        if self.cg_damping != arguments.AUTO:
            return self._scheduled("cg_damping", 0.0)
        return defaults.CG_DAMPING * get_action_dim(self.action_space)

    def _fisher_stride(self, n_samples: int) -> int:
        """The k of the Fisher matrix, which is computed on every k-th sample."""
        return self.sub_sampling_factor or defaults.sub_sampling_factor(n_samples)

    def _carried_kl(self, target_kl: float) -> float:
        """KL that earlier updates left unused and that this one may spend."""
        is_budget = self.target_kl == arguments.AUTO
        return min(max(self._unspent_kl, 0.0), defaults.MAX_CARRY * target_kl) if is_budget else 0.0

    def _target_kl(self, n_samples: int) -> float:
        """Current radius of the trust region on so many samples, without what is carried over."""
        if self.target_kl != arguments.AUTO:
            return self._scheduled("target_kl", 0.0)
        progress, total_timesteps = self._current_progress_remaining, self._total_timesteps
        return defaults.target_kl(self.action_space, n_samples, total_timesteps, progress, self._budget_start)

    def _no_update(self, status: UpdateStatus) -> UpdateResult:
        """The result of an update that was not made."""
        return UpdateResult(status, math.nan, math.nan, beta=None if self.kl_penalty is None else self.kl_penalty.beta)

    def _update_policy(self, surrogate: Surrogate, target_kl: float, cg_damping: float) -> UpdateResult:
        """
        Take one step within the trust region.

        :param surrogate: objective and KL of the rollout
        :param target_kl: the region's radius; 0 for no step
        :param cg_damping: added to the diagonal of the Fisher matrix
        :return: what happened
        """
        self.logger.record("train/target_kl", target_kl)
        if target_kl == 0:
            # Where a schedule that decays to zero ends
            return self._no_update(UpdateStatus.ZERO_TARGET_KL)
        update: PolicyUpdate
        if self.kl_penalty is not None:
            update = self.kl_penalty
        else:
            self.logger.record("train/cg_damping", cg_damping)
            update = KLConstraint(
                cg_max_steps=self.cg_max_steps,
                cg_tolerance=self.cg_tolerance,
                cg_damping=cg_damping,
                shrinking_factor=self.line_search_shrinking_factor,
                max_trials=self.line_search_max_iter,
                first_trial=self._step_share if self.trust_region_kwargs.get("fill", True) else 1.0,
                **self.trust_region_kwargs,
            )
        result = update.update(surrogate, target_kl)
        if result.step_share > 0:
            # The error of the KL's quadratic model changes slowly: started at an average, most searches need one trial
            self._step_share = math.sqrt(self._step_share * result.step_share)
        return result

    def learn(
        self: SelfTRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "TRPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfTRPO:
        """
        Train the model; under ``torchrun``, together with the other processes.

        :param total_timesteps: The total number of environment steps, of all processes
        :param callback: Callback(s) called at every step
        :param log_interval: The number of updates between two logs
        :param tb_log_name: The name of the run for TensorBoard
        :param reset_num_timesteps: Whether to start counting timesteps at zero
        :param progress_bar: Display a progress bar using tqdm and rich
        :return: the trained model
        """
        if is_parallel():
            # The first process decides for how long: it may have loaded a checkpoint
            total_timesteps, log_interval, reset_num_timesteps = launch.start_together(
                self, (total_timesteps, log_interval, reset_num_timesteps)
            )
            callback, progress_bar = launch.RankCallback(launch.running_statistics(self), callback, progress_bar), False
        if reset_num_timesteps or self.num_timesteps >= self._total_timesteps:
            # Not where a training was interrupted: it goes on with what it has left
            self._unspent_kl, self._budget_start = 0.0, 0 if reset_num_timesteps else self.num_timesteps
        if was_interrupted(self.env):
            # SB3 resets the environments then
            self._last_obs = None
        if reset_num_timesteps or self._last_obs is None:
            self.reward_scale.start_episodes()
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def observe(self, observations: Any) -> None:
        """
        Add observations to the statistics that normalize them, such as those of demonstrations before a pretraining.

        :param observations: as the environment returns them: an array or a tensor of shape ``(..., *shape)``, or a dict of
            those
        """
        for extractor in normalized_extractors(self.policy):
            extractor.update(observations)
