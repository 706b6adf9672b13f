"""The command ``sb3-trpo export``: writes the agent of a run to a file that runs without Stable-Baselines3."""

from collections.abc import Sequence
from pathlib import Path

from sb3_trpo_ext.deployed import FORMATS, DeployedPolicy, write
from sb3_trpo_ext.tools.report import add_acting, load_run, run_parser


def main(argv: Sequence[str] | None = None) -> None:
    """
    Write the agent of a run to a file.

    :param argv: the arguments, those of the process if None
    :raises ValueError: if there is no such run
    """
    parser = run_parser("sb3-trpo export", "Write a trained agent to a file that runs without Stable-Baselines3.")
    add_acting(parser)
    parser.add_argument("--format", choices=tuple(FORMATS), default="onnx", help="of the file (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="the file (default: in the folder of the run)")
    args = parser.parse_args(argv)
    run = load_run(args.env, args.folder, args.algo, args.exp_id, device="cpu", env_kwargs=args.env_kwargs)
    path = args.output or run.model_path.with_suffix(FORMATS[args.format])
    policy = DeployedPolicy(run.model, run.env, deterministic=not args.stochastic)
    run.env.close()
    write(policy, path, args.format)
    print(f"{path}\n  inputs   {', '.join(policy.inputs)}\n  outputs  {', '.join(policy.outputs)}")
