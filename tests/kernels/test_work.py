"""The arithmetic and traffic of every op, by hand for small shapes."""

import dataclasses

import pytest

from tilestack.bench.attention_cases import AttentionCase
from tilestack.kernels import ops
from tilestack.kernels.work import Tensors, Work, work


def tensors(size: int = 2, pairs: float | None = None, sizes: dict | None = None, **shapes: tuple[int, ...]) -> Tensors:
    return Tensors(shapes, dict.fromkeys(shapes, size) | (sizes or {}), pairs)


SHAPES = {
    "rms_norm": tensors(x=(1, 10, 8), weight=(8,)),
    "swiglu": tensors(gate=(10, 8), up=(10, 8)),
    "qk_norm_rope": tensors(
        q=(1, 10, 4, 8), k=(1, 10, 2, 8), q_weight=(8,), k_weight=(8,), cos=(1, 10, 8), sin=(1, 10, 8)
    ),
    "attention": tensors(q=(2, 10, 4, 8), k=(2, 10, 2, 8), v=(2, 10, 2, 8)),
    "router": tensors(logits=(10, 16)),
    "sort_routes": tensors(4, topk_ids=(10, 2)),
    "moe": tensors(x=(10, 8), gate_up=(4, 12, 8), down=(4, 8, 6), topk_ids=(10, 2), topk_weights=(10, 2)),
    "linear_cross_entropy": tensors(hidden=(10, 8), weight=(30, 8), labels=(10,)),
    "adamw": tensors(param=(7, 5), grad=(7, 5), exp_avg=(7, 5), exp_avg_sq=(7, 5)),
}


@pytest.mark.parametrize("op", SHAPES)
def test_every_op_has_its_work_and_backward_has_it_where_there_is_one(op):
    found = work(op, SHAPES[op])
    assert found.forward_bytes > 0
    assert (found.backward_bytes > 0) == getattr(ops()[op].contract, "differentiable", False)


def test_an_op_that_is_not_in_the_table_has_no_work():
    assert work("none", SHAPES["router"]) is None


@pytest.mark.parametrize("case", [AttentionCase(4, 4096), AttentionCase(1, 30, layout="packed", lengths=(10, 20))])
def test_the_arithmetic_of_attention_is_that_of_its_benchmark(case):
    rows = (case.batch, case.seqlen) if case.lengths is None else (case.seqlen,)
    pairs = None if case.lengths is None else sum(length**2 for length in case.lengths) / 2
    q, kv = (*rows, case.heads, case.head_dim), (*rows, case.kv_heads, case.head_dim)
    found = work("attention", tensors(pairs=pairs, q=q, k=kv, v=kv))
    assert found.forward_flops == case.flops("forward") and found.backward_flops == case.flops("backward")


def test_experts_are_three_products_forward_and_six_backward():
    found = work("moe", SHAPES["moe"])
    assert found.forward_flops == 3 * 2 * (10 * 2) * 8 * 6 and found.backward_flops == 2 * found.forward_flops


def test_only_routes_to_experts_that_are_here_count_where_other_ranks_sent_the_rows():
    whole, here = SHAPES["moe"], dataclasses.replace(SHAPES["moe"], routes=5)
    assert work("moe", here).forward_flops == 3 * 2 * 5 * 8 * 6 == work("moe", whole).forward_flops / 4
    assert work("moe", here).forward_bytes < work("moe", whole).forward_bytes
    assert work("moe", dataclasses.replace(whole, routes=256)) == work("moe", whole)  # a bound above all that there are


def test_the_head_is_one_product_forward_and_two_backward():
    found = work("linear_cross_entropy", SHAPES["linear_cross_entropy"])
    assert found.forward_flops == 2 * 10 * 8 * 30 and found.backward_flops == 2 * found.forward_flops


def test_adamw_moves_28_bytes_a_parameter_in_bfloat16_and_in_float32_alike():
    shape = (7, 5)
    states = {"exp_avg": 4, "exp_avg_sq": 4, "master": 4}
    low = tensors(2, sizes=states, param=shape, grad=shape, exp_avg=shape, exp_avg_sq=shape, master=shape)
    assert work("adamw", low) == Work(0, 28 * 35)
    full = tensors(4, param=shape, grad=shape, exp_avg=shape, exp_avg_sq=shape)
    assert work("adamw", full) == Work(0, 28 * 35)


def test_adamw_with_8_bit_moments_and_no_master_moves_10_bytes_a_parameter_and_its_scales():
    shape, one = (4, 256), {"exp_avg": 1, "exp_avg_sq": 1, "exp_avg_scale": 4, "exp_avg_sq_scale": 4}
    scales = {"exp_avg_scale": (4,), "exp_avg_sq_scale": (4,)}
    moved = tensors(2, sizes=one, param=shape, grad=shape, exp_avg=shape, exp_avg_sq=shape, **scales)
    assert work("adamw", moved) == Work(0, 10 * 1024 + 2 * 2 * 4 * 4)


def test_the_residual_of_rms_norm_is_read_and_the_sum_written():
    x = (10, 8)
    plain, added = work("rms_norm", tensors(x=x, weight=(8,))), work("rms_norm", tensors(x=x, weight=(8,), residual=x))
    one = 2 * 10 * 8
    assert added.forward_bytes - plain.forward_bytes == 2 * one and added.backward_bytes - plain.backward_bytes == one
