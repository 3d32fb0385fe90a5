"""A whole run through train.py: what it leaves behind, that it learns, and that it goes on after a stop."""

import signal

import transformers
import yaml

from app.tiny_run import numbers, only_run, records, write_config
from tilestack.app import checkpoints
from tilestack.app.interrupts import Stop


def test_a_run_leaves_everything_that_it_promises(finished):
    left = {path.name for path in finished.iterdir()}
    assert left == {
        "config.yaml", "metrics.jsonl", "loss.png", "checkpoints", "export", "sample.txt", "tokenizer",
    }  # fmt: skip
    assert [path.name for path in checkpoints.complete(finished / "checkpoints")] == ["step-00000006", "step-00000008"]
    assert (finished / "sample.txt").read_text().startswith("The ")


def test_every_step_has_one_line_of_metrics_and_evaluations_are_in_theirs(finished):
    lines = records(finished)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8]
    assert {"loss", "lr", "tokens_per_second", "mfu", "expert_load", "memory_gib", "grad_norm"} <= set(lines[0])


def test_the_loss_falls(finished):
    losses = [line["loss"] for line in records(finished)]
    assert losses[-1] < losses[0] - 0.5


def test_plain_transformers_loads_the_export_with_its_tokenizer(finished):
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "export")
    assert type(model).__module__.startswith("transformers.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "export")
    text = "12: the model reads text é 語"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.vocab_size == len(tokenizer)


def test_the_saved_configuration_repeats_the_run_bit_for_bit(finished, run_train, tmp_path):
    again = ["--config", finished / "config.yaml", "--output.folder", tmp_path / "runs", "--output.export", "false"]
    assert run_train(*again) == 0
    assert numbers(only_run(tmp_path)) == numbers(finished)


def test_the_exported_model_trains_on_from_its_path(finished, run_train, tmp_path):
    source = yaml.safe_load((finished / "config.yaml").read_text())["data"]["source"]
    config = write_config(tmp_path, data={"source": source})
    changes = [
        "--model.path",
        finished / "export",
        "--train.steps",
        2,
        "--optimizer.lr",
        "1e-6",
        "--train.save_every",
        0,
    ]
    assert run_train("--config", config, *changes) == 0
    assert records(only_run(tmp_path))[0]["loss"] < records(finished)[3]["loss"]


def test_bfloat16_with_activation_checkpointing_trains(run_train, tmp_path):
    config = write_config(
        tmp_path,
        model={"dtype": "bfloat16", "activation_checkpointing": "selective"},
        train={"steps": 6, "save_every": 0, "eval_every": 0},
        output={"export": False, "sample_tokens": 0},
    )
    assert run_train("--config", config) == 0
    losses = [line["loss"] for line in records(only_run(tmp_path))]
    assert losses[-1] < losses[0] - 0.3


def test_ctrl_c_saves_a_checkpoint_exits_130_and_resume_repeats_the_losses(
    finished, run_train, tmp_path, monkeypatch, capsys
):
    source = yaml.safe_load((finished / "config.yaml").read_text())["data"]["source"]
    config = write_config(tmp_path, data={"source": source})
    agreed, asked = Stop.agreed, []

    def press_ctrl_c_in_step_3(stop, *arguments, **options):
        asked.append(1)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGINT)
        return agreed(stop, *arguments, **options)

    monkeypatch.setattr(Stop, "agreed", press_ctrl_c_in_step_3)
    assert run_train("--config", config) == 130
    run = only_run(tmp_path)
    assert [path.name for path in checkpoints.complete(run / "checkpoints")] == ["step-00000002", "step-00000003"]
    assert f"--resume {run}" in capsys.readouterr().err
    assert run_train("--resume", "latest", "--output.folder", tmp_path / "runs") == 0
    assert numbers(run) == numbers(finished)
