"""The command ``sb3-trpo compare``: trains several algorithms with several seeds on one task, and compares them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.progress import Progress, TaskID

from sb3_trpo_ext._files import write_json
from sb3_trpo_ext.callbacks import FILE_NAME, read_rows
from sb3_trpo_ext.tools.comparison_settings import Settings, find_settings, with_equal_kl
from sb3_trpo_ext.tools.comparison_table import as_markdown, draw_curves, make_table
from sb3_trpo_ext.zoo.runs import Run, RunError, read_run, reward_threshold
from sb3_trpo_ext.zoo.settings import KEY, as_option

#: Written last, and only after a training that ended by itself: RL-Zoo saves a model when it is interrupted, too.
DONE = "done.json"
POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One training: an algorithm with a seed."""

    algo: str
    env: str
    seed: int
    # All of its files are in here, and nothing else
    folder: Path
    command: list[str]
    # What the result depends on
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        """How the job is called in messages."""
        return f"{self.algo} seed {self.seed}"

    @property
    def log(self) -> Path:
        """What the training prints."""
        return self.folder / "output.txt"

    def run_folder(self) -> Path | None:
        """The folder that RL-Zoo has made, None before it has."""
        return min(self.folder.glob(f"{self.algo}/*_1"), default=None)

    def is_done(self) -> bool:
        """
        Whether the training has been finished with these settings.

        :raises ValueError: if it has been finished with others
        """
        try:
            before = json.loads((self.folder / DONE).read_text(encoding="utf-8"))["identity"]
        # Half a file: it was interrupted
        except (FileNotFoundError, ValueError):
            return False
        different = [key for key in self.identity | before if before.get(key) != self.identity.get(key)]
        if different:
            raise ValueError(
                f"{self.folder} was trained with other settings ({', '.join(different)}): take another --folder, or remove it"
            )
        return True

    def n_steps_done(self) -> int:
        """How far the training is, by its record of updates."""
        folder = self.run_folder()
        rows = [] if folder is None else read_rows(folder / FILE_NAME)
        return int(float(rows[-1].get("time/total_timesteps") or 0)) if rows else 0


def make_jobs(args: argparse.Namespace, settings: dict[str, Settings]) -> list[Job]:
    """
    All trainings of a comparison; the first seed of every algorithm comes first.

    :param args: of the command line
    :param settings: by algorithm
    :return: the jobs
    """
    options: dict[str, Any] = {"-n": args.n_timesteps, "--eval-freq": args.eval_freq, "--device": args.device}
    options |= {"--eval-episodes": args.eval_episodes} | ({"--vec-env": args.vec_env} if args.vec_env else {})
    jobs = []
    for seed in range(args.seeds):
        for algo in args.algos:
            folder = Path(args.folder) / args.env / algo / f"seed_{seed}"
            command = [sys.executable, "-m", "sb3_trpo_ext.zoo", "train", "--algo", algo, "--env", args.env]
            command += ["--seed", str(seed), "-f", str(folder), "--conf-file", str(folder / "settings.yml"), "--verbose", "0"]
            for option, value in (*options.items(), ("--gym-packages", args.gym_packages)):
                command += as_option(option, value)
            # As JSON has it, which makes lists of tuples
            identity = json.loads(json.dumps({**options, "settings": settings[algo].entry}, default=str))
            jobs.append(Job(algo, args.env, seed, folder, command, identity))
    return jobs


