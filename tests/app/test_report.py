"""`tilestack report`: a page about a run, from its folder alone."""

import json
import shutil

import pytest

from app.tiny_run import records
from tilestack.app.cli import main
from tilestack.app.errors import UserError
from tilestack.app.html import Line, _ticks, chart
from tilestack.app.report import main as report


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run that is done."""
    return shutil.copytree(finished, tmp_path / "20260102-030405-tiny")


def test_the_page_of_a_run_has_its_losses_checkpoints_configuration_and_sample(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run}/report.html\n"
    text = (run / "report.html").read_text()
    last = records(run)[-1]
    for expected in (
        f"{last['loss']:.4f}",
        f"--resume {run}",
        "checkpoints/step-00000008",
        "micro_batch_tokens",
        "held-out",
    ):
        assert expected in text
    assert text.count("<svg") == 5 and "sample.txt" in text
    for forbidden in ("http://", "https://", " src=", "<link", "@import", "url(", "<script"):
        assert forbidden not in text


def test_a_run_under_way_has_a_page_too(run, tmp_path):
    for name in ("export", "checkpoints"):
        shutil.rmtree(run / name)
    (run / "sample.txt").unlink()
    (run / "metrics.jsonl").write_text(json.dumps(records(run)[0]) + "\n")
    assert report([str(run), "--out", str(tmp_path / "elsewhere" / "page.html")]) == 0
    text = (tmp_path / "elsewhere" / "page.html").read_text()
    assert "not exported" in text and "no complete checkpoint" in text and "was not measured" in text


def test_what_a_run_wrote_is_escaped(run):
    (run / "sample.txt").write_text("</pre><script>alert(1)</script>")
    assert report([str(run)]) == 0
    assert "<script>" not in (run / "report.html").read_text()


def test_latest_is_the_newest_run_with_metrics(run, monkeypatch, capsys):
    (run.parent / "runs").mkdir()
    run.rename(run.parent / "runs" / run.name)
    monkeypatch.chdir(run.parent)
    assert main(["report", "latest"]) == 0
    assert f"runs/{run.name}/report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere is not the folder of a run"),
        (["latest"], "has no run with metrics"),
        (["a", "b"], "takes the folder of a run and --out FILE"),
        (["--out", "x"], "takes the folder of a run"),
    ],
)
def test_wrong_input_is_one_message(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        report(options)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_step_says_so(run):
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no finished step"):
        report([str(run)])


def test_help_says_what_it_writes(capsys):
    assert main(["report", "--help"]) == 0
    assert "--out FILE" in capsys.readouterr().out


def test_a_chart_leaves_out_what_is_not_a_number_and_has_words_for_those_who_do_not_see_it():
    text = chart([Line("a<b", [(1, 2.0), (2, float("nan")), (3, 4.0)], "kernels", dots=True)], "step", "loss")
    assert text.count("<circle") == 2 and "nan" not in text and "a&lt;b: 4 at the end" in text
    assert chart([Line("empty", [], "kernels")], "step", "loss") == ""
    assert "<circle" in chart([Line("one", [(1, 2.0)], "kernels")], "step", "loss")


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 10, [0, 2, 4, 6, 8, 10]), (0.31, 0.39, [0.32, 0.34, 0.36, 0.38])]
)
def test_ticks_are_round_numbers(low, high, expected):
    assert _ticks(low, high) == pytest.approx(expected)
