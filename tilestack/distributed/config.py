"""What a user chooses about the update and about the processes: two sections of the configuration tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class SettingsError(ValueError):
    """A DeepSpeed configuration of the user's own that cannot be read, or that contradicts tilestack's."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019) with decoupled weight decay, and clipping by the global norm.

    lr: the largest learning rate; the schedule of the application scales it, step by step.
    beta1, beta2: decay of the first and the second moment, each in [0, 1).
    eps: added to the root of the second moment.
    weight_decay: applied to matrices alone (two dimensions or more), never to the weights of norms.
    max_grad_norm: gradients are scaled down to this global 2-norm; 0 switches clipping off.
    non_finite: what a NaN or infinite gradient norm does. The update is left out in either case, so that the weights
        stay good; "stop" ends the training, "skip" goes on with the next step.
    moments: what AdamW's two moments are kept in: 8, 4 or (8bit) 2 bytes a parameter. Below float32 they are rounded up
        or down by chance, which is right on average.
    master_weights: keep bfloat16 weights a second time in float32, 4 bytes a parameter; without, an update is rounded
        to the bfloat16 weights themselves, up or down by chance. With distributed.zero 2 or 3, or in one process.
    offload: keep master weights and moments in the host's memory and update there. With DeepSpeed and ZeRO 1 to 3,
        float32 moments and master weights.
    """

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    non_finite: Literal["stop", "skip"] = "stop"
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    master_weights: bool = True
    offload: bool = False

    def __post_init__(self):
        for name in ("lr", "eps", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"optimizer.{name} must be a finite number of at least 0, got {value!r}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {value!r}")
        if self.non_finite not in ("stop", "skip"):
            raise ValueError(f"optimizer.non_finite must be 'stop' or 'skip', got {self.non_finite!r}")
        if self.moments not in ("float32", "bfloat16", "8bit"):
            raise ValueError(f"optimizer.moments must be 'float32', 'bfloat16' or '8bit', got {self.moments!r}")
        if self.offload and (self.moments != "float32" or not self.master_weights):
            raise ValueError(
                "optimizer.offload updates float32 moments and master weights on the host; set optimizer.moments to "
                "float32 and optimizer.master_weights to true, or offload to false"
            )


@dataclass(frozen=True)
class DistributedConfig:
    """How the work is spread over processes.

    engine: "auto" takes DeepSpeed from two processes on and our own loop for one; "deepspeed" asks for it by name, also
        in one process; "local" is one process without DeepSpeed.
    zero: the ZeRO stage (Rajbhandari et al., 2020): 0 replicates everything, 1 shards the optimizer's states, 2 the
        gradients too, 3 the parameters too. Null: the stage of `deepspeed_config`, else 2.
    deepspeed_config: a DeepSpeed configuration of your own, a JSON file. What tilestack must know (batch sizes,
        accumulation, clipping) may be absent or "auto" in it; a value that contradicts tilestack's is an error.
    expert_parallel: so many ranks, neighbours, share the experts of each layer, and tokens travel between them; 1 keeps
        all experts on every rank. Divides the number of ranks and of experts; with ZeRO 1 or 2.
    sequence_parallel: so many ranks, neighbours, share each row of tokens (Ulysses); 1 keeps rows whole. Divides the
        number of ranks and of query heads.
    expert_chunks: with expert_parallel, tokens travel in so many parts, each while the experts work on the one before.
    timeout: seconds after which several processes that get nowhere are ended, and each writes down where it was: of one
        step, one evaluation, one checkpoint, or one collective before training. The first step compiles kernels.
    cuda_graphs: of the local engine on a GPU: "auto" replays recorded steps where the host would keep the GPU waiting,
        "off" never does. The kernels are the same.
    """

    engine: Literal["auto", "local", "deepspeed"] = "auto"
    zero: Literal[0, 1, 2, 3] | None = None
    deepspeed_config: str | None = None
    expert_parallel: int = 1
    expert_chunks: int = 2
    cuda_graphs: Literal["auto", "off"] = "auto"
    sequence_parallel: int = 1
    timeout: float = 600.0

    def __post_init__(self):
        if self.engine not in ("auto", "local", "deepspeed"):
            raise ValueError(f"distributed.engine must be 'auto', 'local' or 'deepspeed', got {self.engine!r}")
        if self.cuda_graphs not in ("auto", "off"):
            raise ValueError(f"distributed.cuda_graphs must be 'auto' or 'off', got {self.cuda_graphs!r}")
        if self.zero not in (None, 0, 1, 2, 3):
            raise ValueError(f"distributed.zero must be 0, 1, 2 or 3, got {self.zero!r}")
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"distributed.timeout must be a finite number of seconds above 0, got {self.timeout!r}")
        for name in ("expert_parallel", "expert_chunks", "sequence_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"distributed.{name} must be at least 1, got {getattr(self, name)}")

    def uses_deepspeed(self, processes: int) -> bool:
        """Whether so many processes are trained through DeepSpeed."""
        return self.engine == "deepspeed" or (self.engine == "auto" and processes > 1)

    def check_optimizer(self, optimizer: OptimizerConfig, dtype: str, with_deepspeed: bool) -> None:
        """Raise SettingsError for a way of keeping the optimizer's state that this engine and ZeRO stage cannot do.

        dtype: of the weights, as "bfloat16". A stage that only `deepspeed_config` names is not known here, but to the
        engine, which asks again.
        """
        if optimizer.offload and not with_deepspeed:
            raise SettingsError(
                "optimizer.offload is DeepSpeed's, and this is one process without it; set distributed.engine to "
                "deepspeed, or start more processes with torchrun"
            )
        if optimizer.offload and self.zero == 0:
            raise SettingsError("optimizer.offload works with distributed.zero 1, 2 or 3, got 0")
        if dtype == "bfloat16" and not optimizer.master_weights and with_deepspeed and self.zero in (0, 1):
            raise SettingsError(
                "optimizer.master_weights = false with bfloat16 weights works with distributed.zero 2 or 3, or in one "
                f"process without DeepSpeed, got distributed.zero = {self.zero}"
            )

    def data_ranks(self, rank: int, world_size: int) -> tuple[int, int]:
        """(rank, number) among those that take different data: neighbours that share rows take the same."""
        return rank // self.sequence_parallel, world_size // self.sequence_parallel
