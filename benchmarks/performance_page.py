"""Write ``docs/performance.md`` from the results of ``benchmarks/update.py``.

python benchmarks/performance_page.py
"""

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CASES = ("humanoid-8192", "humanoid-2048", "humanoid-65536", "images-1024", "cartpole-1024")

HEAD = """# Performance of one update

One `train()` of sb3-contrib's TRPO and one of ours on the same rollout and the same weights, alternating in one process, at
sb3-contrib's defaults with `target_kl` and `cg_damping` converted to joint units. Ours with the options shown; the critic
makes the same number of Adam steps on the same number of samples in both. After the first repetition our line search starts
where the ones before have ended, as it does in training. Ratios are medians of paired ratios (smallest and
largest in brackets): the machine is shared, and single times mean little. This page is written by
`python benchmarks/performance_page.py` from `benchmarks/results/update_*.json`, which
`python benchmarks/update.py CASE --output FILE` writes.

## Speed and memory

| case | options | actor, s | ratio | whole `train()`, s | ratio | memory of `train()`, MiB |
|---|---|---|---|---|---|---|
"""

QUALITY = """
## The step itself

Both steps rescaled to the same KL on the batch, and the surrogate's improvement on the batch itself and on fresh rollouts of
the old policy.

| case | in-sample, ours / theirs | fresh, ours / theirs | difference on fresh data |
|---|---|---|---|
"""

PHASES = """
## Where our actor's time goes

Milliseconds. A Fisher-vector product is compared with its matrix products done by themselves in the same run.

| case | first pass | Fisher-vector product | of the GEMM rate | preconditioner: build / apply | evaluation |
|---|---|---|---|---|---|
"""

TAIL = """
`first pass` is the forward and backward pass that gives the old statistics, the objective and its gradient; `evaluation` is
one trial of the line search: KL and objective of the whole batch. The preconditioner is built only where plain conjugate
gradient would need more products than that costs.

What is left of the whole `train()` is the critic, whose Adam steps on minibatches of 128 cannot be saved while their number is
the same. For the networks of humanoid-8192, one step is 96 MFLOP of matrix products (forward, and two products backward for
all layers but the first): 0.5 ms at the 190 GFLOP/s that large products reach on these two cores, and 0.65 ms for products of
that size done by themselves. Reading and writing 155,000 parameters, gradients and both moments of Adam takes another 0.05 to
0.1 ms. Our step takes {step_ms:.2f} ms. Larger minibatches (`batch_size`) or fewer epochs (`n_critic_updates`) are the way to
shorten it.
"""

SCALING = """
## How it grows

`python benchmarks/scaling.py` times `train()` on 1,024 to 131,072 samples and on networks of 64 to 1,024 units. Over the
larger half of the sizes, the time of the policy update grows with the power {actor_samples:.2f} of the samples and
{actor_params:.2f} of the parameters, that of the critic with {critic_samples:.2f} and {critic_params:.2f}.

![time of an update over samples and parameters](scaling.png)
"""

MEMORY = """
## Memory of images

A rollout of {samples:,} images of 4 x 84 x 84 takes {images_mib:,.0f} MiB for the images themselves. `train()` takes
{peak_mib:,.0f} MiB on top of the rollout buffer: images go through the networks in parts.
"""


def speed(result: dict[str, Any]) -> str:
    """One row of the first table."""
    cells = [result["case"], ", ".join(f"`{key}={value}`" for key, value in result["options"].items()) or "none"]
    for part in ("actor", "train"):
        row = result[part]
        cells.append(f"{row['ours_s']:.3f} / {row['theirs_s']:.3f}")
        cells.append(f"**{row['ratio']:.1f}x** ({row['ratio_min']:.1f} to {row['ratio_max']:.1f})")
    cells.append(" / ".join(f"{result['memory_mib'][which]:.0f}" for which in ("ours", "theirs")))
    return "| " + " | ".join(cells) + " |\n"


def quality(result: dict[str, Any]) -> str:
    """One row of the second table."""
    ours, theirs = result["quality"]["ours"], result["quality"]["theirs"]
    fresh = [sum(each["fresh"]) / len(each["fresh"]) for each in (ours, theirs)]
    mean, error = (result["quality"][f"fresh_difference_{name}"] for name in ("mean", "standard_error"))
    return (
        f"| {result['case']} | {ours['in_sample']:.4f} / {theirs['in_sample']:.4f} | {fresh[0]:.5f} / {fresh[1]:.5f} "
        f"| {mean:.1e} ± {error:.1e} ({len(ours['fresh'])} rollouts) |\n"
    )


def phases(result: dict[str, Any]) -> str:
    """One row of the third table."""
    times = {name: 1000 * value for name, value in result["phases_s"].items()}
    share = result["phases_s"].get("fvp_share_of_gemm_rate")
    has_preconditioner = "preconditioner_setup" in times
    cells = [
        result["case"],
        f"{times['first_pass']:.1f}",
        f"{times['fisher_vector_product']:.2f}",
        "-" if share is None else f"{share:.0%}",
        f"{times['preconditioner_setup']:.1f} / {times['preconditioner_product']:.2f}" if has_preconditioner else "-",
        f"{times['evaluation']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |\n"


def critic_step_ms(result: dict[str, Any]) -> float:
    """Milliseconds of one Adam step of the critic, with minibatches of 128."""
    n_steps = result["critic_epochs"] * -(-result["samples"] // 128)
    return 1000 * (result["train"]["ours_s"] - result["actor"]["ours_s"]) / n_steps


def scaling(result: dict[str, Any]) -> str:
    """The section on growth."""
    return SCALING.format(
        actor_samples=result["power_by_samples_actor_s"],
        actor_params=result["power_by_parameters_actor_s"],
        critic_samples=result["power_by_samples_critic_s"],
        critic_params=result["power_by_parameters_critic_s"],
    )


def memory(result: dict[str, Any]) -> str:
    """The section on the memory of images."""
    images_mib = result["samples"] * 4 * 84 * 84 / 2**20
    return MEMORY.format(samples=result["samples"], images_mib=images_mib, peak_mib=result["memory_mib"]["ours"])


def main() -> None:
    """Write the page."""
    files = [RESULTS / f"update_{case}.json" for case in CASES]
    results = [json.loads(file.read_text()) for file in files if file.is_file()]
    versions = f"\nPyTorch {results[0]['torch']}, {results[0]['threads']} threads, each cell ours / sb3-contrib's.\n"
    page = HEAD + "".join(map(speed, results)) + versions + QUALITY + "".join(map(quality, results))
    page += PHASES + "".join(map(phases, results)) + TAIL.format(step_ms=critic_step_ms(results[0]))
    page += scaling(json.loads((RESULTS / "scaling.json").read_text()))
    page += memory(json.loads((RESULTS / "memory_images-8192.json").read_text()))
    (ROOT / "docs" / "performance.md").write_text(page)


if __name__ == "__main__":
    main()
