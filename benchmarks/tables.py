"""Write all generated tables of README and documentation, from ``results/*.csv`` and ``benchmarks/results/*.json``.

python -m benchmarks.tables
"""

from typing import Any

import pandas

from benchmarks import defaults, masks_and_memory, returns, tensors
from benchmarks.markdown import ROOT, filled, load, pages, table
from benchmarks.studies import entries, memory, one_setting, traffic, tried

UPDATES = ("humanoid-8192", "humanoid-2048", "humanoid-65536", "images-1024", "cartpole-1024")
UPDATES_ON_GPU = ("humanoid-8192", "images-8192", "images-1024", "cartpole-1024")
THROUGHPUTS = ("cartpole-8", "humanoid-8", "humanoid-8-subproc", "humanoid-16-envpool")


def options(result: dict[str, Any]) -> str:
    """The options of our class that a case has."""
    return ", ".join(f"`{key}={value}`" for key, value in result["options"].items()) or "none"


def ratio(row: dict[str, Any], digits: int) -> str:
    """The median of the paired ratios, with the smallest and the largest."""
    middle, low, high = (f"{row[name]:.{digits}f}" for name in ("ratio", "ratio_min", "ratio_max"))
    return f"**{middle}x** ({low} to {high})"


def speed_table(results: list[dict[str, Any]]) -> str:
    """Time and memory of one update."""
    rows = []
    for result in results:
        cells = [result["case"], options(result)]
        for part in ("actor", "train"):
            row = result[part]
            cells += [f"{row['ours_s']:.3f} / {row['theirs_s']:.3f}", ratio(row, 1)]
        rows.append([*cells, " / ".join(f"{result['memory_mib'][which]:.0f}" for which in ("ours", "theirs"))])
    return table(("case", "options", "actor, s", "ratio", "whole `train()`, s", "ratio", "memory of `train()`, MiB"), rows)


def update_tables() -> dict[str, str]:
    """The tables about one update: speed and memory, quality of the step, phases."""
    results = [load(f"update_{case}") for case in UPDATES]
    quality, phases = [], []
    for result in results:
        ours, theirs = result["quality"]["ours"], result["quality"]["theirs"]
        fresh = [sum(each["fresh"]) / len(each["fresh"]) for each in (ours, theirs)]
        mean, error = (result["quality"][f"fresh_difference_{name}"] for name in ("mean", "standard_error"))
        quality.append(
            [
                result["case"],
                f"{ours['in_sample']:.4f} / {theirs['in_sample']:.4f}",
                f"{fresh[0]:.5f} / {fresh[1]:.5f}",
                f"{mean:.1e} ± {error:.1e} ({len(ours['fresh'])} rollouts)",
            ]
        )

        times = {name: 1000 * value for name, value in result["phases_s"].items()}
        share = result["phases_s"].get("fvp_share_of_gemm_rate")
        build = "preconditioner_setup" in times
        phases.append(
            [
                result["case"],
                f"{times['first_pass']:.1f}",
                f"{times['fisher_vector_product']:.2f}",
                "-" if share is None else f"{share:.0%}",
                f"{times['preconditioner_setup']:.1f} / {times['preconditioner_product']:.2f}" if build else "-",
                f"{times['evaluation']:.1f}",
            ]
        )
    return {
        "update speed": speed_table(results),
        "update speed on a GPU": speed_table([load(f"update_cuda_{case}") for case in UPDATES_ON_GPU]),
        "update quality": table(
            ("case", "in-sample, ours / theirs", "fresh, ours / theirs", "difference on fresh data"), quality
        ),
        "update phases": table(
            (
                "case",
                "first pass",
                "Fisher-vector product",
                "of the GEMM rate",
                "preconditioner: build / apply",
                "evaluation",
            ),
            phases,
        ),
    }


