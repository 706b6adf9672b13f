"""Write ``docs/performance.md`` from the results of ``benchmarks/update.py``.

python benchmarks/performance_page.py
"""

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
CASES = ("humanoid-8192", "humanoid-2048", "images-1024", "cartpole-1024")

HEAD = """# Performance of one update

One `train()` of sb3-contrib's TRPO and one of ours on the same rollout and the same weights, alternating in one process, at
sb3-contrib's defaults with `target_kl` and `cg_damping` converted to joint units. Ours with the options shown; the critic
makes the same number of Adam steps on the same number of samples in both. Ratios are medians of paired ratios (smallest and
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
`evaluation` is one trial of the line search: KL and objective of the whole batch. What is left of the whole `train()` is the
critic: its Adam steps on minibatches of 128 are matrix products that cannot be saved while their number is the same. Larger
minibatches (`batch_size`) or fewer epochs (`n_critic_updates`) are the way to shorten it.
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


def main() -> None:
    """Write the page."""
    files = [ROOT / "benchmarks" / "results" / f"update_{case}.json" for case in CASES]
    results = [json.loads(file.read_text()) for file in files if file.is_file()]
    versions = f"\nPyTorch {results[0]['torch']}, {results[0]['threads']} threads, each cell ours / sb3-contrib's.\n"
    page = HEAD + "".join(map(speed, results)) + versions + QUALITY + "".join(map(quality, results))
    page += PHASES + "".join(map(phases, results)) + TAIL
    (ROOT / "docs" / "performance.md").write_text(page)


if __name__ == "__main__":
    main()
