"""Write ``docs/throughput.md`` from the results of ``throughput.py``, ``profile_learn.py`` and ``threads.py``.

python benchmarks/throughput_page.py
"""

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent

HEAD = """# Steps per second of the whole training

`learn()` of sb3-contrib's TRPO and of ours, alternating in one process: the same kind of vector environment, the same
networks, the same weights at the start of each repetition, the same critic epochs and minibatches, `target_kl` and
`cg_damping` converted to joint units; ours with the options shown. In the case with EnvPool in its name, ours has EnvPool and
sb3-contrib's `DummyVecEnv`, which is the faster of SB3's two for it. Ratios are medians of paired ratios (smallest and
largest in brackets): the machine is shared, and single times mean little. This page is written by
`python benchmarks/throughput_page.py` from `benchmarks/results/throughput_*.json`, which
`python benchmarks/throughput.py CASE --output FILE` writes.

| case | options | threads | steps/s, ours / sb3-contrib's | ratio | the environment alone |
|---|---|---|---|---|---|
"""

SHARES = """
## Where our time goes

Per cent of `learn()`.

| case | env.step | actor | buffer, callbacks | values, GAE | policy update | critic | rest |
|---|---|---|---|---|---|---|---|
"""

TAIL = """
The environment alone is the limit: what `DummyVecEnv` or `SubprocVecEnv` does without a policy, copies of observations
and infos included. The critic is the largest part that is left. Its Adam steps are matrix products that cannot be saved
while their number is the same: a larger `batch_size` or fewer `n_critic_updates` shorten it. With these settings, 640 steps on
8,192 samples have 0.5 to 0.65 ms of matrix products each (see [the update](performance.md)), 0.3 to 0.4 s together, and the
passes of the policy update take 0.1 s. EnvPool alone takes 1.4 s for as many steps: if nothing else took any time, nearly a
quarter of the wall clock would still not be env.step.

In each step only the actor works. Values, log-probabilities and the bootstrap values of truncated episodes are computed
in batches when the rollout is over, and the buffer holds what SB3's loop would put there (`sb3_trpo_ext/rollout/collect.py`
says when that loop runs instead, and what callbacks see).
"""

PROFILE = """
## What is left

Functions with the largest share of the time of `learn()` in {case}, by Python's profiler, each without what it calls
(`python benchmarks/profile_learn.py {case}`, {threads} threads).

| function | calls | per cent |
|---|---|---|
"""

PROFILE_TAIL = """
`_recv` waits for EnvPool's threads and `_send` hands them the actions; `mm` and `addmm` are the matrix products of the
updates, nearly all of them the critic's, and `linear` those of the actor's steps and of the line search.
"""

THREADS = """
## Threads

Ours with one thread of PyTorch and with two, alternating in one process (`python benchmarks/threads.py`): steps per second of
rollouts alone, seconds of the updates, and steps per second of all.

| case | threads | rollouts, steps/s | policy update, s | critic update, s | all, steps/s |
|---|---|---|---|---|---|
"""

THREADS_TAIL = """
So two threads on two cores: updates gain from them, and rollouts lose little or nothing, environments in processes or threads
of their own included. The reason is that the actor of a small MLP runs on one thread whatever `torch.set_num_threads` says;
only updates and the batches at the end of a rollout use all threads. After a product on several threads OpenMP's threads go on
waiting at full speed, on the cores that the processes of `SubprocVecEnv` and the threads of EnvPool need. For networks that
are larger, or no MLP, `OMP_NUM_THREADS=1` has the same effect.
"""


def rate(result: dict[str, Any]) -> str:
    """One row of the first table."""
    limits = [f"{result['env_only_steps_per_s'][name]:,.0f}" for name in ("ours", "theirs")]
    cells = [
        result["case"],
        ", ".join(f"`{key}={value}`" for key, value in result["options"].items()) or "none",
        str(result["threads"]),
        f"{result['ours_steps_per_s']:,.0f} / {result['theirs_steps_per_s']:,.0f}",
        f"**{result['ratio']:.2f}x** ({result['ratio_min']:.2f} to {result['ratio_max']:.2f})",
        " / ".join(limits),
    ]
    return "| " + " | ".join(cells) + " |\n"


def shares(result: dict[str, Any]) -> str:
    """One row of the second table."""
    parts = dict(result["shares"]["ours"])
    columns = (
        ("env_step",),
        ("actor_step",),
        ("buffer", "callbacks"),
        ("values_and_gae",),
        ("policy_update",),
        ("critic_update",),
    )
    cells = [result["case"]]
    cells += [f"{100 * sum(parts.get(name, 0.0) for name in column):.1f}" for column in (*columns, ("other",))]
    return "| " + " | ".join(cells) + " |\n"


def profile(result: dict[str, Any]) -> str:
    """The section with the profile."""
    page = PROFILE.format(case=result["case"], threads=result["threads"])
    for row in result["rows"]:
        name = row["function"] if row["calls"] is None else f"`{row['function']}`"
        page += f"| {name} | {row['calls'] or ''} | {100 * row['share']:.1f} |\n"
    return page + PROFILE_TAIL


def threads(result: dict[str, Any]) -> str:
    """The section on threads."""
    page = THREADS
    for case, by_threads in result["cases"].items():
        for n_threads, row in by_threads.items():
            cells = [case, n_threads, f"{row['rollout_steps_per_s']:,.0f}", f"{row['policy_update_s']:.3f}"]
            cells += [f"{row['critic_update_s']:.3f}", f"{row['steps_per_s']:,.0f}"]
            page += "| " + " | ".join(cells) + " |\n"
    return page + THREADS_TAIL


def main() -> None:
    """Write the page."""
    folder = ROOT / "benchmarks" / "results"
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("throughput_*.json"))]
    page = HEAD + "".join(map(rate, results)) + SHARES + "".join(map(shares, results)) + TAIL
    page += profile(json.loads((folder / "profile_humanoid-16-envpool.json").read_text()))
    page += threads(json.loads((folder / "threads.json").read_text()))
    (ROOT / "docs" / "throughput.md").write_text(page)


if __name__ == "__main__":
    main()