def throughput_tables() -> dict[str, str]:
    """The tables about the whole training: speed, phases, profile, threads."""
    results = [load(f"throughput_{case}") for case in THROUGHPUTS]
    speed = []
    for result in results:
        alone = [f"{result['env_only_steps_per_s'][name]:,.0f}" for name in ("ours", "theirs")]
        rates = f"{result['ours_steps_per_s']:,.0f} / {result['theirs_steps_per_s']:,.0f}"
        speed.append([result["case"], options(result), result["threads"], rates, ratio(result, 2), " / ".join(alone)])
    columns = {
        "env.step": ("env_step",),
        "actor": ("actor_step",),
        "buffer, callbacks": ("buffer", "callbacks"),
        "values, GAE": ("values_and_gae",),
        "policy update": ("policy_update",),
        "critic": ("critic_update",),
        "rest": ("other",),
    }
    shares = [
        [result["case"], *(f"{100 * sum(parts.get(name, 0.0) for name in names):.1f}" for names in columns.values())]
        for result in results
        for parts in [result["shares"]["ours"]]
    ]
    profile = [
        [row["function"] if row["calls"] is None else f"`{row['function']}`", row["calls"] or "", f"{100 * row['share']:.1f}"]
        for row in load("profile_humanoid-16-envpool")["rows"]
    ]
    threads = [
        [
            case,
            n_threads,
            f"{row['rollout_steps_per_s']:,.0f}",
            f"{row['policy_update_s']:.3f}",
            f"{row['critic_update_s']:.3f}",
            f"{row['steps_per_s']:,.0f}",
        ]
        for case, by_threads in load("threads")["cases"].items()
        for n_threads, row in by_threads.items()
    ]
    return {
        "throughput": table(
            ("case", "options", "threads", "steps/s, ours / sb3-contrib's", "ratio", "the environment alone"), speed
        ),
        "throughput phases": table(("case", *columns), shares),
        "throughput profile": table(("function", "calls", "per cent"), profile),
        "throughput threads": table(
            ("case", "threads", "rollouts, steps/s", "policy update, s", "critic update, s", "all, steps/s"), threads
        ),
    }


def conjugate_gradient_tables() -> dict[str, str]:
    """The tables about ``cg_tolerance``: one policy on Humanoid-v5, and whole steps on small tasks."""
    by_key = {(row["cg_damping"], row["cg_tolerance"], row["preconditioner"]): row for row in load("cg_tolerance")["rows"]}
    solutions = []
    for damping in (0.1, 1.0, 5.0):
        for tolerance in (0.5, 0.1, 0.03, 0.01):
            cells: list[object] = [f"{damping:g}", tolerance]
            for preconditioner in ("none", "kfac"):
                row, exact = (by_key[damping, each, preconditioner] for each in (tolerance, 0.0001))
                cells += [row["products"], f"{row['in_sample'] / exact['in_sample']:.1%}"]
            solutions.append(cells)
    steps = [
        [
            task,
            row["cg_tolerance"],
            f"{row['products']:.1f}",
            *(f"{100 * row[name]:.1f} ± {100 * row[f'{name}_standard_error']:.1f}%" for name in ("in_sample", "fresh")),
        ]
        for task, result in load("cg_tolerance_steps").items()
        if isinstance(result, dict)
        for row in result["steps"]
        if row["cg_tolerance"] > 0.001
    ]
    return {
        "cg tolerance": table(
            ("`cg_damping`", "`cg_tolerance`", "products, plain", "gain, plain", "products, K-FAC", "gain, K-FAC"), solutions
        ),
        "cg tolerance steps": table(
            ("task", "`cg_tolerance`", "products", "gain on the rollout", "gain on a fresh one"), steps
        ),
    }


def envpool_tables() -> dict[str, str]:
    """The tables about EnvPool: returns, steps, resets, ``info`` and speed, beside Gymnasium's environments."""
    tasks, same_mujoco = load("envpool_agreement")["tasks"], load("envpool_same_mujoco")

    def cell(summary: dict[str, Any]) -> str:
        low, high = summary["interval_95"]
        return f"{summary['mean']:,.1f} [{low:,.1f}, {high:,.1f}]"

    def differences(task: dict[str, Any]) -> str:
        return " / ".join(f"{task['same_state'][n_steps - 1]['observation']:.0e}" for n_steps in (1, 5, 20))

    episodes, steps, resets, keys = [], [], [], []
    for env_id, task in tasks.items():
        both = [cell(task[quantity][name]) for quantity in ("return", "length") for name in ("envpool", "gymnasium")]
        tests = f"{task['return']['welch_p']:.2f} / {task['return']['kolmogorov_smirnov_p']:.2f}"
        episodes.append([env_id, *both, tests])
        other = differences(same_mujoco["tasks"][env_id])
        steps.append([env_id, differences(task), other, f"{task['same_state'][0]['reward']:.0e}"])
        reset = task["reset"]
        means = f"{reset['means_apart_in_standard_errors']:.1f} (of {reset['n_moving']})"
        resets.append([env_id, means, f"{reset['smallest_ratio_of_stds']:.2f} to {reset['largest_ratio_of_stds']:.2f}"])
        info = (", ".join(f"`{key}`" for key in task["info"][name]) for name in ("both", "envpool", "gymnasium"))
        keys.append([env_id, *info])
    speed = [
        [row["name"], f"{row['steps_per_second']:,.0f}", f"{row['ratio_to_dummy']:.2f}x ({low:.2f} to {high:.2f})"]
        for row in load("envpool_throughput")["rows"]
        for low, high in [row["ratio_range"]]
    ]
    mujoco = f"with MuJoCo {same_mujoco['versions']['mujoco of gymnasium']} under Gymnasium"
    return {
        "envpool returns": table(("task", "return, EnvPool", "Gymnasium", "length, EnvPool", "Gymnasium", "p"), episodes),
        "envpool steps": table(("task", "observation", mujoco, "reward"), steps),
        "envpool resets": table(("task", "means", "standard deviations"), resets),
        "envpool info": table(("task", "both", "EnvPool alone", "Gymnasium alone"), keys),
        "envpool speed": table(("", "steps/s", "of DummyVecEnv"), speed),
    }


