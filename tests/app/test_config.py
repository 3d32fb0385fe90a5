"""The configuration: presets, overrides, the round trip through YAML, and the help that teaches."""

import dataclasses
from pathlib import Path

import pytest

from tilestack.app.config import Config, check
from tilestack.app.parse import keys, parse, to_yaml
from tilestack.app.presets import home, preset
from tilestack.app.start import configure

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_preset_is_a_valid_configuration(path):
    check(parse([], path), world_size=1)


def test_the_preset_follows_the_hardware(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert preset() == home() / "configs" / "tiny-cpu.yaml"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert preset() == home() / "configs" / "small-gpu.yaml"


def test_the_command_line_wins_over_the_file_wherever_config_stands(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("optimizer: {lr: 1e-3, beta1: 0.8}\n")
    for words in (["--optimizer.lr", "1e-4", "--config", str(file)], [f"--config={file}", "--optimizer.lr=1e-4"]):
        config, run = configure(words)
        assert (config.optimizer.lr, config.optimizer.beta1, run) == (1e-4, 0.8, None)
        assert config.output.name == "some"


def test_values_have_the_types_of_their_keys(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("")
    words = ["--distributed.zero", "3", "--output.trackers", "[wandb]", "--model.path", "null", "--train.seed", "7"]
    config = parse([*words, "--model.tie_embeddings", "true"], file)
    assert config.distributed.zero == 3 and config.model.path is None and config.model.tie_embeddings is True
    assert config.output.trackers == ["wandb"] and config.train.seed == 7


def test_a_configuration_survives_its_yaml_file(tmp_path):
    path = tmp_path / "config.yaml"
    for preset_path in CONFIGS:
        config = parse([], preset_path)
        path.write_text(to_yaml(config))
        assert parse([], path) == config


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit) as leaving:
        configure(["--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    assert [key for key in keys() if f"--{key}" not in said] == []
    for group in ("model", "data", "optimizer", "schedule", "train", "distributed", "output"):
        kind = type(getattr(Config(), group))
        for field in dataclasses.fields(kind):
            assert f"{field.name}:" in kind.__doc__ or f"{field.name}, " in kind.__doc__, f"{group}.{field.name}"
