"""What a training step holds of each GPU's memory, by part, before anything is built.

Some moments of a step may be its highest, and the highest counts:

    loss        after the forward pass: all that layers keep, and the LM head with its loss at work
    backward    at the first or the last layer: what is still kept, the gradients so far, one layer at work
    reduction   ZeRO 0 and 1, which reduce after the backward pass: all gradients, and what is sent of them
    update      all gradients, and the copies that are made of them while a rank updates

Sizes follow from the model's shape and from what the engines and DeepSpeed 0.19 allocate:
`tests/distributed/test_optimizer_states.py` compares weights, state, gradients, buckets and copies with those of two
processes. `tilestack bench plan` measures the whole on GPUs, and docs/training.md has both side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig

from tilestack.distributed.deepspeed_settings import IN_FLIGHT, UPDATED_TOGETHER
from tilestack.distributed.step_model import Layout, parameters, rows_of_a_token
from tilestack.kernels.adamw.eight_bits import GROUP
from tilestack.kernels.linear_cross_entropy.configs import MAX_LOGITS_BYTES

GIB = 2**30
BUCKET = 500_000_000  # what DeepSpeed reduces together unless told otherwise, as ZeRO-2 is: elements
LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters: elements
MOMENT_BYTES = {"float32": 8.0, "bfloat16": 4.0, "8bit": 2.0 + 2 * 4 / GROUP}
OUTSIDE = {1: 0.7 * GIB, 2: 2.1 * GIB}  # of CUDA and cuBLAS alone; with NCCL. torch's allocator does not see it
SLACK = 0.05  # of what is allocated: blocks that the allocator holds and cannot use. Where there is room it keeps more


@dataclass(frozen=True)
class Training(Layout):
    """A layout, and how weights, optimizer state and activations are kept; the names are those of the configuration."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    deepspeed: bool = True
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    master_weights: bool = True
    activation_offload: bool = False

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def has_master(self) -> bool:
        return self.dtype == "bfloat16" and (self.master_weights or (self.deepspeed and self.zero == 0))


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU. moments: by moment of a step, what each part holds. outside: of CUDA and NCCL."""

    moments: dict[str, dict[str, float]]
    outside: float

    @property
    def highest(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def parts(self) -> dict[str, float]:
        """What each part holds at the highest moment."""
        return self.moments[self.highest]

    @property
    def allocated(self) -> float:
        """The most that torch allocates: torch.cuda.max_memory_allocated."""
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        """What the GPU must have."""
        return self.allocated * (1 + SLACK) + self.outside


def memory(model: PretrainedConfig, training: Training) -> Memory:
    """What a step of a Qwen3-MoE holds of each GPU."""
    sizes = Sizes(model, training)
    resident = sizes.resident()
    moments = {
        "loss": sizes.at_the_loss(),
        "backward, last layer": sizes.in_backward(model.num_hidden_layers),
        "backward, first layer": sizes.in_backward(1),
        "reduction": sizes.in_reduction(),
        "update": sizes.in_update(),
    }
    held = {
        moment: {part: size for part, size in (resident | parts).items() if size} for moment, parts in moments.items()
    }
    return Memory(held, OUTSIDE[min(2, training.gpus)])


def host_bytes(model: PretrainedConfig, training: Training) -> float:
    """Of the host's memory for one GPU: the offloaded state with a gradient and bfloat16 copy, and offloaded inputs."""
    sizes = Sizes(model, training)
    inputs = sizes.kept(1.0) * model.num_hidden_layers if training.activation_offload else 0.0
    return inputs + (sizes.own * (4 + 8 + 4 + 2) if training.offload else 0.0)