def model_table() -> str:
    """Efficiency from 2 to 1,000 processes on paper, and where communication takes over."""
    shown = (2, 8, 32, 128, 1000)
    limits = ("communication_exceeds_computation_from", "communication_exceeds_all_from")
    rows = []
    for case in traffic.cases():
        network, machine = "Humanoid" if case["case"].startswith("humanoid") else "NatureCNN", case["machine"]["name"]
        label = f"{network}, {'cores' if 'core' in machine else 'GPUs'}, `batch_size` {case['batch_size']:,}"
        efficiency = [f"{case['efficiency'][str(n)]:.2f}" for n in shown]
        rows.append([f"{label} of {case['n_samples']:,}", *efficiency, *(case[limit] or "none" for limit in limits)])
    head = ["case, samples per process", *(f"{n:,}" for n in shown)]
    return table([*head, "communication exceeds the computation of the update from", "and rollout and update from"], rows)


def message_table() -> str:
    """What an update on Humanoid-v5 sends, with our settings."""
    network = traffic.humanoid()
    sent = traffic.messages(network, traffic.Update(cg_steps=4, n_trials=2, n_critic_steps=160, is_preconditioned=True))
    sizes = {
        "critic's gradients": f"4 x {network.n_critic:,}",
        "Fisher-vector products": f"4 x {network.n_actor:,}",
        "Kronecker factors": "",
        "objective and gradient": f"4 x ({network.n_actor:,} + 1)",
    }
    by_name = {message.what: message for message in sent}
    others = [message for message in sent if message.what not in sizes]
    low, high = (limit(message.n_bytes for message in others) for limit in (min, max))
    groups = [(name, [by_name[name]], size or f"{by_name[name].n_bytes:,}") for name, size in sizes.items()]
    groups.append(("all else: moments, trials, `VecNormalize`, hashes", others, f"{low:,} to {high:,}"))
    groups.append(("together", sent, ""))
    rows = [
        [name, sum(each.calls for each in group), size, f"{sum(each.calls * each.n_bytes for each in group) / 1e6:.2f}"]
        for name, group, size in groups
    ]
    return table(("Humanoid-v5, our settings", "calls", "bytes of one call", "MB"), rows)


def process_tables() -> dict[str, str]:
    """The tables about several processes and GPUs: speed, messages, the model on paper, waits, noise scale."""
    speed = []
    for task in load("data_parallel")["tasks"]:
        rates = [f"{task[name]['steps_per_second']:,.0f}" for name in ("one_process", "two_processes")]
        row = {"ratio": task["ratio"], "ratio_min": min(task["ratios"]), "ratio_max": max(task["ratios"])}
        speed.append([task["task"], task["n_envs_per_process"], *rates, ratio(row, 2)])
    waits = []
    for case, counts in load("host_waits").items():
        for row, key in ((f"{case}: per step of the environments", "waits_per_step"), ("... per update", "waits_per_update")):
            tensors, ours, *others = (counts[name][key] for name in ("ours_tensors", "ours", "sb3_contrib", "ppo"))
            waits.append([row, f"**{tensors}**", f"**{ours}**", *others])
    noise = load("noise_scale")
    scales = []
    for name, label in (("fresh", "fresh"), ("trained_3M_steps", "after 3M steps")):
        (low, high), scale = noise[name]["interval_90"], noise[name]["noise_scale"]
        scales.append([label, f"{scale:,}", f"{low:,} to {high:,}", f"{4096 / (4096 + scale):.2f}"])
    return {
        "processes": table(("task", "environments per process", "1 process", "2 processes", "ratio"), speed),
        "processes on paper": model_table(),
        "processes messages": message_table(),
        "host waits": table(
            ("the host waits", "ours, environment of tensors", "ours, of arrays", "sb3-contrib's TRPO", "SB3's PPO"), waits
        ),
        "noise scale": table(
            (
                "policy",
                "noise scale, in samples",
                "90% interval",
                "share of the true gradient in the square of that of 4,096 samples",
            ),
            scales,
        ),
    }


