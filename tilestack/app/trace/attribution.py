"""Whose time is it: the place in the design's picture of everything that ran.

A kernel belongs to what launched it: the ranges around the launch on the host say which op of ours, or which module of
the model, and in which stage of the step. In the backward pass, where no module is entered, the profiler's arrow from a
node of autograd to its operator of the forward pass says it. What has no such trace is "other", and is shown.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from tilestack.app.trace.events import BACKWARD_NODE, HostEvent
from tilestack.app.trace.recording import DATA, MODULE, STEP
from tilestack.distributed.stages import PREFIX as STAGE
from tilestack.kernels import ops

APPLICATION, DISTRIBUTED, MODEL = "APPLICATION", "DISTRIBUTED TRAINING", "MODEL ARCHITECTURES"
KERNELS, LIBRARIES, OTHER = "OPTIMIZED KERNELS", "CUDA, cuBLAS, cuDNN", "OTHER"
LAYERS = (APPLICATION, DISTRIBUTED, MODEL, KERNELS, LIBRARIES, OTHER)

# who wrote a kernel
OURS, CUBLAS, CUDNN, NCCL = "tilestack", "cuBLAS", "cuDNN", "NCCL"
CUTLASS, TORCH, COPIES, BLAS = "CUTLASS, flash-attention", "PyTorch", "copies, fills", "MKL, oneDNN"
OWNERS = (OURS, CUBLAS, CUDNN, NCCL, CUTLASS, TORCH, COPIES, BLAS)
_OWNER_OF_KERNEL = (
    (NCCL, r"^nccl|ncclDevKernel|ncclKernel"),
    (CUDNN, r"cudnn"),
    # PyTorch's own grouped products (a compiler may leave the name mangled), its flash and memory-efficient attention,
    # flash-attn, xFormers
    (
        CUTLASS,
        r"cutlass::device_kernel|7cutlass13device_kernel|grouped_gemm|flash_fwd|flash_bwd|flash::|fmha_|FlashAttn",
    ),
    (CUBLAS, r"cublas|nvjet|xmma_gemm|cutlass_\d+_|cutlass::Kernel|gemm|gemv|splitK|dot_kernel|reduce_1Block_kernel"),
    (COPIES, r"^Memcpy|^Memset"),
)
# operators whose work is a library's (on a GPU) or a product (on a CPU), with all that is inside them
_BLAS_OPS = re.compile(r"aten::(mm|addmm|bmm|baddbmm|_grouped_mm|mv|addmv|dot|mkldnn_\w+|_scaled_dot_product_\w+)$")
_PYTORCH_ATTENTION = re.compile(r"scaled_dot_product|_efficient_attention|_flash_attention|_cudnn_attention")

# parts of a model, in the order of a step; the same for ours and for transformers'
DATA_PART, EMBEDDING, NORMS, PROJECTIONS = "data", "embedding", "norms and residuals", "attention projections"
ROTARY, ATTENTION, ROUTER = "q and k norm, rotary", "attention", "router"
EXPERTS, DENSE, HEAD, MASKS = "experts", "dense MLP", "LM head and losses", "masks and positions"
ACCUMULATION, NORM, OPTIMIZER, ENGINE = "gradient accumulation", "gradient norm", "optimizer", "engine"
COMMUNICATION, UNKNOWN = "communication", "other"
PARTS = (
    DATA_PART, EMBEDDING, MASKS, NORMS, PROJECTIONS, ROTARY, ATTENTION, ROUTER, EXPERTS, DENSE, HEAD,
    ACCUMULATION, NORM, OPTIMIZER, ENGINE, COMMUNICATION, UNKNOWN,
)  # fmt: skip
_PART_OF_OP = {
    "rms_norm": NORMS, "layer_norm": NORMS, "qk_norm_rope": ROTARY, "rotary": ROTARY,
    "attention": ATTENTION, "attention_kvcache": ATTENTION, "router": ROUTER, "sort_routes": EXPERTS, "moe": EXPERTS,
    "swiglu": DENSE, "linear_cross_entropy": HEAD, "cross_entropy": HEAD, "adamw": OPTIMIZER,
}  # fmt: skip
_PART_OF_MODULE = (
    (PROJECTIONS, r"self_attn\.(q_proj|k_proj|v_proj|o_proj|qkv\w*)$"),
    (ROTARY, r"self_attn\.(q_norm|k_norm)$|rotary_emb$"),
    (ROUTER, r"mlp\.gate$"),
    (EXPERTS, r"mlp\.experts(\.|$)"),
    (NORMS, r"(layernorm|\bnorm)$|layers\.\d+$"),
    (EMBEDDING, r"embed_tokens$"),
    (HEAD, r"lm_head$"),
)
_PART_OF_STAGE = {"optimizer": OPTIMIZER, "gradient norm": NORM}

FORWARD, BACKWARD, RECOMPUTE, NEITHER = "forward", "backward", "recompute", ""


@dataclass(frozen=True)
class Place:
    """Where a piece of time belongs.

    layer: the box of the picture; part: of the model or the loop; what: the op's name, or what is done.
    implementation: of the op, as `explain` calls it; "" for what is no op of ours.
    direction: forward, backward, recompute (forward again, in the backward pass), or "".
    """

    layer: str
    part: str
    what: str
    implementation: str
    direction: str


@dataclass(frozen=True)
class Surroundings:
    """The ranges around an event, as far as they say where it belongs."""

    module: str | None
    stage: str | None
    operator: str | None
    op: tuple[str, str, str] | None
    direction: str
    accumulates: bool
    operators: tuple[str, ...]
    in_data: bool
    in_step: bool


def surroundings(event: HostEvent) -> Surroundings:
    """What the ranges around an event of the host say; `event` itself counts."""
    module = stage = op = node = linked = None
    operators: list[str] = []
    in_data = in_step = recomputed = accumulates = False
    for each in event.chain():
        if each.kind == "cpu_op":
            if each.name.startswith(BACKWARD_NODE):
                node = each
                accumulates = accumulates or each.name.endswith("AccumulateGrad")
                recomputed = module is not None
                linked = linked or each.forward
            else:
                operators.append(each.name)
                linked = linked or (each.forward if node is None else None)
                if module is None:  # what is outside of a module's range is a node of autograd that recomputes it
                    op = op or _op_of(each.name)
        elif each.kind == "user_annotation":
            if module is None and each.name.startswith(MODULE):
                module = each.name.removeprefix(MODULE)
            elif each.name.startswith(STAGE):
                stage = stage or each.name.removeprefix(STAGE)
            in_data = in_data or each.name == DATA
            in_step = in_step or each.name == STEP
    if module is None and linked is not None:
        forward = surroundings(linked)
        module, operators = forward.module, [*operators, *forward.operators]
    direction = _direction(op, node is not None or stage == "backward", recomputed, module is not None)
    if stage == "forward" and module is None:
        direction = NEITHER
    outermost = next((name for name in reversed(operators) if name.startswith(("aten::", "c10d::"))), None)
    return Surroundings(
        module, stage, outermost, op, direction, accumulates, tuple(operators), in_data, in_step or node is not None
    )


def _direction(op: tuple[str, str, str] | None, backward: bool, recomputed: bool, in_model: bool) -> str:
    if op is not None and op[1] == BACKWARD:
        return BACKWARD
    if backward:
        again = recomputed or (op is not None and op[1] == FORWARD)
        return RECOMPUTE if again else BACKWARD
    return FORWARD if in_model else NEITHER


@functools.cache
def _op_of(name: str) -> tuple[str, str, str] | None:
    """(op, direction, implementation) of one of our custom ops, or of the node of autograd around it; else None."""
    rest = name.removeprefix("tilestack::")
    for known, op in ops().items():
        found = re.fullmatch(rf"{known}(?:_(forward|backward))?_(\w+?)(Backward)?", rest)
        if found:
            names = {each.suffix: each.name for each in op.implementations}
            if found[2] in names:
                return known, BACKWARD if found[3] else found[1] or NEITHER, names[found[2]]
    return (rest, NEITHER, "") if rest != name else None


def owner_of_kernel(name: str, launch: HostEvent | None) -> str:
    """Who wrote a kernel of the device: by its name, or because one of our ops launched it with nothing in between."""
    named = next((owner for owner, pattern in _OWNER_OF_KERNEL if re.search(pattern, name)), TORCH)
    around = next((each for each in launch.chain() if each.kind == "cpu_op"), None) if launch else None
    ours = around is not None and around.name.startswith("tilestack::")
    return OURS if ours and named not in (NCCL, COPIES) else named


def owner_of_operator(event: HostEvent, around: Surroundings) -> str:
    """Who computes in an operator on the CPU."""
    if event.name.startswith("tilestack::"):
        return OURS
    return BLAS if any(_BLAS_OPS.match(name) for name in around.operators) else TORCH


def place(around: Surroundings | None, owner: str) -> Place:
    """The place of something that ran inside `around` (None: nothing is known) and was written by `owner`."""
    if owner == NCCL or (around and any(name.startswith(("c10d::", "gloo:", "nccl:")) for name in around.operators)):
        return Place(DISTRIBUTED, COMMUNICATION, "collectives", "", NEITHER)
    if around is None:
        return Place(OTHER, UNKNOWN, "launched by nothing that the profile shows", "", NEITHER)
    if not around.in_step:
        return Place(OTHER, UNKNOWN, "on a thread of its own, outside of the step's ranges", "", NEITHER)
    if around.in_data:
        return Place(APPLICATION, DATA_PART, "next batch", "", NEITHER)
    if around.op is not None:
        op, _, implementation = around.op
        return Place(KERNELS, _PART_OF_OP.get(op, UNKNOWN), op, implementation, around.direction)
    if around.accumulates:
        return Place(DISTRIBUTED, ACCUMULATION, ACCUMULATION, "", NEITHER)
    if around.module is not None:
        return _in_model(around, owner)
    if around.stage in _PART_OF_STAGE:
        return Place(DISTRIBUTED, _PART_OF_STAGE[around.stage], around.stage, "", NEITHER)
    if around.stage in ("forward", "backward"):
        return Place(DISTRIBUTED, ENGINE, "micro-batches to the device, sums of the loss", "", NEITHER)
    return Place(APPLICATION, ENGINE, "between the stages of a step", "", NEITHER)


def _in_model(around: Surroundings, owner: str) -> Place:
    part = _part_of_module(around)
    # a library clears its workspace with a fill of its own
    in_library = owner == COPIES and any(_BLAS_OPS.match(name) for name in around.operators)
    if owner in (CUBLAS, CUDNN, CUTLASS, BLAS) or in_library:
        what = part if part in (PROJECTIONS, ATTENTION) else f"{part}: products"
        return Place(LIBRARIES, part, what, "", around.direction)
    return Place(MODEL, part, part, "", around.direction)


def _part_of_module(around: Surroundings) -> str:
    module = around.module or ""
    for part, pattern in _PART_OF_MODULE:
        if re.search(pattern, module):
            return part
    if module.endswith("self_attn"):
        return ATTENTION if _attends(around) else ROTARY
    if re.search(r"\.mlp(\.|$)", module):
        return DENSE if re.search(r"mlp\.\w+_proj$", module) else EXPERTS
    return MASKS if module.endswith("model") else HEAD


def _attends(around: Surroundings) -> bool:
    """Whether a piece of transformers' attention module is attention, with the copies around it, or the rotation."""
    if any(_PYTORCH_ATTENTION.search(name) for name in around.operators):
        return True
    plain = {"aten::mul", "aten::neg", "aten::cat", "aten::add", "aten::slice", "aten::unsqueeze"}
    return around.operator not in plain
