"""Whether a training split over processes is that of one process: losses, gradients, resuming, export.

    python -m tilestack.bench.equality alone FOLDER                               the model, and one process's training
    torchrun --nproc-per-node N -m tilestack.bench.equality split FOLDER          every split of whole rows
    torchrun --nproc-per-node N -m tilestack.bench.equality rows FOLDER           every split of rows
    python -m tilestack.bench.equality report FOLDER RESULT.json                  the result file

Gradients are read from the first moments of a checkpoint after one update, which are the clipped gradients times
1 - beta1. In float32 a split may differ from one process by sums in another order alone. In bfloat16 the measure is the
error of one process against float32 (`of_one_process`): a split's error against float32 is held against it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import Qwen3MoeConfig

from tilestack.bench.results import record, save
from tilestack.distributed import DistributedConfig, OptimizerConfig, make_engine, start
from tilestack.distributed.engine import Engine, MicroBatch
from tilestack.models import drawn, pretrained

STEPS, SAVED_AT = 5, 3
MICRO_BATCHES = 4  # in a step, over all processes
OPTIMIZER = OptimizerConfig(lr=1e-3, max_grad_norm=0.5)
DTYPES = ("float32", "bfloat16")
WHOLE_ROWS = {
    "ZeRO-0": {"zero": 0},
    "ZeRO-1": {"zero": 1},
    "ZeRO-2": {"zero": 2},
    "ZeRO-3": {"zero": 3},
    "ZeRO-1, experts split": {"zero": 1, "expert_parallel": -1},
    "ZeRO-2, experts split": {"zero": 2, "expert_parallel": -1},
}
SHARED_ROWS = {
    "ZeRO-1, rows split": {"zero": 1, "sequence_parallel": -1},
    "ZeRO-2, rows split": {"zero": 2, "sequence_parallel": -1},
    "ZeRO-3, rows split": {"zero": 3, "sequence_parallel": -1},
    "ZeRO-2, experts and rows split": {"zero": 2, "sequence_parallel": -1, "expert_parallel": -1},
}


@dataclasses.dataclass(frozen=True)
class Size:
    """The model and the text of a check."""

    hidden: int
    head_dim: int
    expert_hidden: int
    tokens: int
    vocabulary: int

    def config(self) -> Qwen3MoeConfig:
        """The model's configuration."""
        return Qwen3MoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.hidden,
            moe_intermediate_size=self.expert_hidden,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=self.head_dim,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            router_aux_loss_coef=0.01,
            max_position_embeddings=self.tokens,
        )


SIZES = {"cuda": Size(256, 64, 128, 2048, 2048), "cpu": Size(32, 8, 16, 64, 128)}


def step_batches(size: Size, step: int) -> list[MicroBatch]:
    """The micro-batches of a step: packed documents of uneven lengths, the first label of each ignored."""
    batches = []
    for i in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(1000 * step + i)
        cut = size.tokens // 3 + 5 * i + 1
        lengths = (cut, size.tokens - cut)
        tokens = torch.randint(size.vocabulary, (1, size.tokens), generator=generator)
        starts = torch.tensor([0, *lengths]).cumsum(0)
        labels = tokens.clone()
        labels[:, starts[:-1]] = -100
        positions = torch.cat([torch.arange(each) for each in lengths])[None]
        batch = {"input_ids": tokens, "labels": labels, "position_ids": positions, "cu_seqlens": starts.int()}
        batches.append(batch)
    num_items = sum(int((each["labels"][:, 1:] != -100).sum()) for each in batches)
    return [each | {"num_items": num_items} for each in batches]


def train(engine: Engine, distributed: DistributedConfig, size: Size, first: int, last: int) -> list[dict]:
    """Steps [first, last): what each measured."""
    rank, ranks = distributed.data_ranks(engine.rank, engine.world_size)
    results = [engine.train_step(step_batches(size, step)[rank::ranks], OPTIMIZER.lr) for step in range(first, last)]
    return [{"loss": each.loss.item(), "grad_norm": each.grad_norm.item()} for each in results]


