"""Train a Qwen3-MoE. `python train.py --help` lists every key of the configuration; docs/design.md has the picture.

python train.py                                                  the preset for this machine
python train.py --config configs/tiny-cpu.yaml --optimizer.lr 1e-4
python train.py --resume latest                                  go on where the newest run stopped
torchrun --nproc-per-node 2 train.py --distributed.zero 2        several processes, through DeepSpeed
"""

import sys
from collections.abc import Iterator

from tilestack.app import checkpoints
from tilestack.app.config import Config, check
from tilestack.app.data.documents import open_source
from tilestack.app.data.packing import MicroBatch, PackedLoader, Position, StepBatch, held_out_batches
from tilestack.app.errors import AgreedError, StoppedError, reported
from tilestack.app.finish import finish
from tilestack.app.hardware import describe
from tilestack.app.interrupts import stoppable
from tilestack.app.log import Log, opened
from tilestack.app.metrics import Metrics
from tilestack.app.model import build, check_model, parameters
from tilestack.app.saving import Saver
from tilestack.app.schedule import learning_rate
from tilestack.app.start import Run, configure, open_run, open_tokenizer_of
from tilestack.app.trackers import check_trackers
from tilestack.distributed import Engine, Watch, World, make_engine, start, watch_ranks, watched


def main(argv: list[str] | None = None, prog: str = "train.py") -> None:
    """Train as the command line says; leaves with exit code 2 on wrong input, 130 after Ctrl-C."""
    with reported():
        config, resumed = configure(sys.argv[1:] if argv is None else argv, prog)
        train(config, resumed)


def train(config: Config, resumed: Run | None) -> None:
    """One run, from the configuration to the exported model."""
    world = start(config.distributed)
    ranks = watch_ranks(world, config.distributed.timeout)  # a rank that dies or hangs ends all
    with watched(ranks, agreed=(AgreedError, StoppedError)) as watch:
        run_on(world, watch, config, resumed)


def run_on(world: World, watch: Watch, config: Config, resumed: Run | None) -> None:
    """What every process does."""
    check(config, world.world_size)
    check_trackers(config.output.trackers)
    check_model(config)

    # APPLICATION: text
    source = open_source(config.data)
    tokenizer = open_tokenizer_of(config, resumed, source)
    data_rank, data_ranks = config.distributed.data_ranks(world.rank, world.world_size)
    shared = (source, tokenizer, config.data, data_rank, data_ranks)
    held_out = held_out_batches(*shared, config.train.eval_micro_batches)

    # MODEL ARCHITECTURES, on OPTIMIZED KERNELS: a checkpoint's weights, or new ones; each process takes its part
    model, weights = build(config, tokenizer)
    learned = parameters(model)

    # DISTRIBUTED TRAINING: one process, or deepspeed.initialize
    engine = make_engine(
        model,
        config.optimizer,
        config.distributed,
        accumulation=config.train.micro_batches // data_ranks,
        activation_checkpointing=config.model.activation_checkpointing,
        activation_offload=config.model.activation_offload,
        weights=weights,
    )
    first, position = 0, Position()
    if resumed is not None:
        first, position = checkpoints.load(resumed.checkpoint, engine, config, source.identity())
    run = open_run(config, resumed, tokenizer, world)
    watch.hint, watch.folder = f"To go on from its last checkpoint: --resume {run.folder}", run.folder
    loader = PackedLoader(*shared, config.train.micro_batches, config.train.seed, position)
    with (
        opened(run, config, first, world.rank) as log,
        Saver(run.checkpoints, engine, config, source.identity()) as saver,
    ):
        log.say(f"{run.folder}: {learned:,} parameters, {world.world_size} x {describe(world.device)}")
        if first >= config.train.steps:
            log.say(f"nothing is left to train: the checkpoint is of the last step, {first}")
        loop(config, run, engine, iter(loader), held_out, first, log, watch, saver)
    watch.at("the export")
    finish(run, config, engine, tokenizer)


def loop(
    config: Config,
    run: Run,
    engine: Engine,
    batches: Iterator[StepBatch],
    held_out: list[MicroBatch],
    first: int,
    log: Log,
    watch: Watch,
    saver: Saver,
) -> None:
    """The steps after step `first`. The device is waited for only where something is read or saved."""
    steps, every = config.train.steps, config.train
    metrics = Metrics(engine.model.config, engine.device, engine.world_size, config.optimizer.non_finite)
    with stoppable() as stop:
        for step in range(first + 1, steps + 1):
            saver.check()
            batch = next(batches)
            watch.at(f"step {step}, whose data begins at {batch.begin}")
            lr = learning_rate(config.schedule, config.optimizer.lr, step - 1, steps)
            metrics.add(step, batch, engine.train_step(batch.micro_batches, lr), lr)

            logs, evaluates = due(step, config.output.log_every), due(step, every.eval_every)
            saves = due(step, every.save_every)
            stops = stop.agreed(engine.world_size, engine.device, ask=logs)
            if logs or evaluates or saves or stops or step == steps:
                records = metrics.read()
                if held_out and (evaluates or step == steps):
                    watch.at(f"the evaluation after step {step}")
                    records[-1]["eval_loss"] = engine.evaluate(held_out)
                log.write(records)
                for text in metrics.judge(records):
                    log.say(text)
                if saves or stops or step == steps:
                    watch.at(f"the checkpoint of step {step}")
                    saver.save(step, batch.position)
                metrics.pause()
            if stops and step < steps:
                raise StoppedError(f"stopped after step {step}; to go on: python train.py --resume {run.folder}")


def due(step: int, every: int) -> bool:
    """Whether step number `step` is one of every so many; never where `every` is 0."""
    return every > 0 and step % every == 0


if __name__ == "__main__":
    main()
