"""Write ``docs/throughput.md`` from the results of ``benchmarks/throughput.py``.

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
while their number is the same: a larger `batch_size` or fewer `n_critic_updates` shorten it.

In each step only the actor works. Values, log-probabilities and the bootstrap values of truncated episodes are computed
in batches when the rollout is over, and the buffer holds what SB3's loop would put there (`sb3_trpo_ext/rollouts.py`
says when that loop runs instead, and what callbacks see).

## Threads

The actor of a small MLP runs on one thread whatever `torch.set_num_threads` says; updates and the batches at the end of a
rollout use all threads. After a product on several threads OpenMP's threads go on waiting at full speed, on the cores that the
processes of `SubprocVecEnv` and the threads of EnvPool need. For networks that are larger, or no MLP, `OMP_NUM_THREADS=1` has
the same effect.
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


def main() -> None:
    """Write the page."""
    results = [json.loads(file.read_text()) for file in sorted((ROOT / "benchmarks" / "results").glob("throughput_*.json"))]
    page = HEAD + "".join(map(rate, results)) + SHARES + "".join(map(shares, results)) + TAIL
    (ROOT / "docs" / "throughput.md").write_text(page)


if __name__ == "__main__":
    main()
