"""`tilestack bench attention`: forward and backward of every implementation over sequence lengths, in one run.

Each rival is called by its own function, so that our adapters cost it nothing. The backward is timed alone, on a graph
that is kept. Host time is that of forward and backward of a tiny shape. Cold is the first forward and backward of a new
process without any compiled kernel on the disk, warm the same again in a second process. Then all other kernels are
compiled, side by side, before anything is timed.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tilestack.bench import attention_check
from tilestack.bench.attention_cases import COLD, TINY, AttentionCase, cases, make
from tilestack.bench.first_call import no_compiled_kernels, seconds_of
from tilestack.bench.isolated import one_after_another, side_by_side
from tilestack.bench.results import FOLDER, Recorder, Row
from tilestack.bench.timing import ceilings, host_microseconds, measure
from tilestack.kernels import ops
from tilestack.kernels.device import Device
from tilestack.kernels.dispatch import Call, TensorSpec

LEFT_OUT = ("reference", "sdpa-efficient")  # quadratic memory; the slowest of torch's, without grouped heads
COMPILED = ("tilestack", "tilestack-triton", "flash-attn-4")  # what compiles at its first call
BUDGET_MS = 80.0


@dataclass(frozen=True)
class Job:
    """kind: "speed", "host" or "first"."""

    case: AttentionCase
    implementation: str
    kind: str = "speed"


def takers(case: AttentionCase) -> list[str]:
    """The implementations on this machine that take the case, gradients included."""
    shapes = {"q": case.heads, "k": case.kv_heads, "v": case.kv_heads}
    rows = (case.seqlen,) if case.lengths else (case.batch, case.seqlen)
    specs = {
        name: TensorSpec.contiguous((*rows, heads, case.head_dim), getattr(torch, case.dtype))
        for name, heads in shapes.items()
    }
    offsets = TensorSpec.contiguous((len(case.lengths) + 1,), torch.int32) if case.lengths else None
    op = ops()["attention"]
    longest = max(case.sequences) if case.lengths else -1
    params = op.contract.params(
        case.head_dim**-0.5, case.causal, case.window[0], 0 if case.causal else case.window[1], longest, longest,
        case.deterministic,
    )  # fmt: skip
    call = Call(Device.current(), {**specs, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}, params, True)
    return [name for name, reason in op.reasons(call).items() if reason is None and name not in LEFT_OUT]


def caller(case: AttentionCase, implementation: str, tensors: dict[str, torch.Tensor | None]) -> Callable:
    """(q, k, v) -> out, by the library's own function."""
    if implementation == "flash-attn-4":
        return _flash_attn_4(case, tensors)
    if implementation == "cudnn":
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        return _torch(lambda q, k, v: cudnn(q, k, v, None, True, 0.0, case.causal)[0])
    if implementation == "sdpa-flash":
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return _torch(lambda q, k, v: flash(q, k, v, 0.0, case.causal)[0])
    return attention_check.ours(case, tensors, implementation)


def _torch(function: Callable) -> Callable:
    """What scaled_dot_product_attention runs, over its layout [B, H, S, D]."""
    return lambda q, k, v: function(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2)


