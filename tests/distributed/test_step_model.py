"""The model of a step's time: what must hold of it whatever the rates are."""

import dataclasses

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from distributed.tiny import tiny_config
from tilestack.bench.scaling import measured
from tilestack.bench.step import qwen3_30b_a3b
from tilestack.distributed.step_model import (
    H100,
    Layout,
    Machine,
    interpolated,
    parameters,
    step_time,
    tflops,
    tokens_per_second,
)

MODEL = qwen3_30b_a3b(48)


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(tie_word_embeddings=True), qwen3_30b_a3b(2)])
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    assert sum(parameters(config)) == sum(each.numel() for each in model.parameters())
    assert parameters(config)[1] == sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)


def test_one_gpu_sends_nothing_and_its_rate_is_the_mean_of_its_parts():
    layout = Layout(zero=0, micro_batch_tokens=16384, update_bytes=0)
    time = step_time(MODEL, layout)
    assert time.communication == time.update == time.recomputed == 0
    assert H100.attention[4096][1] < tflops(MODEL, layout, time) < H100.projections


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_more_gpus_never_make_a_gpu_faster_but_for_its_share_of_the_update(zero):
    layouts = [Layout(gpus=gpus, zero=zero) for gpus in (1, 2, 8, 64, 512)]
    times = [step_time(MODEL, layout) for layout in layouts]
    for fewer, more in zip(times, times[1:], strict=False):
        assert more.communication >= fewer.communication
        assert more.update <= fewer.update and more.copied >= fewer.copied
        computed = [each.total - each.communication - each.update - each.copied for each in (more, fewer)]
        assert computed[0] == pytest.approx(computed[1])


def test_twice_the_links_take_half_of_what_is_sent_where_hops_take_nothing():
    free = {"node_hop": 0.0, "network_hop": 0.0, "host_wait": 0.0, "hidden_share": 0.0}
    slow = dataclasses.replace(H100, **free)
    fast = dataclasses.replace(slow, node_link=2 * slow.node_link, network=2 * slow.network)
    for layout in (
        Layout(gpus=64, zero=1),
        Layout(gpus=64, zero=3),
        Layout(gpus=64, zero=2, expert_parallel=8, expert_chunks=1),
        Layout(gpus=64, zero=3, sequence_parallel=8, checkpointing="full"),
    ):
        before, after = (step_time(MODEL, layout, each) for each in (slow, fast))
        assert before.communication == pytest.approx(2 * after.communication)


def test_split_experts_see_more_rows_and_gather_fewer_weights():
    whole, split = (
        step_time(MODEL, Layout(gpus=8, micro_batch_tokens=4096, expert_parallel=ranks)) for ranks in (1, 8)
    )
    assert split.experts < whole.experts
    assert split.weights_gathered < whole.weights_gathered
    assert split.tokens_sent > 0 == whole.tokens_sent


def test_what_is_computed_again_depends_on_the_checkpointing():
    none, selective, full = (
        step_time(MODEL, Layout(checkpointing=each, micro_batch_tokens=32768, seqlen=32768)).recomputed
        for each in ("none", "selective", "full")
    )
    assert none == 0 < selective < full


def test_ranks_that_share_rows_count_their_part_of_the_tokens():
    layout = Layout(gpus=4, micro_batch_tokens=65536, seqlen=65536, zero=3, sequence_parallel=4)
    time = step_time(MODEL, layout)
    assert tokens_per_second(layout, time) == pytest.approx(65536 / 4 / time.total * 1e3)


def test_a_split_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="expert_parallel = 3 must divide the number of GPUs, 8"):
        step_time(MODEL, Layout(gpus=8, expert_parallel=3))


def test_rates_between_two_measured_ones_lie_between_them():
    machine = Machine({1024: (100, 100), 4096: (300, 300)}, {1: (1, 1)}, 1e9, 1e9, 0, 1e9)
    flops = 6 * 48 * 32 * 128 * 2048 * 4096
    time = step_time(MODEL, Layout(seqlen=2048, zero=0, update_bytes=0), machine)
    assert time.attention == pytest.approx(flops / 200 / 1e9)


def test_the_rates_in_the_code_are_about_those_of_the_result_files():
    # a quarter: kernels are measured anew more often than these figures are rounded again, and they order plans
    found = measured()
    for name in ("projections", "head", "glue_ns", "copy"):
        assert getattr(H100, name) == pytest.approx(getattr(found, name), rel=0.25), name
    for name in ("attention", "experts"):
        for at, pair in getattr(found, name).items():
            assert interpolated(getattr(H100, name), at) == pytest.approx(pair, rel=0.25), f"{name} at {at}"
