"""moe in Triton: grouped products over routes sorted by expert. README.md has the schedule.

A row is a route in sorted order, R = T * K of them. Every grid is a bound that the host knows (how many rows an expert
has stays on the device); programs beyond the last row leave at once. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.device import Device
from tilestack.kernels.dispatch import Call
from tilestack.kernels.moe.combine import combine
from tilestack.kernels.moe.configs import (
    BLOCK_UNITS,
    MAX_TOP_K,
    ROW_BLOCKS_CHUNK,
    ROW_WARPS,
    Tile,
    tiles,
)
from tilestack.kernels.sort_routes import triton_portable as sorting
from tilestack.kernels.sort_routes.op import SortRoutesParams
from tilestack.kernels.triton_numerics import exponential

AUXILIARY = ("pre_activation", "expert_offsets", "sorted_to_route", "route_to_sorted")
SAVED = ("x", "gate_up", "down", "topk_weights", "gate_up_grad", "down_grad", *AUXILIARY)


def refuses(call: Call) -> str | None:
    experts, hidden, intermediate = call.shape("down")
    top_k = call.shape("topk_ids")[1]
    if call.dtype("x") == torch.float64:
        return "has no float64 path"
    if top_k > MAX_TOP_K:
        return f"sums a token's routes in one go, up to K = {MAX_TOP_K}, got {top_k}"
    if experts > sorting.MAX_EXPERTS:
        return f"sorts up to E = {sorting.MAX_EXPERTS} experts, got {experts}"
    if 2 * intermediate * hidden >= 2**31:
        return f"counts within one expert's weight in 32 bits, got 2I * H = {2 * intermediate * hidden}"
    return None


@triton.jit
def moe_row_blocks_kernel(
    expert_offsets_ptr, block_expert_ptr, block_row_ptr, n_blocks, E,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # cuts each expert's rows into blocks of BLOCK_M: the expert (-1 behind the last) and the first row of each block
    experts = tl.arange(0, EXPERTS)
    starts = tl.load(expert_offsets_ptr + experts, mask=experts < E, other=0)
    ends = tl.load(expert_offsets_ptr + experts + 1, mask=experts < E, other=0)
    blocks = (ends - starts + BLOCK_M - 1) // BLOCK_M
    block_ends = tl.cumsum(blocks, 0)
    block = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    is_owner = (block_ends - blocks)[None, :] <= block[:, None]
    is_owner = is_owner & (block[:, None] < block_ends[None, :])
    owner = tl.sum(tl.where(is_owner, experts[None, :] + 1, 0), 1) - 1
    first_row = (starts - (block_ends - blocks) * BLOCK_M)[None, :] + block[:, None] * BLOCK_M
    row = tl.sum(tl.where(is_owner, first_row, 0), 1)
    tl.store(block_expert_ptr + block, owner, mask=block < n_blocks)
    tl.store(block_row_ptr + block, row, mask=block < n_blocks)


@triton.jit
def _add_product(acc, a, b):
    """acc + a @ b. In float32 the product is summed for itself: as one long chain of multiply-adds, every step of the
    whole sum would round at its full size. (Triton makes that chain of `acc + dot`, but not of a difference.)"""
    if a.dtype == tl.float32:
        return acc - tl.dot(-a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _sigmoid(x, PRECISE: tl.constexpr):
    """1 / (1 + e to the -x). Precisely: exponents round at their full size, which float32's gradients would show, so
    that what e to the -|x| lost is multiplied back."""
    if PRECISE:
        small = exponential(-tl.abs(x), "ieee")
        return tl.div_rn(tl.where(x < 0, small, 1.0), 1.0 + small)
    else:
        return tl.sigmoid(x)


@triton.jit
def _multiply(
    a_ptrs, b_ptrs, stride_b, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """a [BLOCK_M, depth] @ b [depth, BLOCK_N] in float32; a's columns are contiguous, b's rows lie stride_b apart."""
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, depth, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(k + offs_k < depth)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(k + offs_k < depth)[:, None], other=0.0)
        acc = _add_product(acc, a, b)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_b
    return acc


@triton.jit
def moe_up_fwd_kernel(
    x_ptr, gate_up_ptr, pre_activation_ptr, activated_ptr,
    block_expert_ptr, block_row_ptr, expert_offsets_ptr, sorted_to_route_ptr, stride_x, H, I,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    WANT_PRE: tl.constexpr, WANT_ACTIVATED: tl.constexpr,
):  # fmt: skip
    # pre_activation[row] = gate_up[e] @ x[token], activated[row] = silu(gate) * up
    BLOCK_I: tl.constexpr = BLOCK_N // 2
    n_tiles = tl.cdiv(I, BLOCK_I)
    block = tl.program_id(0) // n_tiles  # the tiles of one row block run side by side and share its rows in L2
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    offs_m = tl.arange(0, BLOCK_M)
    first_row = tl.load(block_row_ptr + block)
    rows = first_row + offs_m
    is_row = rows < tl.load(expert_offsets_ptr + expert + 1)
    token = tl.load(sorted_to_route_ptr + rows, mask=is_row, other=0) // TOP_K
    offs_k = tl.arange(0, BLOCK_K)
    first_unit = (tl.program_id(0) % n_tiles) * BLOCK_I
    # even columns are gates, odd ones ups: a thread then holds both of a unit, and the activation costs no exchange
    column = tl.arange(0, BLOCK_N)
    weight_row = tl.minimum(first_unit + column // 2, I - 1) + (column % 2) * I
    a_ptrs = x_ptr + token.to(tl.int64)[:, None] * stride_x + offs_k[None, :]
    b_ptrs = gate_up_ptr + expert.to(tl.int64) * 2 * I * H + weight_row[None, :] * H + offs_k[:, None]
    acc = _multiply(a_ptrs, b_ptrs, 1, H, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)

    gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_I, 2)))
    dtype = activated_ptr.dtype.element_ty
    units = first_unit + tl.arange(0, BLOCK_I)
    inside = is_row[:, None] & (units < I)[None, :]
    first_offset = first_row.to(tl.int64) * I
    if WANT_ACTIVATED:
        activated_ptrs = activated_ptr + first_offset + (offs_m[:, None] * I + units[None, :])
        activated = gate * _sigmoid(gate, dtype == tl.float32) * up
        tl.store(activated_ptrs, activated.to(dtype), mask=inside)
    if WANT_PRE:
        pre_ptrs = pre_activation_ptr + 2 * first_offset + (offs_m[:, None] * 2 * I + units[None, :])
        tl.store(pre_ptrs, gate.to(dtype), mask=inside)
        tl.store(pre_ptrs + I, up.to(dtype), mask=inside)


@triton.jit
def moe_rows_kernel(
    a_ptr, weight_ptr, out_ptr, block_expert_ptr, block_row_ptr, expert_offsets_ptr, sorted_to_route_ptr,
    stride_a, stride_weight_e, stride_weight_k, stride_weight_n, N, K, TOP_K: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    # out[row] = a[token if GATHER else row] @ weight[e], weight[e] read as [K, N] through its strides
    n_tiles = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) // n_tiles
    expert = tl.load(block_expert_ptr + block)
    if expert < 0:
        return
    offs_m = tl.arange(0, BLOCK_M)
    first_row = tl.load(block_row_ptr + block)
    rows = first_row + offs_m
    end = tl.load(expert_offsets_ptr + expert + 1)
    is_row = rows < end
    source = tl.minimum(rows, end - 1)
    if GATHER:
        source = tl.load(sorted_to_route_ptr + source) // TOP_K
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptrs = a_ptr + source.to(tl.int64)[:, None] * stride_a + offs_k[None, :]
    b_ptrs = weight_ptr + expert.to(tl.int64) * stride_weight_e
    column = offs_n % N  # stays inside; unlike a minimum, it lets the compiler see runs of 16 bytes
    b_ptrs = b_ptrs + offs_k[:, None] * stride_weight_k + column[None, :] * stride_weight_n
    acc = _multiply(a_ptrs, b_ptrs, stride_weight_k, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    offs = first_row.to(tl.int64) * N + (offs_m[:, None] * N + offs_n[None, :])
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & (offs_n < N)[None, :])


@triton.jit
def moe_weights_bwd_kernel(
    a_ptr, b_ptr, dweight_ptr, expert_offsets_ptr, sorted_to_route_ptr, stride_a, stride_b, M, N,
    TOP_K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    # dweight[e] [M, N] = sum over the rows of e of a[row] (outer) b[row]; one of the two is gathered by token
    n_tiles = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) % (tl.cdiv(M, BLOCK_M) * n_tiles)
    expert = tl.program_id(0) // (tl.cdiv(M, BLOCK_M) * n_tiles)  # the tiles of one expert share its rows in L2
    offs_m = (tile // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tile % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (offs_m % M)[:, None]  # stays inside; unlike a minimum, it lets the compiler see runs of 16 bytes
    b_ptrs = b_ptr + (offs_n % N)[None, :]
    end = tl.load(expert_offsets_ptr + expert + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = tl.load(expert_offsets_ptr + expert)
    route = tl.load(sorted_to_route_ptr + first + offs_k, mask=first + offs_k < end, other=0)
    for start in range(first, end, BLOCK_K):
        rows = start + offs_k
        is_row = rows < end
        token = route // TOP_K
        # one step ahead, so that the loads that need it do not wait for it
        route = tl.load(sorted_to_route_ptr + rows + BLOCK_K, mask=rows + BLOCK_K < end, other=0)
        row_a = token if GATHER_A else rows
        row_b = token if GATHER_B else rows
        # both are masked: what lies behind the end may be another expert's NaN
        a = tl.load(a_ptrs + row_a.to(tl.int64)[None, :] * stride_a, mask=is_row[None, :], other=0.0)
        b = tl.load(b_ptrs + row_b.to(tl.int64)[:, None] * stride_b, mask=is_row[:, None], other=0.0)
        acc = _add_product(acc, a, b)
    offs = expert.to(tl.int64) * M * N + offs_m[:, None] * N + offs_n[None, :]
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if ADD:
        acc += tl.load(dweight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    tl.store(dweight_ptr + offs, acc.to(dweight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def moe_swiglu_bwd_kernel(
    pre_activation_ptr, dactivated_ptr, weights_ptr, sorted_to_route_ptr, expert_offsets_ptr,
    dpre_activation_ptr, weighted_ptr, dweights_ptr, E, I, BLOCK_I: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, WANT_DPRE: tl.constexpr, WANT_WEIGHTED: tl.constexpr, WANT_DWEIGHTS: tl.constexpr,
):  # fmt: skip
    # One row. With a = silu(gate) * up, w the route's weight and da = down[e]^T @ dout[token], not yet weighted:
    #   dweight = <da, a>;  weighted = w * a, for ddown;  dgate = w * da * up * silu'(gate);  dup = w * da * silu(gate)
    row = tl.program_id(0)
    if row >= tl.load(expert_offsets_ptr + E):
        return
    route = tl.load(sorted_to_route_ptr + row)
    row = row.to(tl.int64)
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + route)
    dweight = tl.zeros([BLOCK_I], tl.float32)
    for start in range(0, I, BLOCK_I):
        units = start + tl.arange(0, BLOCK_I)
        inside = units < I
        gate = tl.load(pre_activation_ptr + row * 2 * I + units, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(pre_activation_ptr + row * 2 * I + I + units, mask=inside, other=0.0).to(tl.float32)
        sigmoid = _sigmoid(gate, pre_activation_ptr.dtype.element_ty == tl.float32)
        silu = gate * sigmoid
        if WANT_WEIGHTED:
            weighted = (silu * up * weight).to(weighted_ptr.dtype.element_ty)
            tl.store(weighted_ptr + row * I + units, weighted, mask=inside)
        if WANT_DPRE or WANT_DWEIGHTS:
            dactivated = tl.load(dactivated_ptr + row * I + units, mask=inside, other=0.0).to(tl.float32)
        if WANT_DWEIGHTS:
            dweight += dactivated * silu * up
        if WANT_DPRE:
            dactivated *= weight
            dgate = dactivated * up * (sigmoid + silu * (1.0 - sigmoid))
            dpre_ptrs = dpre_activation_ptr + row * 2 * I + units
            tl.store(dpre_ptrs, dgate.to(dpre_activation_ptr.dtype.element_ty), mask=inside)
            tl.store(dpre_ptrs + I, (dactivated * silu).to(dpre_activation_ptr.dtype.element_ty), mask=inside)
    if WANT_DWEIGHTS:
        tl.store(dweights_ptr + route, tl.sum(dweight, 0))


class _Grouped:
    """The grouped products of one call: the routes sorted by expert, cut into blocks of rows. rows: so many at most."""

    def __init__(self, x: torch.Tensor, experts: int, sorted_routes: tuple[torch.Tensor, ...], rows: int):
        self.expert_offsets, self.sorted_to_route, self.route_to_sorted = sorted_routes
        self.experts, self.rows = experts, rows
        self.top_k = self.sorted_to_route.numel() // x.shape[0]
        self.tiles = tiles(Device.of(x.device), x.dtype)
        block_m = self.tiles.rows.m
        self.n_blocks = self.rows // block_m + min(experts, self.rows)  # every expert may end in a partial block
        self.block_expert, self.block_row = (self.expert_offsets.new_empty(self.n_blocks) for _ in range(2))
        with launch.on_device(x):
            launch.run(
                moe_row_blocks_kernel, (launch.cdiv(self.n_blocks, ROW_BLOCKS_CHUNK),),
                self.expert_offsets, self.block_expert, self.block_row, self.n_blocks, experts,
                EXPERTS=launch.next_power_of_2(experts), BLOCK_M=block_m, CHUNK=ROW_BLOCKS_CHUNK, num_warps=4,
            )  # fmt: skip

    def up(
        self, x: torch.Tensor, gate_up: torch.Tensor, *, pre: bool = True, activate: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """pre_activation [R, 2I] and activated [R, I]; one that is not wanted is empty."""
        units, hidden = gate_up.shape[1] // 2, x.shape[1]
        pre_activation = x.new_empty((self.rows if pre else 0, 2 * units))
        activated = x.new_empty((self.rows if activate else 0, units))
        flat, tile = launch.rows(x), self.tiles.up
        with launch.on_device(x):
            launch.run(
                moe_up_fwd_kernel, (self.n_blocks * launch.cdiv(units, tile.n // 2),),
                flat, gate_up.contiguous(), pre_activation, activated,
                self.block_expert, self.block_row, self.expert_offsets, self.sorted_to_route,
                flat.stride(0), hidden, units, TOP_K=self.top_k, **_blocks(tile), EVEN_K=hidden % tile.k == 0,
                WANT_PRE=pre, WANT_ACTIVATED=activate,
            )  # fmt: skip
        return pre_activation, activated

    def multiply(self, a: torch.Tensor, weight: torch.Tensor, *, gather: bool = False) -> torch.Tensor:
        """[R, N]: a [R, K] (or [T, K], to be gathered by token) times weight [E, K, N], of any strides."""
        _, depth, width = weight.shape
        out = a.new_empty((self.rows, width))
        flat, tile = launch.rows(a), self.tiles.rows
        with launch.on_device(a):
            launch.run(
                moe_rows_kernel, (self.n_blocks * launch.cdiv(width, tile.n),),
                flat, weight, out, self.block_expert, self.block_row, self.expert_offsets, self.sorted_to_route,
                flat.stride(0), *weight.stride(), width, depth,
                TOP_K=self.top_k, GATHER=gather, **_blocks(tile), EVEN_K=depth % tile.k == 0,
            )  # fmt: skip
        return out

    def outer(
        self, a: torch.Tensor, b: torch.Tensor, *, gather: str, total: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[E, M, N]: for each expert the sum over its rows of a (outer) b; the one named is gathered by token.

        It is added to `total`, if there is one."""
        height, width = a.shape[1], b.shape[1]
        out = a.new_empty((self.experts, height, width)) if total is None else total
        flat_a, flat_b, tile = launch.rows(a), launch.rows(b), self.tiles.weights
        with launch.on_device(a):
            launch.run(
                moe_weights_bwd_kernel, (self.experts * launch.cdiv(height, tile.m) * launch.cdiv(width, tile.n),),
                flat_a, flat_b, out, self.expert_offsets, self.sorted_to_route, flat_a.stride(0), flat_b.stride(0),
                height, width, TOP_K=self.top_k, GATHER_A=gather == "a", GATHER_B=gather == "b", **_blocks(tile),
                ADD=total is not None,
            )  # fmt: skip
        return out

    def swiglu_backward(
        self,
        pre_activation: torch.Tensor,
        dactivated: torch.Tensor | None,
        weights: torch.Tensor | None,
        needs: set[str],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """dpre_activation [R, 2I], weighted activation [R, I] and dtopk_weights [T, K]; None where not needed."""
        units = pre_activation.shape[1] // 2
        want_dpre, want_weighted = "x" in needs or "gate_up" in needs, "down" in needs
        dpre_activation = pre_activation.new_empty((self.rows, 2 * units)) if want_dpre else None
        weighted = pre_activation.new_empty((self.rows, units)) if want_weighted else None
        # zeros: a route to another rank's expert has no row
        dweights = torch.zeros_like(weights).contiguous() if "topk_weights" in needs else None
        unused = pre_activation
        pointers = (unused if each is None else each for each in (dpre_activation, weighted, dweights))
        with launch.on_device(pre_activation):
            launch.run(
                moe_swiglu_bwd_kernel, (self.rows,),
                pre_activation, unused if dactivated is None else dactivated,
                unused if weights is None else weights.contiguous(), self.sorted_to_route, self.expert_offsets,
                *pointers, self.experts, units, BLOCK_I=min(BLOCK_UNITS, launch.next_power_of_2(units)),
                HAS_WEIGHTS=weights is not None, WANT_DPRE=want_dpre, WANT_WEIGHTED=want_weighted,
                WANT_DWEIGHTS=dweights is not None, num_warps=ROW_WARPS,
            )  # fmt: skip
        return dpre_activation, weighted, dweights


def _blocks(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def fake_auxiliary(x, gate_up, down, topk_ids, topk_weights, gate_up_grad, down_grad, params):
    routes = topk_ids.shape[0] * topk_ids.shape[1]
    offsets = (x.new_empty((n,), dtype=torch.int32) for n in (down.shape[0] + 1, routes, routes))
    return x.new_empty((params.bound(routes) if params.keep else 0, gate_up.shape[1])), *offsets


@launch.together
def forward(x, gate_up, down, topk_ids, topk_weights, gate_up_grad, down_grad, params):
    experts = down.shape[0]
    sorted_routes = sorting.forward(topk_ids, SortRoutesParams(experts))
    if topk_ids.numel() == 0:
        return x.new_empty(x.shape), x.new_empty((0, gate_up.shape[1])), *sorted_routes
    grouped = _Grouped(x, experts, sorted_routes, params.bound(topk_ids.numel()))
    pre_activation, activated = grouped.up(x, gate_up, pre=params.keep)
    answers = grouped.multiply(activated, down.mT)
    return combine(answers, topk_weights, grouped.route_to_sorted, grouped.top_k), pre_activation, *sorted_routes


@launch.together
def backward(
    dout, x, gate_up, down, topk_weights, gate_up_grad, down_grad, pre_activation, *sorted_routes, needs, params
):
    named = {"x": x, "gate_up": gate_up, "down": down, "topk_weights": topk_weights}
    if sorted_routes[1].numel() == 0:
        return tuple(torch.zeros_like(named[name], memory_format=torch.contiguous_format) for name in needs)
    totals = {"gate_up": gate_up_grad, "down": down_grad}
    wanted = {*needs, *(name for name, total in totals.items() if total is not None)}
    grouped = _Grouped(x, down.shape[0], sorted_routes, params.bound(sorted_routes[1].numel()))
    if not pre_activation.shape[0]:
        pre_activation, _ = grouped.up(x, gate_up, activate=False)
    dactivated = grouped.multiply(dout, down, gather=True) if wanted != {"down"} else None
    dpre_activation, weighted, dtopk_weights = grouped.swiglu_backward(pre_activation, dactivated, topk_weights, wanted)
    del dactivated
    found = {"topk_weights": dtopk_weights}
    if "down" in wanted:
        found["down"] = grouped.outer(dout, weighted, gather="a", total=down_grad)
    del weighted
    if "gate_up" in wanted:
        found["gate_up"] = grouped.outer(dpre_activation, x, gather="b", total=gate_up_grad)
    if "x" in needs:
        answers = grouped.multiply(dpre_activation, gate_up)
        found["x"] = combine(answers, None, grouped.route_to_sorted, grouped.top_k)
    return tuple(found[name] for name in needs)
