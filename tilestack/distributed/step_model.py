"""What a training step takes on any number of GPUs, from measured rates: orders plans, and makes docs/scaling.md.

    step = accumulation * (computation + communication that nothing hides) + gradients + update + gathered weights

A model, not a measurement: it says which configuration is the faster and where one stops scaling. Its computation comes
from rates that were measured on one GPU; links, and how much of a collective hides, are in `Machine`, and said there.

A collective over n ranks of which g sit in a node: every rank receives B (n - 1) / n bytes through its links inside the
node, a node receives B (nodes - 1) / nodes through all of its network cards together, and a ring makes n - 1 hops. The
slower of both counts. An all-to-all has no such help: what leaves the node goes through the rank's own card.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, fields
from typing import Literal

from transformers import PretrainedConfig

from tilestack.models import Recomputation
from tilestack.models.flops import training_flops_per_token


@dataclass(frozen=True)
class Machine:
    """One kind of GPU and its links. Rates in TFLOP/s and GB/s (1e9 bytes), times in microseconds.

    attention: sequence length -> (forward, backward) of causal attention. experts: rows an expert -> (forward, forward
        and backward) of the MoE block. Both are interpolated over the logarithm; beyond the ends the last value holds,
        but few rows take as long as the fewest that were measured: their weights are read all the same.
    projections, head: of the attention's projections, of the LM head with its loss.
    glue_ns: norms, rotary and router, nanoseconds a token and layer at hidden 2048, forward and backward.
    copy: bytes read and written, GB/s. host_gpu: between a GPU and the host's memory, in one direction.
    host_update: what a host's AdamW moves of its memory for one GPU's share, GB/s.
    gpus_per_node, node_link, network: how many GPUs share a node; GB/s that a GPU receives from others in its node,
        and through its own network card.
    node_hop, network_hop: latency of one hop of a ring. host_wait: what a layer loses where the host waits for sizes:
        the fullest rank is waited for, and the device for the host.
    hidden_share: of a backward (or forward) pass, how much of it a collective beside it can hide behind.
    """

    attention: dict[int, tuple[float, float]]
    experts: dict[int, tuple[float, float]]
    projections: float
    head: float
    glue_ns: float
    copy: float
    host_gpu: float = 50.0
    host_update: float = 40.0
    gpus_per_node: int = 8
    node_link: float = 270.0
    network: float = 45.0
    node_hop: float = 3.0
    network_hop: float = 10.0
    host_wait: float = 3500.0
    hidden_share: float = 0.8


# Rounded from bench/results (1xH100.json of attention, moe and trace); tests/distributed/test_step_model.py compares.
# The links inside a node too, measured between two GPUs, and host_wait: what steps of two GPUs with split experts took
# longer than the rest of the model explains (docs/scaling.md has the steps). The other links and the latencies are
# assumed: the defaults of Machine, and docs/scaling.md says where they come from. An H200 computes as an H100.
H100 = Machine(
    attention={1024: (541, 304), 2048: (648, 428), 4096: (709, 525), 8192: (739, 586), 16384: (735, 630)},
    experts={256: (435, 417), 1024: (588, 576)},
    projections=689,
    head=673,
    glue_ns=64,
    copy=3000,
)


@dataclass(frozen=True)
class Layout:
    """How a step is spread: the numbers of the configuration that its time depends on.

    micro_batch_tokens: of one micro-batch, before sequence_parallel cuts it. seqlen: mean length of what attends
        together. accumulation: micro-batches a rank and step.
    update_bytes: what clipping and update move of memory for each parameter whose state this rank has (bf16 weights
        and gradients with float32 master and moments: 2 for the norm, 28 for AdamW).
    offload: the optimizer's state is in the host's memory.
    """

    gpus: int = 1
    micro_batch_tokens: int = 4096
    seqlen: int = 4096
    accumulation: int = 1
    zero: Literal[0, 1, 2, 3] = 2
    expert_parallel: int = 1
    expert_chunks: int = 2
    sequence_parallel: int = 1
    checkpointing: Recomputation = "none"
    update_bytes: float = 30.0
    offload: bool = False


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one step on each GPU, by part; of communication only what nothing hides.

    experts to recomputed: computation of all micro-batches. tokens_sent: expert parallelism. rows_sent: sequence
    parallelism. weights_gathered: of ZeRO 1 to 3. gradients: their reduction. update: clipping and AdamW.
    """

    experts: float
    attention: float
    projections: float
    head: float
    glue: float
    recomputed: float
    tokens_sent: float
    rows_sent: float
    gradients: float
    weights_gathered: float
    update: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def communication(self) -> float:
        return self.tokens_sent + self.rows_sent + self.gradients + self.weights_gathered


