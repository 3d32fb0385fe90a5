"""`tilestack bench moe`: a whole MoE block of Qwen3-30B-A3B, beside transformers' with grouped_mm and SonicMoE's.

The block is the router's linear layer, the router, sorting, the experts and the weighted sum. Every implementation has
the same bf16 weights and tokens. "random": logits are standard normal. "skewed": expert number r has -log(r) added to
its logit, so that the busiest expert gets many times the tokens of the mean.

First calls come first. Then every kernel is compiled, and the shapes follow, the one that matters most first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

from tilestack.bench import moe_check, moe_sonic
from tilestack.bench.first_call import no_compiled_kernels, seconds_of
from tilestack.bench.isolated import PATIENCE_S, one_after_another, side_by_side
from tilestack.bench.results import FOLDER, Recorder, Row
from tilestack.bench.timing import ceilings, measure
from tilestack.kernels import moe, ops, router
from tilestack.kernels.device import Device

TOKENS = (16384, 4096, 32768)  # the one that matters most first
COLD_TOKENS = 4096
ROUTINGS = ("random", "skewed")
BUDGET_MS = 150.0


@dataclass(frozen=True)
class MoeCase:
    """One shape; the defaults are Qwen3-30B-A3B's."""

    tokens: int
    routing: str = "random"
    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    dtype: str = "bfloat16"

    def as_dict(self) -> dict:
        """The case as a result file has it."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """kind: "speed", "first" (the first call of a process) or "compile" (a call of everything, untimed).

    piece: of SonicMoE's, the one to compile (`moe_sonic.PIECES`).
    """

    case: MoeCase
    implementation: str
    kind: str = "speed"
    piece: tuple[int, int] | None = None


def flops(case: dict, direction: str) -> float:
    """6 * T * K * H * I forward, 12 backward, 18 both (products of the experts alone)."""
    factor = {"forward": 6, "backward": 12, "both": 18}[direction]
    return float(factor * case["tokens"] * case["top_k"] * case["hidden"] * case["intermediate"])


def roofline_tflops(case: dict, direction: str, ceilings: dict[str, float]) -> float:
    """What the device allows: the products at its matmul rate, or the bytes at its copy bandwidth if that takes longer.

    Bytes, 2 each: the weights 3EHI once per direction, their gradients once. Rows, R = T * K, once per direction:
    forward x, pre-activation, activation and answers, 2H + 3I; backward dout, x, dx, and pre-activation, its gradient
    and the weighted activation, 3H + 5I.
    """
    rows = case["tokens"] * case["top_k"]
    H, I = case["hidden"], case["intermediate"]
    weights = 3 * case["experts"] * H * I
    forward, backward = weights + rows * (2 * H + 3 * I), 2 * weights + rows * (3 * H + 5 * I)
    moved = 2 * {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    arithmetic = flops(case, direction)
    seconds = max(arithmetic / ceilings["matmul_tflops"] / 1e12, moved / ceilings["copy_gbps"] / 1e9)
    return arithmetic / seconds / 1e12


@dataclass(frozen=True)
class Problem:
    """x, dout [T, H]; gate [E, H]; gate_up [E, 2I, H]; down [E, H, I]. All but dout want gradients."""

    x: torch.Tensor
    dout: torch.Tensor
    gate: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    top_k: int

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.gate, self.gate_up, self.down


def make(case: MoeCase, device: str, seed: int = 0) -> Problem:
    """Tokens of unit size and weights that keep it; the last feature is 1 in every token and carries the skew."""
    generator = torch.Generator(device).manual_seed(seed)
    H, I, E = case.hidden, case.intermediate, case.experts

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))
        return values.mul_(scale)

    x, dout = random(case.tokens, H), random(case.tokens, H)
    gate, gate_up, down = (
        random(E, H, scale=H**-0.5),
        random(E, 2 * I, H, scale=H**-0.5),
        random(E, H, I, scale=I**-0.5),
    )
    x[:, -1] = 1
    ranks = 1 + torch.randperm(E, generator=generator, device=device)
    gate[:, -1] = -ranks.float().log() if case.routing == "skewed" else 0
    leaves = (each.requires_grad_() for each in (x, gate, gate_up, down))
    x, gate, gate_up, down = leaves
    return Problem(x, dout, gate, gate_up, down, case.top_k)


def block(problem: Problem, implementation: str) -> Callable[[], torch.Tensor]:
    """The block as a function without arguments: [T, H]."""
    if implementation == "transformers":
        module = transformers_block(problem)
        return lambda: module(problem.x[None])[0]
    if implementation == "sonic-moe":
        return moe_sonic.block(problem)
    return lambda: _tilestack(problem, implementation)


def _tilestack(problem: Problem, implementation: str) -> torch.Tensor:
    logits = F.linear(problem.x, problem.gate)
    routed = router(logits, top_k=problem.top_k)
    return moe(
        problem.x, problem.gate_up, problem.down, routed.topk_ids, routed.topk_weights, implementation=implementation
    )


def transformers_block(problem: Problem, experts_implementation: str = "grouped_mm") -> torch.nn.Module:
    """transformers' own block over the problem's weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    experts, hidden, intermediate = problem.down.shape
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts,
        num_experts_per_tok=problem.top_k, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = experts_implementation
    with torch.device("meta"):
        module = Qwen3MoeSparseMoeBlock(config)
    for owner, name, tensor in (
        (module.gate, "weight", problem.gate),
        (module.experts, "gate_up_proj", problem.gate_up),
        (module.experts, "down_proj", problem.down),
    ):
        del owner._parameters[name]
        setattr(owner, name, tensor)
    return module


