"""The small parts: the schedule, metrics and their file, the display, checkpoints' housekeeping, the stop flag."""

import io
import json
import signal

import pytest
import torch
from rich.console import Console

from tilestack.app.config import ModelConfig, ScheduleConfig
from tilestack.app.data.packing import Position, StepBatch
from tilestack.app.display import Display, duration
from tilestack.app.errors import UserError
from tilestack.app.hardware import peak_flops
from tilestack.app.interrupts import Stop, stoppable
from tilestack.app.metrics import Metrics, MetricsFile
from tilestack.app.model import new_config
from tilestack.app.schedule import learning_rate
from tilestack.distributed import StepResult
from tilestack.models.flops import training_flops_per_token

SHAPE = new_config(ModelConfig(), vocab_size=300, end_of_text=0)


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_to_the_peak_and_decays_to_its_end(decay):
    schedule = ScheduleConfig(decay=decay, warmup_steps=10, final_ratio=0.1)
    rates = [learning_rate(schedule, 2.0, step, steps=101) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == rates[9] == rates[10] == 2.0
    middle, last = {"cosine": (1.1, 0.2), "linear": (1.1, 0.2), "constant": (2.0, 2.0)}[decay]
    assert rates[55] == pytest.approx(middle) and rates[100] == pytest.approx(last)
    assert all(later <= earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))


def test_a_run_shorter_than_its_warm_up_has_rates():
    assert learning_rate(ScheduleConfig(warmup_steps=10), 1.0, step=2, steps=3) == pytest.approx(0.3)
    assert learning_rate(ScheduleConfig(warmup_steps=0), 1.0, step=0, steps=1) == 1.0


def result(loss=1.0, norm=1.0, load=(0.5, 0.25, 0.25, 0.0)):
    return StepResult(*(torch.tensor(each) for each in (loss, 0.1, norm)), torch.tensor(load))


def batch(tokens=1000, length=100):
    return StepBatch(
        [], tokens - 10, tokens, attended=tokens * length, position=Position(epoch=2), begin=Position(1, 2, 3)
    )


def test_mfu_is_the_models_own_operations_over_the_peak_of_all_gpus(monkeypatch):
    monkeypatch.setattr("tilestack.app.metrics.peak_flops", lambda device: 1e12)
    metrics = Metrics(SHAPE, torch.device("cpu"), world_size=4, non_finite="stop")
    monkeypatch.setattr(metrics, "pause", lambda: 2.0)
    for step in (1, 2):
        metrics.add(step, batch(), result(loss=step), lr=0.5)
    first, second = metrics.read()
    assert (first["loss"], second["loss"], first["epoch"], first["lr"]) == (1.0, 2.0, 2, 0.5)
    assert first["tokens_per_second"] == 2000 / 2.0
    assert first["mfu"] == round(2000 * training_flops_per_token(SHAPE, 100) / 2.0 / 4e12, 4)
    assert first["expert_load"] == 2.0
    assert metrics.read() == []


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A10G", None),
    ],
)
def test_a_gpus_peak_is_found_by_whole_words_of_its_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)


def test_mfu_is_not_available_on_a_cpu():
    metrics = Metrics(SHAPE, torch.device("cpu"), world_size=1, non_finite="stop")
    metrics.add(1, batch(), result(), lr=0.5)
    assert metrics.read()[0]["mfu"] is None


def test_skipped_updates_are_recorded_where_the_configuration_wants_to_go_on():
    metrics = Metrics(SHAPE, torch.device("cpu"), world_size=1, non_finite="skip")
    metrics.add(1, batch(), result(norm=float("nan")), lr=0.5)
    metrics.add(2, batch(), result(loss=float("inf")), lr=0.5)
    metrics.add(3, batch(), result(), lr=0.5)
    records = metrics.read()
    place = {"epoch": 1, "document": 2, "token": 3}
    assert [record.get("data") for record in records] == [place, place, None]
    assert [record.get("skipped") for record in records] == [True, True, None]
    first, second = metrics.judge(records)
    assert "step 1, whose data begins at epoch 1, document 2, token 3: the loss (1.0) or" in first
    assert "step 2" in second and "inf" in second


def test_the_first_step_that_is_not_finite_stops_a_run_that_wants_it_with_its_place_in_the_data():
    metrics = Metrics(SHAPE, torch.device("cpu"), world_size=1, non_finite="stop")
    metrics.add(7, batch(), result(), lr=0.5)
    metrics.add(8, batch(), result(norm=float("nan")), lr=0.5)
    records = metrics.read()
    with pytest.raises(UserError, match="step 8, whose data begins at epoch 1, document 2, token 3"):
        metrics.judge(records)


def test_what_came_after_a_checkpoint_and_a_torn_line_are_cut(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append([{"step": step} for step in (1, 2, 3)])
    with file.path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [record["step"] for record in file.read()] == [1, 2, 3]
    file.cut(2)
    assert [json.loads(line) for line in file.path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]


RECORD = {
    "step": 5, "loss": 3.21987, "lr": 1e-3, "tokens_per_second": 12345.6, "mfu": 0.412, "expert_load": 1.5,
    "memory_gib": 2.25, "seconds": 10.0, "eval_loss": 3.5,
}  # fmt: skip


def test_without_a_terminal_progress_is_plain_lines(capsys):
    display = Display(first=0, steps=20)
    with display.running():
        display.update([RECORD])
    said = capsys.readouterr().out
    assert "step     5/20  loss 3.2199  lr 1.00e-03  12,346 tokens/s  MFU 41.2%" in said
    assert "left 0:30" in said and "held-out text 3.5000" in said and "\x1b" not in said


def test_on_a_terminal_progress_is_a_bar_with_the_same_numbers(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=200, _environ={"TERM": "xterm"})
    monkeypatch.setattr("tilestack.app.display.Console", lambda **_: terminal)
    display = Display(first=0, steps=20)
    with display.running():
        display.update([RECORD])
    assert "5/20" in screen.getvalue() and "loss 3.2199" in screen.getvalue()


def test_durations_are_read_at_a_glance():
    assert [duration(seconds) for seconds in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]


def test_a_second_ctrl_c_stops_at_once_but_the_launchers_copy_of_the_first_does_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tilestack.app.interrupts.time.monotonic", lambda: now[0])
    stop = Stop()
    assert not stop.agreed(1, torch.device("cpu"), ask=False)
    stop.receive(signal.SIGINT)
    stop.receive(signal.SIGTERM)
    stop.receive(signal.SIGINT)
    assert stop.agreed(1, torch.device("cpu"), ask=False)
    now[0] += 5
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT)


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGINT)
    with stoppable():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
