"""How long one action of the humanoid of results/ takes: exported, and by `model.predict`.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.export_latency --output benchmarks/results/export_latency.json

Each is timed on the same 2,000 observations, one at a time, in turn and several times. Reported are medians over repetitions,
the ratios within each, and the sizes of the files.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch as th

from benchmarks.markdown import ROOT
from benchmarks.timing import spread, timing_parser
from sb3_trpo_ext import export
from sb3_trpo_ext.tools.report import load_run
from sb3_trpo_ext.zoo.manager import register

N_OBSERVATIONS = 2000


def seconds(act: Callable[[np.ndarray], Any], observations: np.ndarray) -> float:
    """
    Time one action.

    :param act: from a batch of one observation to an action
    :param observations: shape ``(n, 1, n_inputs)``
    :return: the mean over the observations
    """
    started = time.perf_counter()
    for observation in observations:
        act(observation)
    return (time.perf_counter() - started) / len(observations)


def main() -> None:
    """Measure and print."""
    args = timing_parser(__doc__, repetitions=9).parse_args()
    th.set_num_threads(1)
    register()
    run = load_run("Humanoid-v5", str(ROOT / "results"), device="cpu")
    shape = (N_OBSERVATIONS, 1, *run.model.observation_space.shape)  # type: ignore[misc]
    observations = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        paths = {format: export(run.model, Path(folder, format), format, env=run.env) for format in ("onnx", "torchscript")}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(paths["onnx"]), options)
        script = th.jit.load(str(paths["torchscript"]))
        sizes = {format: path.stat().st_size for format, path in paths.items()}
    ways: dict[str, Callable[[np.ndarray], Any]] = {
        "predict": lambda observation: run.model.predict(run.env.normalize_obs(observation), deterministic=True),  # type: ignore[attr-defined]
        "onnx": lambda observation: session.run(None, {"observation": observation}),
        "torchscript": lambda observation: script(th.from_numpy(observation)),
    }
    times = [{name: seconds(act, observations) for name, act in ways.items()} for _ in range(args.repetitions)]
    rows = {}
    for name in ways:
        rows[name] = {
            "seconds": statistics.median(each[name] for each in times),
            **spread([each["predict"] / each[name] for each in times]),
            "bytes": sizes.get(name, run.model_path.stat().st_size),
        }
    result = {"torch": th.__version__, "onnxruntime": onnxruntime.__version__, "rows": rows}
    print(json.dumps(result, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
