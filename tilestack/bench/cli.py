"""`tilestack bench`: choose a benchmark, run it, write its result file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tilestack.bench import results
from tilestack.bench.results import FOLDER


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="tilestack bench",
        description="Times tilestack beside every installed rival on this GPU and writes a result file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    top.add_argument("--out", type=Path, default=FOLDER, help="folder that the result file goes to")
    top.add_argument("--commit", help="what to name as measured, where the sources are no checkout")
    top.add_argument("--repeats", type=int, default=20, help="timed calls of step and ops; the median is reported")
    benches = top.add_subparsers(dest="bench", required=True, metavar="BENCH")
    step = benches.add_parser("step", help="forward, loss and backward of Qwen3-30B-A3B's shape, beside transformers")
    step.add_argument("--layers", type=int, default=4, help="decoder layers of 48")
    step.add_argument("--batch", type=int, default=4, help="sequences of the first case")
    step.add_argument("--seqlen", type=int, default=4096, help="tokens of a sequence of the first case")
    step.add_argument("--first-case-only", action="store_true", help="leave out 1 x 4096 and 1 x 32768")
    step.add_argument("--only", nargs="*", metavar="NAME", help="these implementations alone")
    step.add_argument("--measure", nargs="*", metavar="KIND", help="time, optimizer, longest, losses: these alone")
    for name, what in (
        ("attention", "attention forward and backward over sequence lengths, host time, first calls"),
        ("moe", "a whole MoE block of Qwen3-30B-A3B, beside transformers'"),
    ):
        kernel = benches.add_parser(name, help=what)
        kernel.add_argument("--quick", action="store_true", help="a few cases")
        kernel.add_argument("--only", nargs="*", metavar="NAME", help="these implementations alone")
    ops = benches.add_parser("ops", help="every implementation of every op at the model's shapes")
    ops.add_argument("--only", nargs="*", metavar="OP", help="these ops alone")
    numerics = benches.add_parser("numerics", help="losses of 200 steps beside transformers in bf16 and float32")
    numerics.add_argument("--steps", type=int, default=200, help="steps of each of the 12 runs")
    traced = benches.add_parser("trace", help="tilestack trace of Qwen3-30B-A3B's shape, beside transformers")
    traced.add_argument("--layers", type=int, default=4, help="decoder layers of 48")
    traced.add_argument("--batch", type=int, default=2, help="sequences")
    traced.add_argument("--seqlen", type=int, default=4096, help="tokens of a sequence")
    spread = benches.add_parser("distributed", help="whole steps on several GPUs, beside transformers with DeepSpeed")
    spread.add_argument("--gpus", type=int, default=2, help="GPUs of this machine")
    spread.add_argument("--layers", type=int, default=4, help="decoder layers of the model that one GPU trains too")
    spread.add_argument("--large", type=int, default=8, help="decoder layers of the model that needs all GPUs")
    spread.add_argument("--only", nargs="*", metavar="NAME", help="these implementations alone")
    benches.add_parser("plan", help="what training steps hold of the GPUs' memory, beside what tilestack plan says")
    benches.add_parser("adamw", help="an update with every way of keeping AdamW's state")
    benches.add_parser("kvcache", help="a decoding step over a cache of keys and values")
    trust = benches.add_parser("trust", help="which of the checks pass on this GPU")
    trust.add_argument("--only", nargs="*", metavar="CHECK", help="these checks alone")
    trust.add_argument("--seconds", type=float, help="of a check: what has not begun by then is left out, and counted")
    trust.add_argument("--grace", type=float, default=30, help="seconds after which what has begun is stopped")
    trust.add_argument("--workers", type=int, default=8, help="processes that share the GPU")
    trust.add_argument(
        "--merge", nargs="*", type=Path, metavar="FILE", help="put these result files' rows in (needs no GPU)"
    )
    benches.add_parser("fp8", help="what e4m3 products with block scales could bring to the experts")
    benches.add_parser("tables", help="rewrite the tables of README and docs from the result files (needs no GPU)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.bench == "tables":
        from tilestack.bench.tables import rewrite

        for path in rewrite():
            print(f"rewrote {path}")
        return 0
    if arguments.bench == "trust" and arguments.merge:
        from tilestack.bench import trust

        for path in trust.merge(arguments.merge, arguments.out):
            print(f"wrote {path}")
        return 0
    if not torch.cuda.is_available():
        print("error: tilestack bench needs a GPU; here it would time Triton's interpreter", file=sys.stderr)
        return 2
    results.measured_commit = arguments.commit
    path = _run(arguments)
    print(f"wrote {path}")
    return 0


def _run(arguments: argparse.Namespace) -> Path:
    if arguments.bench == "step":
        from tilestack.bench import step

        shapes = [(arguments.batch, arguments.seqlen), *([] if arguments.first_case_only else [(1, 4096), (1, 32768)])]
        cases = [step.StepCase(layers=arguments.layers, batch=batch, seqlen=seqlen) for batch, seqlen in shapes]
        return step.run(cases, arguments.only, arguments.repeats, arguments.out, arguments.measure)
    if arguments.bench == "attention":
        from tilestack.bench import attention

        return attention.run(arguments.quick, arguments.only, arguments.out)
    if arguments.bench == "moe":
        from tilestack.bench import moe

        return moe.run(arguments.quick, arguments.only, arguments.out)
    if arguments.bench == "numerics":
        from tilestack.bench import numerics

        return numerics.run(numerics.NumericsCase(steps=arguments.steps), arguments.out)
    if arguments.bench == "trace":
        from tilestack.bench import trace

        return trace.run(arguments.layers, arguments.batch, arguments.seqlen, arguments.out)
    if arguments.bench == "distributed":
        from tilestack.bench import distributed

        chosen = arguments.gpus, arguments.layers, arguments.large, arguments.repeats, arguments.only
        return distributed.run(*chosen, arguments.out)
    if arguments.bench == "plan":
        from tilestack.bench import memory

        return memory.run(arguments.out)
    if arguments.bench == "adamw":
        from tilestack.bench import adamw

        return adamw.run(arguments.repeats, arguments.out)
    if arguments.bench == "kvcache":
        from tilestack.bench import kvcache

        return kvcache.run(arguments.repeats, arguments.out)
    if arguments.bench == "trust":
        from tilestack.bench import trust

        budget = trust.Budget(arguments.seconds, arguments.workers, arguments.grace)
        return trust.run(arguments.only, budget, arguments.commit, arguments.out)
    if arguments.bench == "fp8":
        from tilestack.bench import fp8

        return fp8.run(folder=arguments.out)
    from tilestack.bench import ops

    return ops.run(arguments.only, arguments.repeats, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