def tensor_tables() -> dict[str, str]:
    """The tables about environments of tensors: speed of training in them, and what is learned in simulators."""
    speed = []
    files = {f"tensors_{task}": f"{label}, CPU" for task, label in tensors.TASK_NAMES.items()}
    files["tensors_cuda_cartpole"] = f"{tensors.TASK_NAMES['cartpole']}, H200"
    for name, label in files.items():
        for row in load(name)["rows"]:
            rates = [f"{rate:,.0f}" for rate in row["steps_per_second"].values()]
            names = ("TRPO, NumPy", "PPO, NumPy")
            ratios = [dict(zip(("ratio", "ratio_min", "ratio_max"), row[f"ratio to {name}"], strict=True)) for name in names]
            share = f"{row['share_of_environment']:.0%}"
            speed.append([label, f"{row['n_envs']:,}", *rates, *(ratio(each, 1) for each in ratios), share])
    learned = []
    runs = pandas.read_csv(ROOT / "results" / "simulators.csv")
    for (env, device, n_envs, steps), part in runs.groupby(["env", "device", "n_envs", "steps"], sort=False):
        machine = {"cpu": "CPU", "cuda": "H200"}[device]
        returns_of_seeds = ", ".join(f"{value:,.4g}" for value in part["return"])
        rate, share = part["steps_per_second"].median(), part["share_of_environment"].median()
        learned.append([f"`{env}`", machine, f"{n_envs:,}", f"{steps:,}", returns_of_seeds, f"{rate:,.0f}", f"{share:.0%}"])
    brax = pandas.read_csv(ROOT / "results" / "brax_ppo.csv")
    return {
        "brax ppo": table([f"{steps:,} steps" for steps in brax["steps"]], [[f"{value:,.0f}" for value in brax["return"]]]),
        "tensors": table(
            (
                *("environment", "number", "TRPO, tensors: steps/s", "TRPO, NumPy", "PPO, NumPy"),
                *("tensors / TRPO, NumPy", "tensors / PPO, NumPy", "share of the environment"),
            ),
            speed,
        ),
        "simulators": table(
            ("environment", "device", "number", "steps", "return of each seed", "steps/s", "share of the environment"), learned
        ),
    }


def export_table() -> dict[str, str]:
    """The table about the time of one action."""
    names = {"predict": "`model.predict`", "onnx": "ONNX Runtime", "torchscript": "TorchScript, in Python"}
    rows = []
    for name, label in names.items():
        row = load("export_latency")["rows"][name]
        speed = "" if name == "predict" else ratio(row, 1)
        rows.append([label, f"{1e6 * row['seconds']:.0f}", speed, f"{row['bytes'] / 1e6:.1f} MB"])
    return {"export": table(("way", "microseconds per action", "as fast as `predict`", "file"), rows)}


def forward_mode_table() -> dict[str, str]:
    """The table about forward mode through an LSTM."""
    rows = []
    for row in load("forward_mode")["rows"]:
        times = [f"{1e3 * row[name]:.0f}" for name in ("reverse", "forward mode", "transposed", "graph")]
        rows.append([row["hidden_size"], row["n_sequences"], *times, ratio(row, 2)])
    head = (
        "units",
        "sequences",
        "J v, reverse: ms",
        "J v, forward mode: ms",
        "J^T u: ms",
        "the graph: ms",
        "J v, reverse / forward",
    )
    return {"forward mode": table(head, rows)}


def budget_table() -> dict[str, str]:
    """The table about the KL of whole trainings."""
    rows = [
        [row["task"], f"{row['steps']:,}", row["budget"], f"{row['spent']:.3f}", row["updates"], row["rejected"]]
        for row in load("budget")["rows"]
    ]
    return {"budget": table(("task", "steps", "budget in nats", "spent", "updates", "of which rejected"), rows)}


def all_tables() -> dict[str, str]:
    """Every generated table, by its name."""
    return {
        **returns.tables(),
        **masks_and_memory.tables(),
        **tried.tables(),
        **entries.tables(),
        **memory.tables(),
        **one_setting.tables(),
        **update_tables(),
        **throughput_tables(),
        **conjugate_gradient_tables(),
        **envpool_tables(),
        **process_tables(),
        **tensor_tables(),
        **defaults.tables(),
        **budget_table(),
        **export_table(),
        **forward_mode_table(),
    }


def main() -> None:
    """Write the tables between their markers."""
    tables = all_tables()
    for page in pages():
        page.write_text(filled(page, tables), encoding="utf-8")


if __name__ == "__main__":
    main()
