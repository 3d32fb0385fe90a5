"""How a run starts: which configuration, and a new folder or one to go on in."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tilestack.app import checkpoints
from tilestack.app.config import Config
from tilestack.app.data.documents import Source
from tilestack.app.data.tokenizer import open_tokenizer
from tilestack.app.errors import UserError
from tilestack.app.files import write_text
from tilestack.app.parse import EXAMPLES, parse, parser, take_option, to_yaml
from tilestack.app.presets import preset
from tilestack.app.processes import from_rank_0, wait_for_all
from tilestack.distributed import World

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Run:
    """The folder of a run and what is in it.

    checkpoint: the complete checkpoint to go on from, None for a new run.
    """

    folder: Path
    checkpoint: Path | None = None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def export(self) -> Path:
        return self.folder / "export"


def configure(argv: list[str], prog: str = "train.py") -> tuple[Config, Run | None]:
    """The configuration of the command line, and the run to go on with (None: a new one). --help prints and exits.

    The configuration comes from --config, else from the run that is resumed, else from the preset of this machine.
    """
    if "-h" in argv or "--help" in argv:
        parser(prog).print_help()
        print(EXAMPLES)
        raise SystemExit(0)
    file, argv = take_option(argv, "config")
    resume, argv = take_option(argv, "resume")
    if resume is None:
        path = Path(file) if file else preset()
        config = parse(argv, path, prog)
        if config.output.name is None:
            config = _named(config, path.stem)
        return config, None
    folder = _find_run(resume, argv)
    config = parse(argv, Path(file) if file else folder / CONFIG, prog)
    saved = checkpoints.complete(folder / "checkpoints")
    if not saved:
        raise UserError(f"--resume: {folder} has no complete checkpoint; start it again without --resume")
    return config, Run(folder, saved[-1])


def open_tokenizer_of(config: Config, run: Run | None, source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that a resumed run saved, or a new run's."""
    if run is None:
        return open_tokenizer(config.data, config.model.path, source)
    try:
        return AutoTokenizer.from_pretrained(run.tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--resume: the tokenizer in {run.tokenizer} cannot be read: {error}") from None


def open_run(config: Config, run: Run | None, tokenizer: PreTrainedTokenizerBase, world: World) -> Run:
    """The run to go on with, or a new folder with config.yaml and the tokenizer in it; every rank calls it.

    Called when all input is known to be good: wrong input leaves no folder behind.
    """
    if run is not None:
        if world.rank == 0:
            checkpoints.clean(run.checkpoints)
        return run
    parent, second = Path(config.output.folder), int(time.time())
    while world.rank == 0 and _folder(parent, second, config).exists():
        second += 1
    run = Run(_folder(parent, from_rank_0(second, world.device), config))
    if world.rank == 0:
        try:
            run.checkpoints.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"output.folder: {run.folder} cannot be made: {error}") from None
        write_text(run.folder / CONFIG, to_yaml(config))
        tokenizer.save_pretrained(run.tokenizer)
    wait_for_all()
    return run


def _folder(parent: Path, second: int, config: Config) -> Path:
    return parent / f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(second))}-{config.output.name}"


def _named(config: Config, name: str) -> Config:
    return dataclasses.replace(config, output=dataclasses.replace(config.output, name=name))


def _find_run(resume: str, argv: list[str]) -> Path:
    if resume != "latest":
        folder = Path(resume)
        if not (folder / CONFIG).is_file():
            raise UserError(f"--resume: {folder} is not the folder of a run (it has no {CONFIG})")
        return folder
    parent = Path(take_option(argv, "output.folder")[0] or "runs")
    runs = [path.parent for path in parent.glob(f"*/{CONFIG}") if checkpoints.complete(path.parent / "checkpoints")]
    if not runs:
        raise UserError(
            f"--resume latest: no run in {parent}/ has a checkpoint (set --output.folder if they lie elsewhere)"
        )
    return max(runs, key=lambda folder: folder.name)