def make(folder: Path, distributed: DistributedConfig, dtype: str) -> Engine:
    """A new engine over the check's model."""
    world = start(distributed)
    _, ranks = distributed.data_ranks(world.rank, world.world_size)
    # attention that repeats its bits, which the Hopper kernels' gradients do not
    kernels = {"attention": "tilestack-triton"} if torch.cuda.is_available() else None
    model, weights = pretrained(folder / "model", getattr(torch, dtype), kernels=kernels)
    return make_engine(model, OPTIMIZER, distributed, MICRO_BATCHES // ranks, weights=weights)


def one_training(folder: Path, distributed: DistributedConfig, size: Size, name: str, dtype: str) -> dict:
    """Train, save, resume, export: losses here, and tensors in `folder` for `report`."""
    own = folder / f"{name}-{dtype}"
    engine = make(folder, distributed, dtype)
    if engine.rank == 0:
        shutil.rmtree(own, ignore_errors=True)
        for each in ("first", "middle", "end", "resumed", "across", "export"):
            (own / each).mkdir(parents=True)
    _wait()
    steps = train(engine, distributed, size, 0, 1)
    engine.save(own / "first")
    steps += train(engine, distributed, size, 1, SAVED_AT)
    engine.save(own / "middle")
    steps += train(engine, distributed, size, SAVED_AT, STEPS)
    engine.save(own / "end")
    engine.export(own / "export")
    resumed = make(folder, distributed, dtype)
    resumed.load(own / "middle")
    again = train(resumed, distributed, size, SAVED_AT, STEPS)
    resumed.save(own / "resumed")
    resumed.load(folder / f"alone-{dtype}" / "middle")  # what another split saved
    resumed.save(own / "across")
    return {"steps": steps, "resumed": again}


def run(folder: Path, settings: dict[str, dict]) -> None:
    """Every setting in both precisions; rank 0 writes the losses."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    size = SIZES["cuda" if torch.cuda.is_available() else "cpu"]
    for name, options in settings.items():
        filled = {key: processes if value == -1 else value for key, value in options.items()}
        for dtype in DTYPES:
            began = time.perf_counter()
            try:
                found = one_training(folder, DistributedConfig(**filled), size, name, dtype)
            except Exception as error:  # the other settings still say something
                found = {"error": f"{type(error).__name__}: {error}"}
            if int(os.environ.get("RANK", 0)) == 0:
                found["processes"] = processes
                (folder / f"{name}-{dtype}.json").write_text(json.dumps(found), encoding="utf-8")
                took = time.perf_counter() - began
                print(f"{name}, {dtype}: {found.get('error') or found['steps'][-1]} in {took:.1f} s", flush=True)


def tensors(folder: Path, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, flattened tensor) of every parameter of a checkpoint, from whatever pieces hold it, in order of names."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in folder.glob("pieces-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                name, begin, found = key.rsplit(":", 2)
                if found == kind:
                    pieces.setdefault(name, []).append((int(begin), file.get_tensor(key)))
    for name, parts in sorted(pieces.items()):
        yield name, torch.cat([part for _, part in sorted(parts, key=lambda each: each[0])])


def same_bits(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same weights and moments, however they are cut."""
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return all(dict(tensors(a, kind)).keys() == dict(tensors(b, kind)).keys() for kind in kinds) and all(
        torch.equal(x, y) for kind in kinds for (_, x), (_, y) in zip(tensors(a, kind), tensors(b, kind), strict=True)
    )


def exported(folder: Path, checkpoint: Path, model: Path, dtype: torch.dtype) -> bool:
    """Whether an export, read as any model is, has the weights of a checkpoint, rounded to its dtype, bit for bit."""
    outline, weights = pretrained(folder, dtype)
    trained = dict(tensors(checkpoint, "weight"))
    for name, parameter in outline.named_parameters():
        found = torch.empty(parameter.numel(), dtype=dtype)
        weights.fill(name, 0, found)
        if not torch.equal(found, trained[name].to(dtype)):
            return False
    names = [set(json.loads((each / "config.json").read_text())) for each in (folder, model)]
    return names[0] == names[1]


def distance(a: Path, b: Path) -> float:
    """The relative distance between the gradients that two checkpoints after one update hold."""
    square, whole = 0.0, 0.0
    for (_, x), (_, y) in zip(tensors(a, "exp_avg"), tensors(b, "exp_avg"), strict=True):
        square += (x.double() - y.double()).square().sum().item()
        whole += y.double().square().sum().item()
    return (square / whole) ** 0.5


def row(folder: Path, name: str, dtype: str) -> dict:
    """One line of the result: how far a split is from one process."""
    found = json.loads((folder / f"{name}-{dtype}.json").read_text())
    case = {"split": name, "processes": found["processes"], "dtype": dtype}
    if "error" in found:
        return {"case": case, "error": found["error"]}
    own, alone, exact = (
        folder / f"{each}-{of}" for each, of in ((name, dtype), ("alone", dtype), ("alone", "float32"))
    )
    steps = json.loads((folder / f"alone-{dtype}.json").read_text())["steps"]
    right = json.loads((folder / "alone-float32.json").read_text())["steps"]
    far = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(found["steps"], right, strict=True)]
    one = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(steps, right, strict=True)]
    return {
        "case": case,
        "losses": [each["loss"] for each in found["steps"]],
        "loss_error": max(far),
        "loss_error_of_one_process": max(one),
        "gradient_error": distance(own / "first", exact / "first"),
        "gradient_error_of_one_process": distance(alone / "first", exact / "first"),
        "resumed_bit_for_bit": same_bits(own / "resumed", own / "end")
        and found["resumed"] == found["steps"][SAVED_AT:],
        "took_up_one_process_bit_for_bit": same_bits(own / "across", alone / "middle"),
        "export_bit_for_bit": exported(own / "export", own / "end", folder / "model", getattr(torch, dtype)),
    }