class Sizes:
    """Bytes of the parts of a step, unless said otherwise; `memory` puts them together."""

    def __init__(self, model: PretrainedConfig, training: Training):
        self.model, self.training = model, training
        self.tokens = training.micro_batch_tokens / training.sequence_parallel
        others, experts = parameters(model)
        self.experts = experts / training.expert_parallel
        self.here = others + self.experts  # parameters that this rank computes with
        shared = training.deepspeed and training.zero > 0
        self.own = (others + experts) / training.gpus if shared else self.here  # those that it updates
        self.head = model.vocab_size * model.hidden_size
        self.layer = (self.here - 2 * self.head) / model.num_hidden_layers
        self.block = self.experts / model.num_hidden_layers
        self.one_pass = training.deepspeed and training.zero == 2 and not training.offload  # zero_step.py
        self.sums_in_float32 = training.dtype == "float32" or self._sums_in_float32()

    def _sums_in_float32(self) -> bool:
        t = self.training
        if t.deepspeed and t.zero <= 1:
            return t.zero == 1
        return t.accumulation > 1

    def resident(self) -> dict[str, float]:
        """What is there at every moment."""
        t = self.training
        sharded = t.deepspeed and t.zero == 3
        on_gpu = 0 if t.offload else 1
        return {
            "weights": t.itemsize * (self.own if sharded else self.here),
            "master weights": 4 * self.own * on_gpu * t.has_master,
            "moments": MOMENT_BYTES[t.moments] * self.own * on_gpu,
        }

    def gradients(self, layers_left: int) -> float:
        """When the backward pass has come so far that so many layers are left; 0: all are there."""
        t = self.training
        size = 4 if self.sums_in_float32 else t.itemsize
        none_yet = layers_left > self.model.num_hidden_layers
        done = 0.0 if none_yet else self.here - self.layer * layers_left - self.head * (layers_left > 0)
        if t.deepspeed and t.zero >= 2:
            if t.offload and (t.zero == 3 or not self.sums_in_float32):
                return 0.0  # they are on the host
            come_one_by_one = self.one_pass and t.accumulation == 1
            return size * self.own * (done / self.here if come_one_by_one else 1.0)
        if self.keeps_sums():
            return 4 * self.here + t.itemsize * done
        if t.accumulation > 1 and self.sums_in_float32:
            return size * self.here
        return size * done

    def buckets(self) -> float:
        """Where gradients are collected to reduce them: ZeRO-3 has one for good.

        Offloaded, ZeRO-2 has two, of which one travels, and ZeRO-1 one, in float32.
        """
        t = self.training
        if not t.deepspeed or t.zero == 0 or self.keeps_sums() or self.one_pass:
            return 0.0
        sent = 4 if t.sequence_parallel > 1 else t.itemsize  # where rows are split DeepSpeed sends float32
        return self.bucket_elements() * {1: 4, 2: 2 * t.itemsize, 3: sent}[t.zero]

    def keeps_sums(self) -> bool:
        """ZeRO-1 in bfloat16, state on the device: DeepSpeed's BF16_Optimizer, with float32 sums of all gradients."""
        t = self.training
        return t.deepspeed and t.zero == 1 and t.dtype == "bfloat16" and not t.offload

    def bucket_elements(self) -> float:
        """ZeRO-2's, offloaded, are as large as the weights of one module: `zero_step.bucket_elements`."""
        return max(self.block, self.head) if self.training.zero == 2 else BUCKET

    def matrices(self) -> list[tuple[int, int]]:
        """The shapes of a layer's weights beside the experts, in the order in which they get their gradients."""
        m = self.model
        query, key = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
        hidden = m.hidden_size
        return [(m.num_experts, hidden), (hidden, query), (key, hidden), (key, hidden), (query, hidden)]

    def sent_together(self) -> Iterator[tuple[float, float]]:
        """Buckets of ZeRO 2 and 3, backward: (elements of a full one, of the gradients that wait for room in it).

        A bucket is full when the next gradient does not fit. Those of a layer's experts come together.
        """
        layer = [(self.block * 2 / 3, self.block / 3), *[(rows * width,) for rows, width in self.matrices()]]
        filled = 0.0
        for together in [(self.head,), *layer * self.model.num_hidden_layers, (self.head,)]:
            for number, each in enumerate(together):
                if filled + each > self.bucket_elements():
                    yield filled, sum(together[number:])
                    filled = 0.0
                filled += each
        yield filled, 0.0

    def in_flight(self, layer: int) -> float:
        """Our ZeRO 2: what travels while a layer makes the gradients of its experts, IN_FLIGHT units.

        Those of experts that no other rank has do not travel.
        """
        t, others = self.training, float(sum(rows * width for rows, width in self.matrices()))
        sent = 4 if t.sequence_parallel > 1 else t.itemsize
        later = self.model.num_hidden_layers - layer
        if t.expert_parallel < t.gpus:
            return sent * (self.block + others if later else self.head) * (t.gpus > 1)
        return sent * (others * min(later, IN_FLIGHT) + self.head * (later < IN_FLIGHT)) * (t.gpus > 1)

    def on_the_way(self) -> float:
        """With buckets: the copy of one that is reduced, with the gradients that wait meanwhile."""
        t = self.training
        narrow = t.dtype == "bfloat16"

        def taken(filled: float, waiting: float) -> float:
            copied = t.itemsize * filled
            if narrow and t.sequence_parallel > 1:  # DeepSpeed sends float32 then
                copied = (8 if t.zero == 3 else t.itemsize + 4) * filled  # ZeRO-3: each gradient, and all in one piece
            elif narrow and self.sums_in_float32:  # one weight's part is widened to be added
                copied += 4 * min(filled, max(self.block * 2 / 3, self.head))
            return copied * (t.gpus > 1) + t.itemsize * waiting

        return max(taken(*each) for each in self.sent_together())

    def gathered(self, largest: float) -> float:
        """ZeRO-3: weights that are whole meanwhile, of which the largest are `largest` parameters."""
        t = self.training
        if not t.deepspeed or t.zero < 3 or t.gpus == 1:
            return 0.0
        return t.itemsize * min(self.here, LIVE + largest)

    def kept(self, share: float) -> float:
        """What `share` of one layer's tokens keep, on the GPU or (offloaded) on the host."""
        t, m = self.training, self.model
        width = t.itemsize * self.tokens * share
        heads, attended = m.num_attention_heads, 4 * self.tokens * share * m.num_attention_heads
        if t.checkpointing == "full":
            return width * m.hidden_size
        if t.checkpointing == "selective":
            return width * (m.hidden_size + heads * m.head_dim) + attended
        return self.whole_layer() * share

    def whole_layer(self) -> float:
        """All that one layer keeps for its backward."""
        m, t = self.model, self.training
        kv_heads = m.num_key_value_heads
        heads = m.num_attention_heads + 2 * kv_heads
        attention = heads + (heads - kv_heads) + m.num_attention_heads
        if t.sequence_parallel > 1:  # what was exchanged is kept beside what was made
            attention += m.num_attention_heads + 2 * max(kv_heads, t.sequence_parallel)
        routed = m.num_experts_per_tok * 2 * m.moe_intermediate_size
        exchanged = (self.rows() + 1) * m.hidden_size if t.expert_parallel > 1 else 0.0
        width = 4 * m.hidden_size + attention * m.head_dim + routed + exchanged
        small = 4 * m.num_attention_heads + m.num_experts * t.itemsize + 16 * m.num_experts_per_tok
        return self.tokens * (t.itemsize * width + small)

    def rows(self) -> float:
        """Expert parallelism: rows that arrive for each token of this rank's own."""
        return rows_of_a_token(self.training.expert_parallel, self.model.num_experts_per_tok)

    def chunks(self) -> int:
        """In how many parts the tokens reach the experts."""
        return self.training.expert_chunks if self.training.expert_parallel > 1 else 1

    def at_work(self) -> float:
        """In the backward of one layer, beside what it keeps: the larger of its two halves."""
        m, t = self.model, self.training
        inner = m.moe_intermediate_size
        experts = m.num_experts_per_tok * max(3 * inner, 2 * inner + m.hidden_size) / self.chunks()
        experts += 3 * self.rows() * m.hidden_size if t.expert_parallel > 1 else 0
        attention = (4 / t.itemsize + 2) * m.num_attention_heads * m.head_dim
        return self.tokens * t.itemsize * (max(experts, attention) + 4 * m.hidden_size)

    def activations(self, layers: int) -> float:
        on_host = self.training.activation_offload and self.training.checkpointing != "none"
        attended = self.kept(1.0) - self.training.itemsize * self.tokens * self.model.hidden_size if on_host else None
        return layers * (self.kept(1.0) if attended is None else attended)

    def at_the_loss(self) -> dict[str, float]:
        m, t = self.model, self.training
        float32_sum = 4 * self.head
        others = max(MAX_LOGITS_BYTES, 0 if self._adds_in_place() else t.itemsize * self.head)
        first = t.accumulation == 1
        return {
            "gradients": self.gradients(m.num_hidden_layers + 1 if first else 0) if self._lasts() or not first else 0.0,
            "gathered weights": self.gathered(self.head),
            "buckets": self.buckets() if t.zero == 3 else 0.0,
            "activations": self.activations(m.num_hidden_layers),
            "head and loss": float32_sum + others + 2 * t.itemsize * self.tokens * m.hidden_size,
        }

    def _lasts(self) -> bool:
        """Gradients have memory of their own from the start."""
        return self.training.deepspeed and self.training.zero in (1, 3)

    def _adds_in_place(self) -> bool:
        return not self.training.deepspeed and self.training.accumulation > 1

    def in_backward(self, layer: int) -> dict[str, float]:
        t = self.training
        again = self.whole_layer() if t.checkpointing != "none" else 0.0
        # of ZeRO 0 and 1, or without DeepSpeed, they are among the gradients
        on_the_way = t.itemsize * self.block if t.deepspeed and t.zero >= 2 else 0.0
        if self.chunks() > 1:  # autograd holds the experts' gradients of one part until those of the next are added
            on_the_way += t.itemsize * self.block
        at_work = self.at_work()
        if self.one_pass:
            on_the_way += self.in_flight(layer)
        elif t.deepspeed and t.zero >= 2 and self.on_the_way() > on_the_way + at_work:
            on_the_way, at_work = self.on_the_way(), 0.0  # the experts have done their part when theirs are sent
        return {
            "gradients": self.gradients(layer - 1),
            "gathered weights": self.gathered(self.block),
            "buckets": self.buckets(),
            "gradients on their way": on_the_way,
            "activations": self.activations(layer),
            "layer at work": again + at_work,
        }

    def in_reduction(self) -> dict[str, float]:
        if not self.reduced_together():
            return {}
        return {
            "gradients": self.gradients(0),
            "buckets": self.buckets(),
            "gradients on their way": self.flattened(),
        }

    def reduced_together(self) -> float:
        """ZeRO 0 and 1: elements of the largest piece in which the gradients are sent after the backward pass."""
        t = self.training
        if not t.deepspeed or t.zero > 1 or t.gpus == 1:
            return 0.0
        kinds = [self.here] if t.expert_parallel == 1 else [self.here - self.experts]
        if 1 < t.expert_parallel < t.gpus:  # else nobody shares this rank's experts
            kinds.append(self.experts)
        return min(max(kinds), BUCKET + max(self.block * 2 / 3, self.head))

    def flattened(self) -> float:
        """The piece, and it once more in the type that is sent."""
        t = self.training
        kept = 4 if self.sums_in_float32 else t.itemsize
        sent = 4 if t.sequence_parallel > 1 else t.itemsize
        return self.reduced_together() * (kept + (sent if sent != kept else 0))

    def in_update(self) -> dict[str, float]:
        t = self.training
        reduced = t.deepspeed and t.zero == 1 and not self.keeps_sums()  # only this rank's part is left of them
        return {
            "gradients": 4 * self.own if reduced else self.gradients(0),
            "buckets": self.buckets() if t.zero == 3 else 0.0,
            "copies for the update": self.copies(),
        }

    def copies(self) -> float:
        """What becomes of the gradients of a group while it is updated."""
        t = self.training
        if not t.deepspeed or t.offload or self.one_pass:
            return 0.0
        if t.zero == 0:
            return 4.0 * self.here if t.dtype == "bfloat16" else 0.0
        if t.dtype == "bfloat16" and self.sums_in_float32 and t.zero < 3:  # these lie in one piece
            return 0.0
        if t.zero == 1:
            return t.itemsize * self.own
        largest = max(self.block * 2 / 3, self.head) / t.gpus
        return (4 if self.sums_in_float32 else t.itemsize) * min(self.own, UPDATED_TOGETHER + largest / 2)
