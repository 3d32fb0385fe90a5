"""Wrong input gives one clear error, exit code 2 and nothing half-written."""

import errno
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError

from app.tiny_run import only_run, records, write_config, write_documents
from tilestack.app import checkpoints
from tilestack.app.config import Config, TrainConfig, check
from tilestack.app.errors import UserError, reported
from tilestack.app.model import check_model
from tilestack.app.trackers import check_trackers
from tilestack.distributed import DistributedConfig, SettingsError
from tilestack.kernels.device import Device


@pytest.fixture
def refused(run_train, capsys, tmp_path):
    """Run train.py, which must refuse: no run folder. Gives the one message."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert run_train(*words) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ") and "Traceback" not in said
        assert not (tmp_path / "runs").exists(), "a run folder was left behind"
        return said

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer.lrr", "1"], "unknown key --optimizer.lrr; did you mean --optimizer.lr?"),
        (["--optimiser.lr", "1"], "unknown key --optimiser.lr; did you mean --optimizer.lr?"),
        (
            ["--optimizer.nesterov", "1"],
            "unknown key --optimizer.nesterov; optimizer has the keys lr, beta1, beta2, eps,",
        ),
        (["--lr", "1"], "unknown key --lr; did you mean --optimizer.lr?"),
        (["--train.steps", "1.5"], "train.steps must be a whole number, got '1.5'"),
        (["--optimizer.lr=fast"], "optimizer.lr must be a number, got 'fast'"),
        (["--optimizer.lr"], "--optimizer.lr needs a value: a number"),
        (["--output.export", "--train.steps", "2"], "--output.export needs a value: true or false"),
        (["--model.dtype", "float16"], "model.dtype must be one of float32, bfloat16, got 'float16'"),
        (["--model.activation_offload", "2"], "model.activation_offload must be true or false, got '2'"),
        (["--model.activation_offload", "true"], "set model.activation_checkpointing to selective or full too"),
        (["--distributed.zero", "4"], "distributed.zero must be one of 0, 1, 2, 3 or null, got '4'"),
        (["--optimizer.beta1", "2"], "optimizer.beta1 must be in [0, 1), got 2.0"),
        (["--train.steps", "0"], "train.steps must be at least 1, got 0"),
        (["--model.heads", "3"], "model.heads = 3 must be a multiple of model.kv_heads = 2"),
        (["--model.experts_per_token", "17"], "model.experts_per_token = 17 is more than model.experts = 16"),
        (["--data.sequence_length", "65"], "data.sequence_length = 65 is longer than the model's positions"),
        (["--model.rope_theta", "0"], "model.rope_theta must be a finite number above 0, got 0.0"),
        (["--kernels.attention", "sdpaa"], "attention='sdpaa' is not one of"),
        (["--config", "nowhere.yaml"], "configuration file nowhere.yaml does not exist"),
        (["--config"], "--config needs a value"),
        (["steps"], "'steps' belongs to no option"),
        (["--resume", "nowhere"], "nowhere is not the folder of a run"),
        (["--data.source", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data.eval_documents", "40"], "holds 40 documents, and data.eval_documents = 40 are held out"),
        (["--model.path", "./nowhere"], "the folder ./nowhere does not exist"),
        (["--output.name", "../elsewhere"], "output.name ends the name of a folder inside output.folder"),
        (
            ["--distributed.engine", "deepspeed", "--distributed.deepspeed_config", "nowhere.json"],
            "distributed.deepspeed_config='nowhere.json' cannot be read: No such file",
        ),
    ],
)
def test_wrong_words_on_the_command_line(words, message, refused, tmp_path):
    config = ["--config", write_config(tmp_path)] if "--config" not in words else []
    assert message in refused(*config, *words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lrr: 1}", "tiny.yaml: unknown key optimizer.lrr; did you mean optimizer.lr?"),
        ("optimiser: {lr: 1}", "tiny.yaml: unknown key optimiser; did you mean optimizer?"),
        ("optimizer: 3", "tiny.yaml: optimizer is a group of keys, got 3"),
        ("optimizer: {lr: fast}", "optimizer.lr must be a number, got 'fast'"),
        ("train: {steps: null}", "train.steps must be a whole number, got null"),
        ("- 1", "must hold 'group:' and 'key: value' lines"),
        ("a: b: c", "tiny.yaml:1 cannot be read: mapping values are not allowed here"),
        ("train: {steps: 4", "tiny.yaml:1 cannot be read: expected ',' or '}'"),
        ("train: {steps: 4}\ntrain: {seed: 1}", "tiny.yaml:2 cannot be read: the key train is there a second time"),
    ],
)
def test_wrong_lines_in_the_configuration_file(text, message, refused, tmp_path):
    (tmp_path / "tiny.yaml").write_text(text)
    assert message in refused("--config", tmp_path / "tiny.yaml")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n\n", "no document has any text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: the line is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"txt": "y"}\n', "a.jsonl:3: the line must be an object with text under 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl:2: the line is not UTF-8"),
        ("a.txt", b"fine\nfine\n\xe9t\xe9\n", "a.txt:3: the line is not UTF-8"),
        ("a.csv", b"text\n", "a.csv must end in .jsonl, .txt, .parquet"),
        ("a.parquet", b"PAR1 not really", "a.parquet cannot be read"),
    ],
)
def test_broken_data_is_named_with_file_and_line(name, content, message, refused, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert message in refused("--config", write_config(tmp_path), "--data.source", tmp_path / name)


def _remove(path):
    path.unlink()


def _truncate(path):
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 10)


@pytest.fixture
def export(finished, tmp_path):
    """A Hugging Face checkpoint to damage."""
    return shutil.copytree(finished / "export", tmp_path / "export")


def test_a_checkpoint_with_a_missing_shard(export, refused, tmp_path):
    names = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (export / "model.safetensors").rename(export / "model-00001-of-00002.safetensors")
    (export / "model.safetensors.index.json").write_text(json.dumps(names))
    message = refused("--config", write_config(tmp_path), "--model.path", export)
    assert "model-00002-of-00002.safetensors" in message and "missing" in message


def test_a_checkpoint_with_a_truncated_shard(export, refused, tmp_path):
    _truncate(export / "model.safetensors")
    message = refused("--config", write_config(tmp_path), "--model.path", export)
    assert "model.safetensors" in message and "truncated" in message


def test_a_checkpoint_of_another_architecture(export, refused, tmp_path):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "'llama'" in refused("--config", write_config(tmp_path), "--model.path", export)


def test_a_folder_that_holds_neither_a_model_nor_a_tokenizer(refused, tmp_path):
    config, empty = write_config(tmp_path), tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}/config.json: missing" in refused("--config", config, "--model.path", empty)
    assert "the folder has no tokenizer.json" in refused("--config", config, "--data.tokenizer", empty)


def test_a_kernel_that_this_machine_cannot_run_is_refused_before_there_is_a_folder(refused, tmp_path, monkeypatch):
    words = ("--config", write_config(tmp_path), "--kernels.attention", "tilestack")
    monkeypatch.setattr(Device, "current", lambda: Device("cpu", "cpu", "cpu"))
    assert "kernels.attention: 'tilestack' cannot run here: runs on cuda" in refused(*words)


def test_a_checkpoint_whose_configuration_was_cut_short(export, refused, tmp_path):
    _truncate(export / "config.json")
    message = refused("--config", write_config(tmp_path), "--model.path", export)
    assert f"{export}/config.json: not a JSON object" in message


def test_a_sequence_longer_than_the_checkpoints_positions(export, refused, tmp_path):
    config = write_config(tmp_path, data={"sequence_length": 65})
    message = refused("--config", config, "--model.path", export)
    assert (
        f"data.sequence_length = 65 is longer than the model's positions (max_position_embeddings of {export}"
        in message
    )


@pytest.fixture
def stopped(finished, tmp_path):
    """A run to resume, with checkpoints at steps 6 and 8."""
    return shutil.copytree(finished, tmp_path / "stopped")


@pytest.mark.parametrize(
    ("damage", "said"), [(_remove, "is missing"), (_truncate, "is truncated")], ids=["missing", "truncated"]
)
@pytest.mark.parametrize("name", ["pieces-00000-0000.safetensors", "engine.json", "random-00000.safetensors"])
def test_a_resume_from_a_damaged_checkpoint(name, damage, said, stopped, refused):
    damage(stopped / "checkpoints" / "step-00000008" / name)
    message = refused("--resume", stopped)
    assert f"step-00000008/{name} {said}" in message and "remove" in message


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--optimizer.lr", "0.5"], "optimizer.lr is 0.5, but"),
        (["--model.layers", "3"], "model.layers is 3, but"),
        (["--train.steps", "20"], "train.steps is 20, but"),
        (["--train.seed", "1"], "train.seed is 1, but"),
        (["--data.micro_batch_tokens", "48"], "data.micro_batch_tokens is 48, but"),
    ],
)
def test_a_resume_with_another_configuration_names_the_key(words, key, stopped, refused):
    assert key in refused("--resume", stopped, *words)


def test_a_resume_with_other_data(stopped, refused, tmp_path):
    source = tmp_path / "documents.jsonl"
    state = stopped / "checkpoints" / "step-00000008" / "state.json"
    write_documents(source, count=41)
    config = write_config(tmp_path)
    saved = json.loads(state.read_text())
    saved["config"]["data"]["source"] = str(source)  # the same name, another content
    manifest = json.loads((state.parent / "manifest.json").read_text())
    state.write_text(json.dumps(saved))
    manifest["bytes"]["state.json"] = state.stat().st_size
    (state.parent / "manifest.json").write_text(json.dumps(manifest))
    message = refused("--resume", stopped, "--config", config)
    assert "data.source: the data is not what" in message


def test_a_run_without_a_complete_checkpoint_cannot_be_resumed(stopped, refused):
    for checkpoint in checkpoints.complete(stopped / "checkpoints"):
        checkpoint.rename(checkpoint.with_name(f".tmp-{checkpoint.name}"))
    assert "has no complete checkpoint" in refused("--resume", stopped)


def test_a_tracker_that_is_not_installed():
    with pytest.raises(UserError, match="output.trackers: no_such_tracker is not installed; run: pip install"):
        check_trackers(["no_such_tracker"])


def test_a_batch_that_the_world_size_does_not_divide():
    with pytest.raises(
        UserError, match=r"train.micro_batches = 3 does not divide evenly over 2 processes; take a multi"
    ):
        check(Config(train=TrainConfig(micro_batches=3)), world_size=2)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [("expert_parallel", "keeps all experts on every process"), ("sequence_parallel", "keeps rows whole")],
)
def test_a_resume_in_fewer_processes_than_share_the_work_says_how(name, meaning, stopped, refused):
    said = refused("--resume", stopped, f"--distributed.{name}", 2)
    assert f"= 2 must divide the number of processes, 1; --distributed.{name} 1 {meaning}" in said


def test_a_split_that_the_model_does_not_allow_is_refused_before_it_is_built():
    experts = DistributedConfig(expert_parallel=3)
    with pytest.raises(SettingsError, match="expert_parallel = 3 must divide the model's 16 experts evenly"):
        check_model(Config(distributed=experts))
    with pytest.raises(SettingsError, match="expert_parallel works with ZeRO 1 or 2, got distributed.zero = 3"):
        check(Config(distributed=DistributedConfig(expert_parallel=2, zero=3)), world_size=2)


def test_not_enough_memory_says_what_was_needed_and_what_to_change(run_train, tmp_path, monkeypatch, capsys):
    def exhaust(*_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 18.55 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 "
            "GiB is free. Including non-PyTorch memory, this process has 77.90 GiB memory in use."
        )

    monkeypatch.setattr("tilestack.distributed.local.LocalEngine.train_step", exhaust)
    assert run_train("--config", write_config(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "not enough memory on the GPU: 18.55 GiB more were needed, 1.20 GiB were free" in said
    assert "--data.micro_batch_tokens" in said and "--model.activation_checkpointing" in said
    assert not checkpoints.complete(only_run(tmp_path) / "checkpoints")


def test_the_cpus_own_out_of_memory_error_is_recognised(capsys):
    with pytest.raises(SystemExit) as leaving, reported():
        torch.empty(2**60, dtype=torch.uint8)
    assert leaving.value.code == 2
    assert "not enough memory on the CPU: 1152921504606846976 bytes more were needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "runs/x/.tmp-export/tokenizer.json"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_no_bug_and_the_way_on_is_told(error, capsys):
    with pytest.raises(SystemExit) as leaving, reported():
        raise error
    assert leaving.value.code == 2
    assert f"error: {error}; make room on that disk. A run goes on from" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), reported():
        raise RuntimeError("a bug")


def test_a_gradient_that_is_not_finite_stops_the_run(run_train, tmp_path, capsys):
    config = write_config(tmp_path, optimizer={"lr": 1e30}, schedule={"warmup_steps": 0})
    assert run_train("--config", config) == 2
    assert "or the gradient (norm" in capsys.readouterr().err
    assert records(only_run(tmp_path))[-1]["skipped"], "the step is on record"


def test_ctrl_c_outside_the_loop_does_not_say_that_nothing_was_ever_saved(capsys):
    with pytest.raises(SystemExit) as left, reported():
        raise KeyboardInterrupt
    assert left.value.code == 130
    assert "nothing was saved after the last checkpoint" in capsys.readouterr().err
