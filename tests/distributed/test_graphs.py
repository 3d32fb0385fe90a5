"""Recorded steps of the local engine. Recording itself needs a GPU; here a recording calls its function again."""

import pytest
import torch

from distributed.tiny import micro_batch, tiny_model
from tilestack.distributed import DistributedConfig, OptimizerConfig, make_engine
from tilestack.distributed.graphs import FEWEST_DOCUMENTS, WARM_UP, StepGraphs

OPTIMIZER = OptimizerConfig(lr=1e-2, max_grad_norm=0.5)
LENGTHS = ((20, 28), (48,), (1,) * 40 + (8,), (10, 30, 8))  # 48 tokens each; more documents than FEWEST_DOCUMENTS once


class Repeated:
    """Stands for a recording: nothing runs while it is made, the function runs at each replay."""

    def __init__(self, function, pool):
        self.replay = function


def engine_of(dtype, accumulation):
    return make_engine(tiny_model(dtype), OPTIMIZER, DistributedConfig(engine="local"), accumulation)


def batches_of(step, accumulation):
    batches = [micro_batch(10 * step + i, LENGTHS[(step + i) % len(LENGTHS)]) for i in range(accumulation)]
    return [batch | {"num_items": 40 + step} for batch in batches]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_train_as_eager_ones(dtype, accumulation):
    eager, replayed = engine_of(dtype, accumulation), engine_of(dtype, accumulation)
    eager.train_step(batches_of(0, accumulation), lr=1e-2)
    replayed.train_step(batches_of(0, accumulation), lr=1e-2)
    replayed.graphs = StepGraphs(replayed, Repeated)
    results = []
    for step in range(1, 9):
        batches, lr = batches_of(step, accumulation), 1e-2 / step
        results.append([engine.train_step(batches, lr) for engine in (eager, replayed)])
    for right, found in results:  # read at the end: nothing of a result may be written over by a later step
        torch.testing.assert_close(found.loss, right.loss, rtol=2e-5 if dtype == torch.float32 else 2e-3, atol=0)
        torch.testing.assert_close(
            found.grad_norm, right.grad_norm, rtol=1e-3 if dtype == torch.float32 else 0.05, atol=0
        )
        torch.testing.assert_close(found.expert_load.sum(), torch.tensor(1.0))
    assert replayed.updates == eager.updates == 9
    assert set(replayed.graphs.recorded) >= {"update", (48, FEWEST_DOCUMENTS)}
    assert set(replayed.graphs.inputs) == {(48, FEWEST_DOCUMENTS), (48, 64)}


def test_a_step_whose_gradient_is_not_finite_is_left_out():
    engine = engine_of(torch.bfloat16, 1)
    engine.train_step(batches_of(0, 1), lr=1e-2)
    engine.graphs = StepGraphs(engine, Repeated)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    with torch.no_grad():
        engine.model.model.norm.weight[0] = float("nan")
    assert not engine.train_step(batches_of(1, 1), lr=1e-2).grad_norm.isfinite()
    for name, parameter in engine.model.named_parameters():
        if name != "model.norm.weight":
            assert torch.equal(parameter, before[name])


def test_a_recording_that_fails_leaves_an_eager_step_of_the_same_numbers():
    def fails(function, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    eager, falls_back = engine_of(torch.float32, 2), engine_of(torch.float32, 2)
    for engine in (eager, falls_back):
        engine.train_step(batches_of(0, 2), lr=1e-2)
    falls_back.graphs = StepGraphs(falls_back, fails)
    with pytest.warns(UserWarning, match="goes on without CUDA graphs: operation not permitted"):
        for step in range(1, WARM_UP + 3):
            losses = [engine.train_step(batches_of(step, 2), lr=1e-2).loss for engine in (eager, falls_back)]
    torch.testing.assert_close(*losses, rtol=2e-5, atol=0)
    assert falls_back.graphs is None and falls_back.updates == eager.updates


def test_an_unknown_choice_is_named():
    with pytest.raises(ValueError, match="distributed.cuda_graphs must be 'auto' or 'off', got 'on'"):
        DistributedConfig(cuda_graphs="on")