def implementations() -> list[str]:
    """tilestack's that run on this machine, then the rivals."""
    device = Device.current()
    own = [each.name for each in ops()["moe"].implementations if each.refuses_machine(device) is None]
    rivals = ["transformers", *(["sonic-moe"] if moe_sonic.is_installed() else [])]
    return [*(name for name in own if name != "reference"), *rivals]


@functools.lru_cache(maxsize=1)
def _problem(case: MoeCase) -> tuple[Problem, moe_check.Truth]:
    problem = make(case, "cuda")
    return problem, moe_check.truth_of(problem)


def work(job: Job) -> list[Row]:
    """One job, in a child process."""
    return {"speed": _speed, "first": _first, "compile": _compile}[job.kind](job)


def _first(job: Job) -> list[Row]:
    problem = make(job.case, "cuda")
    call = block(problem, job.implementation)
    seconds = seconds_of(lambda: torch.autograd.grad(call(), problem.leaves, problem.dout))
    return [Row("moe", job.case.as_dict(), job.implementation, "both", cold_s=seconds)]


def _speed(job: Job) -> list[Row]:
    _free()
    problem, truth = _problem(job.case)
    call = block(problem, job.implementation)
    errors = truth.check(problem, call)
    _free()
    forward, both = _directions(problem, call)
    return [
        _timed(job, "forward", forward, errors["out"]),
        _timed(job, "both", both, max(errors.values())),
    ]


def _compile(job: Job) -> list[Row]:
    problem = make(job.case, "cuda")
    if job.piece is None:
        call, limited = block(problem, job.implementation), contextlib.nullcontext()
    else:
        call, limited = moe_sonic.block(problem, job.piece[0]), moe_sonic.one_product(job.piece)
    with limited:
        for direction in _directions(problem, call):
            direction()
    torch.cuda.synchronize()
    return []


def _directions(problem: Problem, call: Callable[[], torch.Tensor]) -> tuple[Callable, Callable]:
    """The forward alone, without gradients, and forward and backward."""

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return call()

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(call(), problem.leaves, problem.dout)

    return forward, both