def report(folder: Path, result: Path) -> None:
    """Compare all that was run, print it and write the result file."""
    trainings = [(name, dtype) for name in ("alone", *WHOLE_ROWS, *SHARED_ROWS) for dtype in DTYPES]
    rows = [row(folder, *each) for each in trainings if (folder / f"{'-'.join(each)}.json").exists()]
    for each in rows:
        print(json.dumps(each), flush=True)
    save(record("equality", rows, {}), result)


def block(run: dict) -> str:
    """The table of a result file."""
    lines = [
        f"{run['device']}, torch {run['versions']['torch']}, {run['date'][:10]}:",
        "",
        "| split | processes | dtype | loss | gradient | resumes | takes up one process's | exports |",
        "|---|---|---|---|---|---|---|---|",
        *map(_line, run["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict) -> str:
    case = row["case"]
    what = f"| {case['split']} | {case['processes']} | {case['dtype']} |"
    if "error" in row:
        return f"{what} {' '.join(row['error'].split()).replace('|', '/')[:80]} | | | | |"
    errors = [
        f"{row[f'{name}_error']:.1e} ({row[f'{name}_error_of_one_process']:.1e})" for name in ("loss", "gradient")
    ]
    bits = [
        "to the bit" if row[name] else "**differs**"
        for name in ("resumed_bit_for_bit", "took_up_one_process_bit_for_bit", "export_bit_for_bit")
    ]
    return f"{what} {' | '.join([*errors, *bits])} |"


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def main() -> None:
    """See the module."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "report":
        report(folder, Path(sys.argv[3]))
        return
    if what == "alone":
        from tilestack.models import materialise

        size = SIZES["cuda" if torch.cuda.is_available() else "cpu"]
        model, weights = drawn(size.config(), torch.float32, seed=0)
        materialise(model, weights, torch.device("cpu"))
        model.save_pretrained(folder / "model")
        run(folder, {"alone": {"engine": "local", "cuda_graphs": "off"}})
    else:
        run(folder, WHOLE_ROWS if what == "split" else SHARED_ROWS)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