def step_time(model: PretrainedConfig, layout: Layout, machine: Machine = H100) -> StepTime:
    """The time of one step of a Qwen3-MoE with bf16 weights.

    Raises ValueError if expert_parallel or sequence_parallel does not divide the number of GPUs.
    """
    for name in ("expert_parallel", "sequence_parallel"):
        if layout.gpus % getattr(layout, name):
            raise ValueError(f"{name} = {getattr(layout, name)} must divide the number of GPUs, {layout.gpus}")
    forward, both = _computation(model, layout, machine)
    again = {part: time for part, time in forward.items() if part != "head"}
    if layout.checkpointing == "selective":
        del again["attention"]
    recomputed = 0.0 if layout.checkpointing == "none" else sum(again.values())
    forward_ms = sum(forward.values())
    backward_ms = sum(both.values()) - forward_ms + recomputed
    reduced, gathered = _zero(model, layout, machine, forward_ms, backward_ms)
    n = layout.accumulation
    return StepTime(
        **{part: n * time for part, time in both.items()},
        recomputed=n * recomputed,
        tokens_sent=n * _tokens_sent(model, layout, machine, both["experts"]),
        rows_sent=n * _rows_sent(model, layout, machine),
        gradients=reduced,
        weights_gathered=gathered,
        update=_update(model, layout, machine),
    )


def tokens_per_second(layout: Layout, time: StepTime) -> float:
    """Of one GPU."""
    tokens = layout.micro_batch_tokens * layout.accumulation / layout.sequence_parallel
    return tokens / time.total * 1e3


def tflops(model: PretrainedConfig, layout: Layout, time: StepTime) -> float:
    """Of one GPU, by the convention of models/flops.py: recomputation is not counted."""
    return training_flops_per_token(model, layout.seqlen) * tokens_per_second(layout, time) / 1e12


def rows_of_a_token(ranks: int, top_k: int) -> float:
    """Expert parallelism over so many ranks: how many of them have one of a token's experts, on average."""
    return ranks * (1 - (1 - 1 / ranks) ** top_k)


def parameters(model: PretrainedConfig) -> tuple[int, int]:
    """(all but the experts, the experts)."""
    hidden, head_dim = model.hidden_size, model.head_dim
    attention = hidden * head_dim * (2 * model.num_attention_heads + 2 * model.num_key_value_heads) + 2 * head_dim
    layer = attention + 2 * hidden + hidden * model.num_experts
    embeddings = model.vocab_size * hidden * (1 if model.tie_word_embeddings else 2)
    experts = model.num_hidden_layers * model.num_experts * 3 * hidden * model.moe_intermediate_size
    return model.num_hidden_layers * layer + embeddings + hidden, experts


def _computation(model: PretrainedConfig, layout: Layout, machine: Machine) -> tuple[dict, dict]:
    """Milliseconds of a micro-batch by part: of the forward pass, and of forward and backward."""
    tokens, layers = layout.micro_batch_tokens / layout.sequence_parallel, model.num_hidden_layers
    hidden, heads, head_dim = model.hidden_size, model.num_attention_heads, model.head_dim
    rows = tokens * model.num_experts_per_tok * layout.expert_parallel / model.num_experts
    fewest = min(machine.experts)
    rates = interpolated(machine.experts, rows)
    experts_forward, experts_both = (rate * min(1.0, rows / fewest) for rate in rates)
    expert_flops = 2 * layers * tokens * model.num_experts_per_tok * 3 * hidden * model.moe_intermediate_size
    attention_forward, attention_backward = interpolated(machine.attention, layout.seqlen)
    attention_flops = 2 * layers * tokens * heads * head_dim * layout.seqlen
    projected = 2 * layers * tokens * hidden * head_dim * (2 * heads + 2 * model.num_key_value_heads)
    head = 2 * tokens * hidden * model.vocab_size
    glue = machine.glue_ns * tokens * layers * hidden / 2048 / 1e6
    forward = {
        "experts": _ms(expert_flops, experts_forward),
        "attention": _ms(attention_flops, attention_forward),
        "projections": _ms(projected, machine.projections),
        "head": _ms(head, machine.head),
        "glue": glue / 3,
    }
    both = {
        "experts": _ms(3 * expert_flops, experts_both),
        "attention": forward["attention"] + _ms(2 * attention_flops, attention_backward),
        "projections": 3 * forward["projections"],
        "head": 3 * forward["head"],
        "glue": glue,
    }
    return forward, both