def _timed(job: Job, direction: str, call: Callable, error: float) -> Row:
    timing = measure(call, 30, budget_ms=BUDGET_MS)
    return Row(
        "moe", job.case.as_dict(), job.implementation, direction,
        ms_median=timing.median, ms_min=timing.low, ms_max=timing.high,
        tflops=flops(job.case.as_dict(), direction) / timing.median / 1e9,
        tokens_per_s=job.case.tokens / timing.median * 1e3,
        peak_gib=timing.peak_gib, overhead_us=timing.overhead_us, error=error,
    )  # fmt: skip


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def cases(quick: bool = False) -> list[MoeCase]:
    """Every shape, even routing before skewed; with `quick` one."""
    every = [MoeCase(tokens, routing) for routing in ROUTINGS for tokens in TOKENS]
    return every[:1] if quick else every


def run(quick: bool = False, only: list[str] | None = None, folder: Path = FOLDER) -> Path:
    """Check and time every implementation (or `only` these) on every case, print as it goes, write the result file."""
    limits = ceilings()
    _free()
    print(f"ceilings: {limits}", flush=True)
    recorder = Recorder("moe", limits, folder, functools.partial(describe, limits=limits))
    names = [name for name in implementations() if only is None or name in only]
    with no_compiled_kernels():
        for row in _all_rows(names, cases(quick)):
            recorder.add(row)
    return recorder.finish()


def _all_rows(names: list[str], chosen: list[MoeCase]) -> Iterator[Row]:
    """SonicMoE comes last, in processes of its own, without first calls: it may compile for minutes."""
    slow = [name for name in names if name == "sonic-moe"]
    quick = [name for name in names if name not in slow]
    for group, patience in ((quick, PATIENCE_S), (slow, moe_sonic.PATIENCE_S)):
        if not group:
            continue
        if group is quick:
            yield from first_calls(group)
        compile_ahead(chosen, group, patience)
        jobs = [Job(case, name) for case in chosen for name in group]
        for job, result in one_after_another(jobs, work, patience):
            yield from _rows(job, result)


def first_calls(names: list[str]) -> Iterator[Row]:
    """Rows of the first call in a new process, with and without compiled kernels on the disk."""
    jobs = [[Job(MoeCase(COLD_TOKENS), name, "first")] for name in names]
    cold, warm = ([_rows(job, result)[0] for job, result in side_by_side(jobs, work)] for _ in range(2))
    for row, again in zip(cold, warm, strict=True):
        yield dataclasses.replace(row, warm_s=again.cold_s, error=row.error or again.error)


def compile_ahead(chosen: list[MoeCase], names: list[str], patience: float) -> None:
    """Fill the caches on the disk, with a process for each name (SonicMoE: for each product of each candidate, with few
    tokens and experts, which change nothing that is compiled).

    What fails here fails again where it is timed, and is a row there.
    """
    started = time.perf_counter()
    counts = sorted({case.tokens for case in chosen})
    jobs = [[Job(MoeCase(tokens), name, "compile") for tokens in counts] for name in names if name != "sonic-moe"]
    if "sonic-moe" in names:
        jobs += [[Job(MoeCase(256, experts=16), "sonic-moe", "compile", each)] for each in moe_sonic.PIECES]
    for _ in side_by_side(jobs, work, patience):
        pass
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)


def _rows(job: Job, result: list[Row] | str) -> list[Row]:
    if isinstance(result, list):
        return result
    return [Row("moe", job.case.as_dict(), job.implementation, "both", error=result)]


def describe(row: Row, limits: dict[str, float]) -> str:
    """One line for the terminal."""
    what = f"{row.case['tokens']:6} tokens, {row.case['routing']:7} {row.implementation:16} {row.direction:8}"
    if isinstance(row.error, str):
        return f"{what} {row.error}"
    if row.cold_s is not None:
        return f"{what} first call {row.cold_s:.2f} s, in a second process {row.warm_s:.2f} s"
    share = row.tflops / roofline_tflops(row.case, row.direction, limits)
    return (
        f"{what} {row.ms_median:8.3f} ms {row.tflops:5.0f} TFLOP/s, {share:4.0%} of the roofline, "
        f"{row.peak_gib:5.1f} GiB, host {row.overhead_us:5.0f} us  error {row.error:.1e}"
    )
