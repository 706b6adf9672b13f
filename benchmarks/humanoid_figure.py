"""Draw the comparison on Humanoid-v5 from the runs in ``results/``, and print its table for the README.

python benchmarks/humanoid_figure.py
"""

import json
import pathlib

import numpy as np
import pandas
import yaml
from matplotlib.figure import Figure

from sb3_trpo_ext.plots import evaluation_curve, style_axes

RESULTS = pathlib.Path(__file__).parent.parent / "results"
RUNS = {"sb3-trpo-ext": ("trpo_ext", "tab:orange"), "sb3-contrib TRPO, RL-Zoo's settings": ("trpo", "tab:blue")}
STEPS = (200_000, 400_000, 600_000, 1_000_000)


def main() -> None:
    """Draw and print."""
    figure = Figure(figsize=(8, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    print("| Humanoid-v5 | " + " | ".join(f"{steps // 1000}k" for steps in STEPS) + " | 100 episodes at the end | distance |")
    print("|---|" + "---|" * (len(STEPS) + 2))
    for label, (algo, color) in RUNS.items():
        for index, folder in enumerate(sorted((RESULTS / algo).glob("Humanoid-v5_*"))):
            seed = yaml.load((folder / "Humanoid-v5" / "args.yml").read_text(), Loader=yaml.UnsafeLoader)["seed"]
            steps, returns = evaluation_curve(folder)
            mean, std = returns.mean(axis=1), returns.std(axis=1)
            axes.fill_between(steps, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
            style = ("o-", "s--", "^:", "D-.", "v-")[index]
            axes.plot(steps, mean, style, color=color, markersize=3.5, linewidth=1.4, label=f"{label}, seed {seed}")
            final = json.loads((folder / "evaluation.json").read_text())
            cells = [f"{mean[np.flatnonzero(steps == step)[0]]:,.0f}" for step in STEPS]
            cells += [f"{final['return']['mean']:,.0f} ± {final['return']['std']:,.0f}", f"{final['distance']['mean']:.1f} m"]
            print(f"| {label}, seed {seed} | " + " | ".join(cells) + " |")
    for file in sorted(RESULTS.glob("trpo_ext/*/updates.csv")):
        # The training's log, without the columns that nothing is said of
        updates = pandas.read_csv(file)
        share = updates["kl_divergence_loss"] / updates["target_kl"]
        print(
            f"{file.parent.name}: {len(updates)} updates, {(updates['status'] == 'accepted').sum()} accepted, "
            f"{share.between(0.95, 1).sum()} with a KL within 95 to 100% of target_kl, "
            f"{updates['cg_steps'].mean():.1f} Fisher-vector products, {updates['line_search_trials'].mean():.2f} trials each"
        )
    style_axes(axes, "Humanoid-v5: 10 deterministic episodes, mean ± std")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(RESULTS / "humanoid.png")


if __name__ == "__main__":
    main()