def start(job: Job, lock: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """
    Start a training from scratch, in a process group of its own, so that Ctrl-C reaches us alone.

    :param job: the training
    :param lock: file descriptors that it keeps open
    :return: its process
    """
    # What an interrupted training has left
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    entries = {job.env: job.identity["settings"]}
    (job.folder / "settings.yml").write_text(yaml.safe_dump(entries), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with job.log.open("wb") as log:
        return subprocess.Popen(
            job.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True, pass_fds=lock
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a training and everything that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[tuple[int, ...]]:
    """
    Keep a second comparison out of a folder, also while trainings of a first one that was killed are still at work in it.

    :param folder: the folder
    :return: a file descriptor for the trainings, none where there are no such locks
    :raises ValueError: if the folder is in use
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield ()
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"--folder: another comparison is at work in {folder}: wait, or take another one") from error
        yield (file.fileno(),)


@contextlib.contextmanager
def noted_interruptions() -> Iterator[list[int]]:
    """
    Note Ctrl-C and SIGTERM instead of raising an error.

    A training that has been started and is not yet known as running would outlive us, and keep the folder locked.

    :return: the signals that came
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run_jobs(jobs: Sequence[Job], n_parallel: int, n_timesteps: int, lock: tuple[int, ...]) -> list[str]:
    """
    Run trainings side by side, with a display of their progress.

    :param jobs: the trainings that are left to do
    :param n_parallel: how many at a time
    :param n_timesteps: of each, for the display
    :param lock: passed on to the trainings
    :return: a line for each training that crashed
    :raises KeyboardInterrupt: after Ctrl-C and SIGTERM, when all trainings have been ended
    """
    waiting = list(jobs)
    running: dict[Job, tuple[subprocess.Popen[bytes], TaskID, float]] = {}
    crashed: list[str] = []
    with noted_interruptions() as came, Progress(disable=not sys.stdout.isatty()) as progress:
        total = progress.add_task("trainings", total=len(jobs))
        try:
            while waiting or running:
                while waiting and len(running) < n_parallel and not came:
                    job = waiting.pop(0)
                    bar = progress.add_task(job.name, total=n_timesteps)
                    running[job] = (start(job, lock), bar, time.perf_counter())
                time.sleep(POLL_SECONDS)
                if came:
                    raise KeyboardInterrupt
                for job, (process, bar, started) in list(running.items()):
                    progress.update(bar, completed=min(job.n_steps_done(), n_timesteps))
                    if process.poll() is None:
                        continue
                    del running[job]
                    progress.remove_task(bar)
                    progress.advance(total)
                    if process.returncode == 0 and job.run_folder() is not None:
                        seconds = time.perf_counter() - started
                        write_json(job.folder / DONE, {"seconds": seconds, "identity": job.identity})
                        n_done = len(jobs) - len(waiting) - len(running)
                        message = f"finished {job.name} in {seconds:.0f} s ({n_done} of {len(jobs)})"
                    else:
                        message = f"{job.name} crashed: {last_line(job.log)} (see {job.log})"
                        crashed.append(message)
                    progress.console.print(message, highlight=False, soft_wrap=True)
        finally:
            for process, _, _ in running.values():
                stop(process)
    return crashed


def last_line(path: Path) -> str:
    """The last line of what a training has printed."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it printed nothing"


def read_result(job: Job) -> Run:
    """
    What a finished training has left.

    :param job: the training
    :return: its run, with evaluations
    :raises RunError: if a file is missing or damaged
    """
    run = read_run(job.run_folder() or job.folder)
    if len(run.evaluations.steps) == 0:
        raise RunError(f"there are no evaluations in {run.folder}: remove it, and run the same command again")
    return run


def write_comparison(
    args: argparse.Namespace, jobs: Sequence[Job], settings: dict[str, Settings], crashed: Sequence[str]
) -> None:
    """
    Write ``comparison.md``, ``comparison.csv`` and ``learning_curves.png``, and print the table.

    :param args: of the command line
    :param jobs: all trainings
    :param settings: by algorithm
    :param crashed: lines about those that crashed
    """
    results: dict[str, list[Run]] = {algo: [] for algo in args.algos}
    for job in jobs:
        if job.is_done():
            results[job.algo].append(read_result(job))
    threshold = reward_threshold(args.env) if args.threshold is None else args.threshold
    table = make_table(results, threshold)
    title = f"{args.env}, {args.n_timesteps:,} steps"
    notes = [f"* {algo}: settings are {settings[algo].source}." for algo in args.algos]
    notes += [f"* {line}" for line in crashed]
    kind = "" if args.vec_env is None else f"Trained with `--vec-env {args.vec_env}`. "
    how = (
        f"{kind}Evaluations of {args.eval_episodes} episodes every {args.eval_freq:,} steps. Intervals are of a stratified "
        f"bootstrap over seeds. steps/s without evaluations, with up to {args.jobs} trainings at a time, one thread each."
    )
    text = f"# {title}\n\n{as_markdown(table)}\n\n{how}\n\n" + "\n".join(notes) + "\n"
    folder = Path(args.folder) / args.env
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    table.to_csv(folder / "comparison.csv", index=False)
    draw_curves(folder / "learning_curves.png", title, results, threshold)
    print(f"\n{text}\n  table            {folder / 'comparison.md'}\n  learning curves  {folder / 'learning_curves.png'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sb3-trpo compare",
        description="Train several algorithms with several seeds and compare them. Run the same command again to go on.",
    )
    algos, default = [KEY, "trpo", "ppo"], " (default: %(default)s)"
    algos_help = f"keys of the algorithms (default: {' '.join(algos)})"
    equal_kl_help = "give sb3-contrib's trpo our trust region and damping, in its units"
    vec_env_help = "kind of environments to train in (default: RL-Zoo's)"
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("--algos", nargs="+", default=algos, metavar="ALGO", help=algos_help)
    parser.add_argument("--seeds", type=int, default=5, help=f"number of seeds, from 0 on{default}")
    parser.add_argument("-n", "--n-timesteps", type=int, required=True, help="steps of each training")
    parser.add_argument("--jobs", type=int, default=2, help=f"trainings at a time, one core each{default}")
    parser.add_argument("--equal-kl", action="store_true", help=equal_kl_help)
    parser.add_argument("--threshold", type=float, help="return for `steps to` (default: the registry's)")
    parser.add_argument("--eval-freq", type=int, help="steps between evaluations (default: a twentieth of the training)")
    parser.add_argument("--eval-episodes", type=int, default=10, help=f"episodes of an evaluation{default}")
    parser.add_argument("-f", "--folder", default="comparisons", help=f"where the trainings and the table go{default}")
    parser.add_argument("--device", default="cpu", help=f"device of the policies{default}")
    parser.add_argument("--vec-env", choices=("dummy", "subproc", "envpool"), help=vec_env_help)
    parser.add_argument("--gym-packages", nargs="+", default=[], help="modules that register environments")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run what is left of a comparison, and write its table.

    :param argv: the arguments, those of the process if None
    :raises ValueError: for arguments that do not go together
    """
    args = _parser().parse_args(argv)
    for option in ("seeds", "n_timesteps", "jobs", "eval_episodes"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")
    if args.eval_freq is None:
        args.eval_freq = max(args.n_timesteps // 20, 1)
    if not 1 <= args.eval_freq <= args.n_timesteps:
        raise ValueError(f"--eval-freq must be between 1 and --n-timesteps, got {args.eval_freq}")
    # Each once
    args.algos = list(dict.fromkeys(args.algos))
    settings = {algo: find_settings(algo, args.env) for algo in args.algos}
    if args.equal_kl:
        if "trpo" not in settings:
            raise ValueError("--equal-kl converts the settings of sb3-contrib's trpo, which is not among --algos")
        settings["trpo"] = with_equal_kl(settings["trpo"], args.env)
    jobs = make_jobs(args, settings)
    try:
        with locked(Path(args.folder) / args.env) as lock:
            # Not before: another comparison may just have finished one
            left = [job for job in jobs if not job.is_done()]
            print(f"{len(jobs)} trainings, {len(jobs) - len(left)} of them finished before", flush=True)
            crashed = run_jobs(left, args.jobs, args.n_timesteps, lock)
            if any(job.is_done() for job in jobs):
                write_comparison(args, jobs, settings, crashed)
    except KeyboardInterrupt:
        print("sb3-trpo compare: interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    if crashed:
        raise SystemExit(1)