def _flash_attn_4(case: AttentionCase, tensors: dict[str, torch.Tensor | None]) -> Callable:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    options = {"causal": case.causal, "deterministic": case.deterministic}
    if case.window[0] >= 0:
        options["window_size"] = case.window
    cu = tensors["cu_seqlens"]
    if cu is not None:
        longest = max(case.sequences)
        options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
    function = flash_attn_func if cu is None else flash_attn_varlen_func

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = function(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return call


@functools.lru_cache(maxsize=1)
def _problem(case: AttentionCase) -> tuple[dict[str, torch.Tensor | None], attention_check.Truth]:
    tensors = make(case, "cuda")
    return tensors, attention_check.truth_of(case, tensors)


def work(job: Job) -> list[Row]:
    """One job, in a child process."""
    return {"speed": _speed, "host": _host, "first": _first}[job.kind](job)


def _speed(job: Job) -> list[Row]:
    _free()
    tensors, truth = _problem(job.case)
    call = caller(job.case, job.implementation, tensors)
    found = attention_check.run(call, tensors)
    errors = truth.check(job.case, found)
    if job.case.deterministic:
        again = attention_check.run(call, tensors)
        assert all(torch.equal(found[name], again[name]) for name in found), "a second run gave other bits"
        del again
    del found
    _free()
    leaves = [tensors[name] for name in ("q", "k", "v")]
    out = call(*leaves)
    directions = {
        "forward": (lambda: call(*leaves), errors["out"]),
        "backward": (
            lambda: torch.autograd.grad(out, leaves, tensors["dout"], retain_graph=True),
            max(errors["dq"], errors["dk"], errors["dv"]),
        ),
    }
    return [_timed(job, direction, timed, error) for direction, (timed, error) in directions.items()]


def _timed(job: Job, direction: str, call: Callable, error: float) -> Row:
    timing = measure(call, 40, budget_ms=BUDGET_MS)
    return Row(
        "attention", job.case.as_dict(), job.implementation, direction,
        ms_median=timing.median, ms_min=timing.low, ms_max=timing.high,
        tflops=job.case.flops(direction) / timing.median / 1e9, peak_gib=timing.peak_gib, error=error,
    )  # fmt: skip


def _forward_and_backward(job: Job) -> Callable[[], object]:
    tensors = make(job.case, "cuda")
    call = caller(job.case, job.implementation, tensors)
    leaves = [tensors[name] for name in ("q", "k", "v")]
    return lambda: torch.autograd.grad(call(*leaves), leaves, tensors["dout"])


def _host(job: Job) -> list[Row]:
    overhead = host_microseconds(_forward_and_backward(job))
    return [Row("attention", job.case.as_dict(), job.implementation, "both", overhead_us=overhead)]


def _first(job: Job) -> list[Row]:
    seconds = seconds_of(_forward_and_backward(job))
    return [Row("attention", job.case.as_dict(), job.implementation, "both", cold_s=seconds)]


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def first_calls(implementations: list[str]) -> Iterator[Row]:
    """Rows of the first call in a new process, with and without compiled kernels on the disk."""
    jobs = [[Job(COLD, name, "first")] for name in implementations]
    cold, warm = ([_rows(job, result)[0] for job, result in side_by_side(jobs, work)] for _ in range(2))
    for row, again in zip(cold, warm, strict=True):
        yield dataclasses.replace(row, warm_s=again.cold_s, error=row.error or again.error)


def compile_ahead(jobs: list[Job]) -> None:
    """Fill the caches on the disk: the first and the last case of every kind of shape, a process for each kind.

    What fails here fails again where it is timed, and is a row there.
    """
    groups: dict[tuple, list[Job]] = {}
    for job in jobs:
        if job.implementation in COMPILED:
            kind = dataclasses.replace(job.case, batch=0, seqlen=0, lengths=None)
            groups.setdefault((job.implementation, kind), []).append(dataclasses.replace(job, kind="first"))
    ends = [list(dict.fromkeys((group[0], group[-1]))) for group in groups.values()]
    for _ in side_by_side(ends, work):
        pass


def _rows(job: Job, result: list[Row] | str) -> list[Row]:
    if isinstance(result, list):
        return result
    return [Row("attention", job.case.as_dict(), job.implementation, "both", error=result)]


def run(quick: bool = False, only: list[str] | None = None, folder: Path = FOLDER) -> Path:
    """Check and time every implementation (or `only` these) on every case, print as it goes, write the result file."""
    limits = ceilings()
    _free()
    print(f"ceilings: {limits}", flush=True)
    recorder = Recorder("attention", limits, folder, describe)
    with no_compiled_kernels():
        for row in _all_rows(quick, only):
            recorder.add(row)
    return recorder.finish()


def _all_rows(quick: bool, only: list[str] | None) -> Iterator[Row]:
    jobs = [
        Job(case, name, "host" if case is TINY else "speed")
        for case in (TINY, *cases(quick))
        for name in takers(case)
        if only is None or name in only
    ]
    if not quick:
        yield from first_calls([name for name in takers(COLD) if only is None or name in only])
    started = time.perf_counter()
    compile_ahead(jobs)
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    for job, result in one_after_another(jobs, work):
        yield from _rows(job, result)


def shape(case: dict) -> str:
    """A case in a few words."""
    lengths = f"packed, {len(case['lengths'])} documents" if case["lengths"] else f"{case['batch']} x {case['seqlen']}"
    words = [lengths, f"{case['heads']}/{case['kv_heads']} heads of {case['head_dim']}"]
    words += ["causal"] * case["causal"] + ["deterministic"] * case["deterministic"]
    words += [f"window of {case['window'][0] + 1}"] * (case["window"][0] >= 0)
    return ", ".join(words)


def describe(row: Row) -> str:
    """One line for the terminal."""
    what = f"{shape(row.case):58} {row.implementation:16} {row.direction:8}"
    if isinstance(row.error, str):
        return f"{what} {row.error}"
    if row.overhead_us is not None:
        return f"{what} host {row.overhead_us:.0f} us"
    if row.cold_s is not None:
        return f"{what} first call {row.cold_s:.2f} s, in a second process {row.warm_s:.2f} s"
    spread = (row.ms_max - row.ms_min) / row.ms_median
    return f"{what} {row.ms_median:8.3f} ms (spread {spread:4.0%}) {row.tflops:5.0f} TFLOP/s  error {row.error:.1e}"