def _zero(
    model: PretrainedConfig, layout: Layout, machine: Machine, forward: float, backward: float
) -> tuple[float, float]:
    """(gradients, weights): milliseconds of a step that nothing hides.

    Stages 0 and 1 sum bf16 gradients on all ranks, once a step after the last backward: twice the bytes of reducing and
    scattering them, which stage 2 (zero_step.py; offloaded it sums them too) and 3 do beside every backward. Stage 1
    gathers the weights after the update, stage 2 beside it, stage 3 in each pass, forward and backward. Where rows are
    split gradients travel in float32.
    """
    others, experts = parameters(model)
    layers, n = model.num_hidden_layers, layout.accumulation
    shares = [(2 * others, layout.gpus, 1)]  # bytes, ranks that have the same, distance between them
    if layout.expert_parallel > 1:
        shares.append(
            (2 * experts / layout.expert_parallel, layout.gpus // layout.expert_parallel, layout.expert_parallel)
        )
    else:
        shares[0] = (2 * (others + experts), layout.gpus, 1)
    wide = 2 if layout.sequence_parallel > 1 else 1
    once = sum(_ring(machine, size, ranks, apart, 1) for size, ranks, apart in shares)
    summed = 2 * sum(_ring(machine, wide * size, ranks, apart, 1) for size, ranks, apart in shares)
    if layout.zero == 0:
        return summed, 0.0
    if layout.zero == 1:
        return summed, once
    if layout.zero == 2:
        hidden = machine.hidden_share * _update(model, layout, machine)
        # the first layer's and the embedding's gradients are there when the backward pass has ended
        last = (model.vocab_size * model.hidden_size + (others + experts) / (layers + 1)) / (others + experts)
        sent = summed if layout.offload else summed / 2
        reduced = max(sent * min(1.0, last), sent - machine.hidden_share * backward)
        return n * reduced, max(0.0, once - hidden)
    gathered = sum(_ring(machine, size, ranks, apart, 2 * layers) for size, ranks, apart in shares)
    scattered = sum(_ring(machine, wide * size, ranks, apart, 2 * layers) for size, ranks, apart in shares)
    in_forward = max(0.0, gathered - machine.hidden_share * forward)
    in_backward = max(0.0, gathered + scattered - machine.hidden_share * backward)
    share = scattered / (gathered + scattered) if scattered else 0.0
    return n * in_backward * share, n * (in_forward + in_backward * (1 - share))


def _ring(machine: Machine, size: float, ranks: int, apart: int, calls: int) -> float:
    """Milliseconds of gathering (or reducing and scattering) `size` bytes over `ranks`, in `calls` pieces."""
    if ranks == 1:
        return 0.0
    in_node = max(1, min(ranks, machine.gpus_per_node // apart))
    nodes = math.ceil(ranks / in_node)
    inside = size * (ranks - 1) / ranks / machine.node_link if in_node > 1 else 0.0
    between = size * (nodes - 1) / nodes / (in_node * machine.network)
    hops = (ranks - nodes) * machine.node_hop + (nodes - 1) * machine.network_hop
    return max(inside, between) / 1e6 + calls * hops / 1e3


def _all_to_all(machine: Machine, size: float, ranks: int) -> float:
    """Milliseconds in which a rank sends `size` bytes evenly to all ranks of a group, itself counted."""
    in_node = min(ranks, machine.gpus_per_node)
    inside = size * (in_node - 1) / ranks / machine.node_link
    between = size * (ranks - in_node) / ranks / machine.network
    hop = machine.network_hop if ranks > in_node else machine.node_hop
    return max(inside, between) / 1e6 + hop / 1e3


def _tokens_sent(model: PretrainedConfig, layout: Layout, machine: Machine, experts: float) -> float:
    """There and back, forward and backward; and there and back once more where the layer is made again."""
    ranks = layout.expert_parallel
    if ranks == 1:
        return 0.0
    tokens = layout.micro_batch_tokens / layout.sequence_parallel
    rows = tokens * rows_of_a_token(ranks, model.num_experts_per_tok)
    trips = 4 if layout.checkpointing == "none" else 6
    layers, chunks = model.num_hidden_layers, layout.expert_chunks
    trip = chunks * _all_to_all(machine, rows * model.hidden_size * 2 / chunks, ranks)
    sent = layers * trips * trip
    shown = sent / chunks + max(0.0, sent - experts) * (chunks - 1) / chunks
    waits = layers * machine.host_wait * (1 if layout.checkpointing == "none" else 2) / 1e3
    return shown + waits


def _rows_sent(model: PretrainedConfig, layout: Layout, machine: Machine) -> float:
    """q, k, v there and the output back around attention, forward and backward; nothing hides them."""
    ranks = layout.sequence_parallel
    if ranks == 1:
        return 0.0
    tokens = layout.micro_batch_tokens / ranks
    kv_heads = max(model.num_key_value_heads, ranks)  # copied where there are fewer than ranks
    passes = 3 if layout.checkpointing == "full" else 2
    calls = [model.num_attention_heads, kv_heads, kv_heads, model.num_attention_heads]
    one = sum(_all_to_all(machine, tokens * heads * model.head_dim * 2, ranks) for heads in calls)
    return model.num_hidden_layers * passes * one


def _update(model: PretrainedConfig, layout: Layout, machine: Machine) -> float:
    others, experts = parameters(model)
    own = others + experts / layout.expert_parallel if layout.zero == 0 else (others + experts) / layout.gpus
    if not layout.offload:
        return own * layout.update_bytes / machine.copy / 1e6
    return own * (layout.update_bytes / machine.host_update + 4 / machine.host_gpu) / 1e6


def interpolated(table: dict[int, tuple[float, float]], at: float) -> tuple[float, float]:
    """The two rates at a point between two measured ones; beyond them the last ones."""
    points = sorted(table)
    right = bisect.bisect_left(points, at)
    if right in (0, len(points)):
        return table[points[min(right, len(points) - 1)]]
    low, high = points[right - 1], points[right]
    share = math.log(at / low) / math.log(high / low)
    return tuple(a + share * (b - a) for a, b in zip(table[low], table[high], strict=True))


def _ms(flops: float, rate: float) -> float:
    return flops / rate / 1e9
