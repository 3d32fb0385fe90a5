"""Random calls of attention against the oracle: lengths, masks, features and layouts that nobody thought of.

    python -m tilestack.testing.random_attention [--cases 1000] [--first 0] [--longest 600] [--implementation NAME ...]
        [--processes 1] [--seconds N] [--record FILE]

Everything about a call follows from its seed, which is printed where it fails; `--first SEED --cases 1` runs it again.
Dtypes, head dimensions, heads, masks and features come from a fixed list of variants, and in each the tokens are
always, or never, a multiple of 16, for which Triton compiles anew: so a thousand calls need some hundreds of compiled
kernels. The lengths, the numbers and the strides are each call's own. Of several processes each takes a few calls of
one variant at a time; calls that a time limit left out are counted.

Checked together, over all calls of an implementation and dtype: tensors of few numbers, and float32, where eager and
FlashAttention lose about as much, at different places; of one call chance may decide which is twice the other.

Not drawn: calls in which no query sees more than one key. There dq and dk are 0, which eager has exactly, and every
FlashAttention, whose delta comes from out, up to rounding: no error is twice an error of 0.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tilestack.kernels import UnsupportedError
from tilestack.testing.cases.attention import CASES, _dense, _packed
from tilestack.testing.compare import Case, Errors, assert_close, errors, evaluate, to_oracle

OURS = ("tilestack", "tilestack-triton")
N_VARIANTS = 48
SEEDS_OF_A_PART = 5  # that a process takes at a time
FEW = 1024  # numbers of a tensor other than 0, some rows of a head: chance decides about them
MASKS = ("none", "causal", "window", "causal window", "left window")


@dataclass(frozen=True)
class Variant:
    """What decides which kernels run. features: of softcap, sinks, alibi, dropout. round: multiples of 16 tokens."""

    dtype: torch.dtype
    head_dim: int
    heads: tuple[int, int]
    packed: bool
    mask: str
    features: tuple[str, ...]
    round: bool


def variants() -> list[Variant]:
    """The fixed list: half of it without features, a quarter with those that Hopper's kernels may have, too."""
    rng = random.Random(0)
    found = []
    for index in range(N_VARIANTS):
        names = ((), ("softcap", "sinks"), (), ("softcap", "sinks", "alibi", "dropout"))[index % 4]
        features = tuple(name for name in names if rng.random() < 0.6)
        found.append(
            Variant(
                rng.choices((torch.bfloat16, torch.float16, torch.float32), (6, 3, 1))[0],
                rng.choices((64, 128, 96, 192, 256, 40, 59), (4, 4, 2, 1, 1, 1, 1))[0],
                rng.choice(((4, 2), (2, 2), (4, 1), (6, 2))),
                rng.random() < 0.5,
                rng.choices(MASKS, (1, 3, 1, 2, 1))[0],
                features,
                rng.random() < 0.2,
            )
        )
    return found


Pool = dict[tuple[str, torch.dtype, str], list[tuple[int, Errors]]]  # implementation, dtype, name: seeds and errors


@dataclass
class Report:
    """calls: how many of each implementation were checked; refused: how many it did not take; not_reached: by seed."""

    calls: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    not_reached: int = 0
    pooled: Pool = field(default_factory=dict)

    def add(self, other: Report) -> None:
        """Take in what another process found."""
        self.calls += other.calls
        self.refused += other.refused
        self.failures += other.failures
        self.not_reached += other.not_reached
        for key, found in other.pooled.items():
            self.pooled.setdefault(key, []).extend(found)

    def judge_pooled(self) -> None:
        """The rule for what is checked together."""
        for (implementation, dtype, name), found in self.pooled.items():
            worst = max(found, key=lambda each: each[1].largest[0])[0]
            where = f"{implementation}: {name} of {len(found)} calls in {dtype}, the worst of which is seed {worst}"
            try:
                sum((each for _, each in found), Errors(0)).judge(where, dtype)
            except AssertionError as error:
                self.failures.append(str(error))


