"""
RL-Zoo's experiment manager with what this package adds to it.

What is replaced in RL-Zoo, all of it:

* ``rl_zoo3.train.ExperimentManager``, by :class:`Manager`. RL-Zoo's ``train`` looks the name up when it makes its manager, so
  that a plugin can set it after the script has started.
* Entries of RL-Zoo's public dictionaries ``ALGOS``, ``HYPERPARAMS_SAMPLER`` and ``HYPERPARAMS_CONVERTER``.
* ``create_test_env``, by ``sb3-trpo`` while it runs a script with ``--algo trpo_ext_mask``: see :mod:`sb3_trpo_ext.zoo.masks`.
* ``subprocess.call``, by ``sb3-trpo record-training`` alone while it runs: RL-Zoo's script starts ``python -m
  rl_zoo3.record_video``, which knows neither our class nor the modules of ``--gym-packages``, and may be another Python.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import rl_zoo3.train
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_trpo_ext import TRPO, TrainingRecorder
from sb3_trpo_ext.arguments import AUTO
from sb3_trpo_ext.callbacks import TimedEvalCallback
from sb3_trpo_ext.envs import EnvPoolVecEnv
from sb3_trpo_ext.envs.jax_envs import LIBRARIES
from sb3_trpo_ext.parallel.launch import attempt, is_launched, is_one_machine
from sb3_trpo_ext.parallel.reductions import rank, world_size
from sb3_trpo_ext.recurrent import RecurrentTRPO
from sb3_trpo_ext.zoo.launches import Launch
from sb3_trpo_ext.zoo.masks import MaskedAgent, remember
from sb3_trpo_ext.zoo.options import Training, simulator_of
from sb3_trpo_ext.zoo.resume import (
    Checkpoint,
    drop_later_episodes,
    folder_of_launch,
    last_checkpoint,
    mark_folder,
    restore_evaluations,
    statistics_of,
)
from sb3_trpo_ext.zoo.search_space import convert_trpo_params, sample_recurrent_params, sample_trpo_params
from sb3_trpo_ext.zoo.settings import KEY, LSTM_KEY, MASK_KEY, SCHEDULED, check_names, linear_schedule


class Manager(ExperimentManager):
    """
    RL-Zoo's experiment manager with schedules, checked names, a record of each update, EnvPool, resuming and ``torchrun``.

    :param args: those of RL-Zoo's manager, as are ``kwargs``
    :param training: what our own options ask for
    """

    def __init__(self, *args: Any, training: Training | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.training = Training() if training is None else training
        self._checkpoint: Checkpoint | None = None
        self._launch = Launch()
        #: Library and name of an environment of Brax or of MuJoCo Playground.
        self._simulator = simulator_of(self.env_name.gym_id)

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """Set up a new run, or the one to continue."""
        folder = self.training.folder
        # On several machines the id of a launch is the user's choice: with the same one the same run continues
        if folder is None and is_launched() and (attempt() > 0 or not is_one_machine()):
            folder = folder_of_launch(self.log_path, self.env_name)
        # The other processes get the state of the first one
        if folder is not None and rank() == 0:
            self._go_to_checkpoint(folder)
        with self._launch.errors_noted():
            return super().setup_experiment()

    def _go_to_checkpoint(self, folder: Path) -> None:
        """Continue in the folder of an earlier run from its last checkpoint; without one, start again."""
        params_path = folder / self.env_name
        self.save_path, self.params_path = str(folder), str(params_path)
        self._checkpoint = checkpoint = last_checkpoint(folder, self.env_name)
        if checkpoint is None:
            return
        # Where RL-Zoo looks for the statistics of an agent that it trains further
        statistics = params_path / "vecnormalize.pkl"
        if checkpoint.statistics == statistics:
            # The next best agent overwrites this file, and the agent that we continue from needs its own
            shutil.copyfile(statistics, statistics_of(folder, checkpoint.num_timesteps))
        elif checkpoint.statistics is not None:
            shutil.copyfile(checkpoint.statistics, statistics)
        drop_later_episodes(folder, checkpoint.num_timesteps)
        self.trained_agent, self.continue_training = str(checkpoint.model), True
        print(f"Continuing from {checkpoint.model} after {checkpoint.num_timesteps:,} steps")

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the settings, check their names, and make the schedules that RL-Zoo does not make."""
        hyperparams, saved_hyperparams = super().read_hyperparameters()
        check_names(hyperparams, ALGOS[self.algo])
        # Other algorithms have texts of their own here, such as SAC's ent_coef="auto"
        for name in SCHEDULED if issubclass(ALGOS[self.algo], TRPO) else ():
            value = hyperparams.get(name)
            if isinstance(value, str) and value != AUTO:
                hyperparams[name] = linear_schedule(name, value)
        return hyperparams, saved_hyperparams

    def create_log_folder(self) -> None:
        """
        Make the folder of the run, in the first process only; before that, check the settings for EnvPool.

        :raises ImportError: if EnvPool is asked for and not installed
        :raises ValueError: if a setting needs environments in Python, or if EnvPool has no such task or option
        """
        if self._simulator is not None and (self.env_wrapper is not None or self.training.in_envpool):
            name = "env_wrapper" if self.env_wrapper is not None else "--vec-env"
            raise ValueError(f"`{name}`: environments of {self._simulator[0]} have none, they step together on one device")
        if self.training.in_envpool:
            if self.env_wrapper is not None:
                raise ValueError("`env_wrapper`: EnvPool's environments take none, use `vec_env_wrapper` or `--vec-env dummy`")
            # Refuses what EnvPool does not have
            self._make_envpool(None, range(self.n_envs)).close()
            # For `args.yml`, which tells how the agent was trained
            self.args.vec_env = "envpool"
        if rank() > 0:
            return
        super().create_log_folder()
        self._launch.begin(
            Path(self.save_path),
            get_device(self.device),
            command=self.training.command,
            algorithm=self.algo,
            env=self.env_name.gym_id,
            seed=self.seed,
        )
        if world_size() > 1:
            mark_folder(Path(self.save_path))

    def create_callbacks(self) -> None:
        """Make the callbacks, with a recorder, timed evaluations and statistics beside every checkpoint."""
        if rank() > 0:
            self.callbacks = []
            return
        recorders = [callback for callback in self.callbacks if isinstance(callback, TrainingRecorder)]
        if not recorders and issubclass(ALGOS[self.algo], OnPolicyAlgorithm) and not self.optimize_hyperparameters:
            self.callbacks.insert(0, TrainingRecorder(self.save_path))
        for recorder in recorders:
            recorder.folder = recorder.folder or Path(self.save_path)
        # RL-Zoo divides by the number of environments of one process
        for name in ("eval_freq", "save_freq"):
            if getattr(self, name) > 0:
                setattr(self, name, max(getattr(self, name) // world_size(), 1))
        given = list(self.callbacks)
        super().create_callbacks()
        for index, callback in enumerate(self.callbacks):
            if type(callback) is EvalCallback and callback not in given:
                self.callbacks[index] = self._timed(callback)
        for callback in self.callbacks:
            if isinstance(callback, CheckpointCallback):
                # An agent is useless without the statistics that its observations were normalized with
                callback.save_vecnormalize = True
        # When training is interrupted, RL-Zoo closes only its first callback, which it takes for the progress bar
        self.callbacks.sort(key=lambda callback: not isinstance(callback, ProgressBarCallback))

    def _timed(self, callback: EvalCallback) -> EvalCallback:
        """RL-Zoo's evaluation, timed; that of a resumed run continues its table."""
        timed = TimedEvalCallback(
            callback.eval_env,
            callback_on_new_best=callback.callback_on_new_best,
            n_eval_episodes=callback.n_eval_episodes,
            eval_freq=callback.eval_freq,
            log_path=self.save_path,
            best_model_save_path=callback.best_model_save_path,
            deterministic=callback.deterministic,
        )
        if self._checkpoint is not None:
            restore_evaluations(timed, self._checkpoint.num_timesteps)
        return timed

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """Make environments; EnvPool's are for training, and only the first process writes their episodes."""
        no_log = no_log or rank() > 0
        if keywords := self.monitor_kwargs.get("info_keywords"):
            # YAML has no tuples, and `Monitor` takes nothing else
            self.monitor_kwargs = {**self.monitor_kwargs, "info_keywords": tuple(keywords)}
        if self._checkpoint is not None:
            self.monitor_kwargs = {**self.monitor_kwargs, "override_existing": False}
            if not (no_log or eval_env):
                self._add_monitor_files(1 if self.training.in_envpool else n_envs)
        if self.training.in_envpool:
            in_envpool: Any = functools.partial(self._make_envpool, None if no_log else f"{self.save_path}/0")
            self.vec_env_class = DummyVecEnv if eval_env else in_envpool
        if self._simulator is not None:
            on_device: Any = functools.partial(self._make_simulator, self.eval_env_kwargs if eval_env else self.env_kwargs)
            self.vec_env_class = on_device
        env = super().create_envs(n_envs, eval_env, no_log)
        return remember(env) if eval_env else env

    def _add_monitor_files(self, n_files: int) -> None:
        """Begin the files that a resumed run does not have yet: SB3 writes no header into a file that goes on."""
        keywords = self.monitor_kwargs.get("info_keywords", ())
        for number in range(n_files):
            file = f"{self.save_path}/{number}.{Monitor.EXT}"
            if not Path(file).is_file():
                ResultsWriter(file, {"t_start": time.time(), "env_id": self.env_name.gym_id}, keywords).close()

    def _make_envpool(self, monitor_file: str | None, env_fns: Sequence[Any]) -> VecEnv:
        """Stand in for the class of RL-Zoo's ``VecEnv``, which is given a function for each environment."""
        kwargs = {**self.monitor_kwargs, **self.env_kwargs}
        return EnvPoolVecEnv(self.env_name.gym_id, len(env_fns), seed=self.seed, monitor_file=monitor_file, **kwargs)

    def _make_simulator(self, kwargs: dict[str, Any], env_fns: Sequence[Any]) -> VecEnv:
        """Stand in for the class of RL-Zoo's ``VecEnv``, for environments that step together on the device of the model."""
        assert self._simulator is not None
        library, name = self._simulator
        env: VecEnv = LIBRARIES[library](name, len(env_fns), device=get_device(self.device), **kwargs)
        return env

    def learn(self, model: BaseAlgorithm) -> None:
        """Train a model, or train a resumed one for the steps that are left."""
        self.training.has_begun = True
        self._launch.model = model
        learn: Callable[..., Any] = model.learn
        if self._checkpoint is not None:
            if model.num_timesteps >= self.n_timesteps:
                print(f"The run has already made its {self.n_timesteps:,} steps: ask for more with `-n`.")
            self._launch.steps_before = model.num_timesteps
            self.n_timesteps = max(self.n_timesteps - model.num_timesteps, 0)
            # RL-Zoo always starts counting at zero
            learn = functools.partial(learn, reset_num_timesteps=False)

        def watched(*args: Any, **kwargs: Any) -> None:
            try:
                learn(*args, **kwargs)
            except KeyboardInterrupt:
                # RL-Zoo catches it, and ends its first callback
                self._launch.end("interrupted")
                for callback in self.callbacks[1:]:
                    if hasattr(callback, "model"):
                        callback.on_training_end()
                raise

        with self._launch.errors_noted():
            # Of a model RL-Zoo uses only these three
            super().learn(SimpleNamespace(learn=watched, env=model.env, policy=model.policy))  # type: ignore[arg-type]
        self._launch.end("finished")

    def objective(self, trial: optuna.Trial) -> float:
        """Train for a trial of a search."""
        self.training.has_begun = True
        return super().objective(trial)

    def hyperparameters_optimization(self) -> None:
        """Search for hyperparameters."""
        optimize = optuna.study.Study.optimize
        # As above. Not in `objective`: with several jobs that runs in other threads, which Ctrl-C does not reach
        optuna.study.Study.optimize = self._launch.errors_noted()(optimize)  # type: ignore[method-assign]
        try:
            with self._launch.errors_noted():
                super().hyperparameters_optimization()
        finally:
            optuna.study.Study.optimize = optimize  # type: ignore[method-assign]
        self._launch.end("finished")

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """Save the agent, in the first process only."""
        if rank() == 0:
            super().save_trained_model(model)

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if rank() == 0:
            super()._save_config(saved_hyperparams)


def register(key: str = KEY, training: Training | None = None) -> None:
    """
    Make the classes of this package known to RL-Zoo, with their search spaces for Optuna and the manager that trains them.

    :param key: the name of TRPO for ``--algo``; an existing one is replaced in this process
    :param training: what our own options ask for
    """
    for name, algorithm in {key: TRPO, MASK_KEY: MaskedAgent, LSTM_KEY: RecurrentTRPO}.items():
        ALGOS[name] = algorithm
        HYPERPARAMS_SAMPLER[name] = sample_recurrent_params if algorithm is RecurrentTRPO else sample_trpo_params
        HYPERPARAMS_CONVERTER[name] = convert_trpo_params
    vars(rl_zoo3.train)["ExperimentManager"] = functools.partial(Manager, training=training)