def make(seed: int, longest: int) -> tuple[Case, torch.dtype]:
    """The call of a seed: no sequence is longer than `longest`."""
    variant, rng = variants()[seed % N_VARIANTS], random.Random(seed)

    def length() -> int:
        return rng.choice((rng.randint(0, longest), rng.randint(1, longest), rng.randint(0, max(1, longest // 8))))

    features = {
        "sinks": "sinks" in variant.features,
        "slopes": rng.choice(("shared", "each")) if "alibi" in variant.features else None,
        "seed": "dropout" in variant.features,
    }
    if variant.packed:
        lengths_q = [length() for _ in range(rng.randint(1, 5))]
        lengths_k = list(lengths_q) if rng.random() < 0.5 else [length() for _ in lengths_q]
        if max(lengths_k) == 1:
            lengths_k = [2 * each for each in lengths_k]
        spare = rng.choice((0, 0, rng.randint(1, 70)))
        for lengths in (lengths_q, lengths_k):
            lengths[-1] += _missing(sum(lengths) + spare, variant.round)
        tensors = _packed(tuple(lengths_q), tuple(lengths_k), variant.heads, variant.head_dim, spare=spare, **features)
    else:
        batch, layout = rng.randint(1, 3), rng.choice(("contiguous", "transposed", "fused"))
        length_q = length()
        length_k = length_q if layout == "fused" or rng.random() < 0.5 else length()
        length_q, length_k = (each + _missing(each, variant.round) for each in (length_q, length_k))
        sizes = length_q, length_k, variant.heads, variant.head_dim
        tensors = _dense(*sizes, batch=batch, layout=layout, **features)
    arguments = _mask(variant.mask, rng, longest) | _numbers(variant, rng)
    if variant.packed and rng.random() < 0.5:
        arguments |= {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    return Case(f"seed {seed}", "", tensors, arguments), variant.dtype


def _missing(tokens: int, is_round: bool) -> int:
    """How many more tokens make a multiple of 16, or none; of one token there is no gradient to compare (see above)."""
    if is_round:
        return -tokens % 16
    return 1 if tokens and (tokens % 16 == 0 or tokens == 1) else 0


def _mask(mask: str, rng: random.Random, longest: int) -> dict:
    left, right = rng.randint(1, longest), rng.randint(0, longest // 2)
    return {
        "none": {},
        "causal": {"causal": True},
        "window": {"window_size": (left, right)},
        "causal window": {"window_size": (left, right), "causal": True},
        "left window": {"window_size": (left, -1)},
    }[mask]


def _numbers(variant: Variant, rng: random.Random) -> dict:
    found = {"softmax_scale": rng.choice((None, rng.uniform(0.5, 2) * variant.head_dim**-0.5))}
    if "softcap" in variant.features:
        found["softcap"] = rng.choice((1.0, 5.0, 30.0))
    if "dropout" in variant.features:
        found["dropout_p"] = rng.choice((0.1, 0.17, 0.5, 0.9))
    return found


def run(seeds: Iterable[int], device: torch.device, longest: int, implementations: tuple[str, ...] = OURS) -> Report:
    """Run the calls of the seeds and check every output and gradient by the rule of compare.py."""
    report = collect(seeds, device, longest, implementations)
    report.judge_pooled()
    return report


def collect(seeds: Iterable[int], device: torch.device, longest: int, implementations: tuple[str, ...]) -> Report:
    """The same, without the verdict on what is checked together."""
    report = Report()
    for seed in seeds:
        case, dtype = make(seed, longest)
        tensors = case.make(dtype, device, torch.Generator().manual_seed(seed))
        exact = evaluate(CASES, case, to_oracle(tensors), "reference")
        eager = evaluate(CASES, case, tensors, "reference")
        for implementation in implementations:
            try:
                ours = evaluate(CASES, case, tensors, implementation)
            except UnsupportedError:
                report.refused[implementation] += 1
                continue
            except Exception as error:
                raise RuntimeError(f"seed {seed}, {implementation}: {type(error).__name__}: {error}") from error
            report.calls[implementation] += 1
            for name in exact:
                triple = ours[name], eager[name], exact[name]
                try:
                    if exact[name].count_nonzero() < FEW or dtype == torch.float32:
                        found = errors(f"seed {seed}, {implementation}: {name}", *_scaled(*triple))
                        report.pooled.setdefault((implementation, ours[name].dtype, name), []).append((seed, found))
                    else:
                        assert_close(f"seed {seed}, {implementation}: {name}", *triple)
                except AssertionError as error:
                    report.failures.append(str(error))
    return report


def _scaled(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Divided by a power of two, so that all calls count alike."""
    if not exact.numel():
        return ours, eager, exact
    largest = exact.masked_fill(~exact.isfinite(), 0).abs().amax()
    exponent = torch.frexp(largest).exponent
    return tuple(torch.ldexp(each, -exponent).to(each.dtype) for each in (ours, eager, exact))


@dataclass(frozen=True)
class Job:
    """A few seeds of one variant; from `end` of time.time() on none begins."""

    seeds: tuple[int, ...]
    longest: int
    implementations: tuple[str, ...]
    end: float

    def run(self) -> Report:
        """In this process."""
        reached = 0

        def in_time() -> Iterator[int]:
            nonlocal reached
            for seed in self.seeds:
                if time.time() >= self.end:
                    return
                reached += 1
                yield seed

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        report = collect(in_time(), device, self.longest, self.implementations)
        report.not_reached = len(self.seeds) - reached
        return report


def parts(seeds: range) -> list[tuple[int, ...]]:
    """The seeds cut into a few of one variant each; all variants come first once, and compile their kernels there."""
    width = N_VARIANTS * SEEDS_OF_A_PART
    found = [
        tuple(seeds[index] for index in range(start + variant, min(start + width, len(seeds)), N_VARIANTS))
        for start in range(0, len(seeds), width)
        for variant in range(N_VARIANTS)
    ]
    return [each for each in found if each]


def run_jobs(jobs: list[Job], processes: int) -> Iterator[tuple[Job, Report]]:
    """The reports as they come, in this process, or in several that share the jobs."""
    if processes == 1:
        yield from ((job, job.run()) for job in jobs)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(job.run): job for job in jobs}
        for future in as_completed(running):
            job = running[future]
            try:
                report = future.result()
            except Exception as error:  # a process that a signal ended, or that the device failed
                reason = f"seeds {job.seeds} ended: {type(error).__name__}: {error}"
                report = Report(failures=[reason], not_reached=len(job.seeds))
            yield job, report


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 1 where a call failed."""
    parser = argparse.ArgumentParser(prog="python -m tilestack.testing.random_attention", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--longest", type=int, default=600, help="tokens of a sequence at most")
    parser.add_argument("--implementation", action="append", help=f"default: {', '.join(OURS)}")
    parser.add_argument("--processes", type=int, default=1, help="that share the calls, and the GPU")
    parser.add_argument("--seconds", type=float, help="calls that have not begun by then are left out")
    parser.add_argument("--record", type=Path, help="file that gets the outcome as JSON")
    args = parser.parse_args(argv)
    end = float("inf") if args.seconds is None else time.time() + args.seconds
    seeds, implementations = range(args.first, args.first + args.cases), tuple(args.implementation or OURS)
    jobs = [Job(each, args.longest, implementations, end) for each in parts(seeds)]
    waiting, report = {job: len(job.seeds) for job in jobs}, Report()
    for job, found in run_jobs(jobs, args.processes):
        report.add(found)
        del waiting[job]
        _write(args, report, sum(waiting.values()))
    report.judge_pooled()
    _write(args, report, 0)
    for line in report.failures:
        print(f"FAILED {line}", flush=True)
    for name in report.calls | report.refused:
        print(f"{name}: {report.calls[name]} calls, {report.refused[name]} refused")
    if report.not_reached:
        print(f"{report.not_reached} calls were not reached in {args.seconds:g} seconds")
    print(f"{len(report.failures)} of the checks failed" if report.failures else "all within the rule")
    return 1 if report.failures else 0


def _write(args: argparse.Namespace, report: Report, waiting: int) -> None:
    """The record so far, in which the calls of unfinished parts are not reached: a run may be stopped."""
    if args.record:
        found = {key: getattr(report, key) for key in ("calls", "refused", "failures")}
        counts = {"first": args.first, "cases": args.cases, "not_reached": report.not_reached + waiting}
        args.record.write_text(json.dumps(counts | found))


if __name__ == "__main__":
    sys.exit(main())
