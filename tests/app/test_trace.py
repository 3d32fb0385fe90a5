"""`tilestack trace`: what ran is in the picture, once, under the right name; the page needs nothing from elsewhere."""

import json
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer

from app.tiny_run import write_config
from tilestack.app.ceilings import ceilings
from tilestack.app.cli import main
from tilestack.app.config import Config
from tilestack.app.errors import UserError
from tilestack.app.explain import named_device, training_calls
from tilestack.app.model import new_config
from tilestack.app.parse import from_tree, to_plain
from tilestack.app.start import configure
from tilestack.app.trace import command, events, session
from tilestack.app.trace.attribution import KERNELS, LAYERS, OTHER
from tilestack.app.trace.page import page
from tilestack.app.trace.rates import Rates
from tilestack.app.trace.recording import MODULE, module_ranges
from tilestack.app.trace.rival import as_transformers_likes_it
from tilestack.app.trace.words import compared, milliseconds, percent
from tilestack.bench import tables
from tilestack.bench import trace as bench
from tilestack.distributed import World
from tilestack.distributed.expert_parallel import ROUTES
from tilestack.kernels import moe, ops, work


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(folder, what `show` was given) of a tiny run beside transformers, by the command itself."""
    folder = tmp_path_factory.mktemp("traced")
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "show", shown.append)
        options = ["--config", str(write_config(folder)), "--out", str(folder / "out"), "--steps", "1", "--warmup", "1"]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        assert main(["trace", *options, "--compare", "transformers"]) == 0
        torch.set_num_threads(threads)
    return folder, shown[0]


@pytest.fixture
def written(traced):
    return json.loads((traced[0] / "out" / "trace.json").read_text())


def entries(run: dict, layer: str) -> list[dict]:
    return next(each["entries"] for each in run["layers"] if each["layer"] == layer)


def assert_consistent(run: dict) -> None:
    """Every total is the sum of its parts, by every way of cutting it up, and shares add up to 1."""
    assert run["device_ms"] > 0
    for rows in (run["layers"], run["owners"]):
        assert sum(row["ms"] for row in rows) == pytest.approx(run["device_ms"])
        assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["ms"] for row in run["parts"]) == pytest.approx(run["device_ms"])
    assert run["busy_ms"] + run["idle_ms"] == pytest.approx(run["traced_ms"])
    for layer in run["layers"]:
        assert sum(entry["ms"] for entry in layer["entries"]) == pytest.approx(layer["ms"])
        for entry in layer["entries"]:
            assert sum(kernel["ms"] for kernel in entry["kernels"]) == pytest.approx(entry["ms"])
            directions = entry["forward_ms"] + entry["backward_ms"] + entry["recompute_ms"]
            assert directions <= entry["ms"] * (1 + 1e-9)


def test_totals_are_the_sums_of_what_they_are_made_of(written):
    assert [run["name"] for run in written["runs"]] == ["tilestack", "transformers"]
    for run in written["runs"]:
        assert_consistent(run)
        assert run["busy_ms"] <= run["traced_ms"] and run["step_ms"] > 0


def test_every_op_is_under_the_implementation_that_explain_names(traced, written):
    config, _ = configure(["--config", str(traced[0] / "tiny.yaml")])
    calls = training_calls(config, new_config(config.model, config.data.vocab_size, 0), named_device("cpu"))
    expected = {name: ops()[name].choose(call, "auto").name for name, call in calls.items()}
    found = {entry["what"]: entry["implementation"] for entry in entries(written["runs"][0], KERNELS)}
    assert found.items() <= expected.items()
    assert expected.keys() - found.keys() == {"sort_routes"}, "moe's reference needs no sorted routes"


def test_every_op_of_a_training_step_has_a_formula_for_its_work():
    shape = new_config(Config().model, 300, 0)
    shape.mlp_only_layers = [1]
    assert training_calls(Config(), shape, named_device("sm_90")).keys() <= set(work._FORMULAS)


@pytest.mark.parametrize("most", [None, 40])
def test_rates_of_experts_count_the_routes_that_this_rank_has(most, tmp_path):
    ids = torch.full((64, 2), -1, dtype=torch.int32)  # of other ranks, but for some
    ids[:20] = torch.tensor([0, 3], dtype=torch.int32)
    x, gate_up, down = (torch.randn(size, requires_grad=True) for size in ((64, 32), (4, 32, 32), (4, 32, 16)))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        moe(x, gate_up, down, ids, torch.rand(64, 2), most_routes=most)
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    found = events.read(json.loads((tmp_path / "trace.json").read_text()))
    (call,) = [each for each in found.host if each.name.startswith("tilestack::moe_forward")]
    assert Rates(found.host, 0.0)._forward_work("moe", call).forward_flops == 3 * 2 * (most or 64 * 2) * 32 * 16


@pytest.mark.parametrize(("experts", "rows"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_calls_that_explain_shows_are_those_of_one_rank(experts, rows):
    split = {"expert_parallel": experts, "expert_chunks": 2, "sequence_parallel": rows}
    tree = to_plain(Config())
    tree["distributed"] |= split
    shape = new_config(Config().model, 300, 0)
    tokens = tree["data"]["micro_batch_tokens"] // rows
    calls = training_calls(from_tree(tree), shape, named_device("sm_90"))
    sizes = {op: {name: each.shape for name, each in call.tensors.items() if each} for op, call in calls.items()}
    assert sizes["rms_norm"]["x"][1] == sizes["linear_cross_entropy"]["hidden"][0] == tokens
    assert sizes["attention"]["q"][:2] == (tokens * rows, shape.num_attention_heads // rows)
    assert sizes["attention"]["k"][1] == max(shape.num_key_value_heads // rows, 1)
    assert sizes["moe"]["gate_up"][0] == sizes["adamw"]["param"][0] == shape.num_experts // experts
    bound = calls["moe"].params.most_routes
    if experts == 1:
        assert bound == -1 and sizes["moe"]["x"][0] == tokens
    else:
        K = shape.num_experts_per_tok
        assert sizes["moe"]["x"][0] == round(tokens / 2 * 2 * (1 - 0.5**K)), "a chunk of each of two ranks"
        assert bound >= tokens // 2 * K > bound - ROUTES


def test_forward_and_backward_of_an_op_are_told_apart(written):
    for entry in entries(written["runs"][0], KERNELS):
        has_backward = entry["what"] not in ("adamw", "sort_routes")
        assert (entry["backward_ms"] > 0) == has_backward
        assert (entry["forward_ms"] > 0) == (entry["what"] != "adamw")
        assert entry["recompute_ms"] == 0 and entry["calls"] >= 1
        assert entry["tflops"] or entry["gbps"], f"{entry['what']} has no rate"
        assert entry["of_ceiling"] > 0


def test_on_a_cpu_everything_has_a_place(written):
    assert all(layer["layer"] != OTHER for run in written["runs"] for layer in run["layers"])
    assert "no GPU" in (page_of(written))


def page_of(found: dict) -> str:
    empty = {"duration": 1, "view": [0, 1], "names": [], "lanes": [], "left_out": 0}
    return page(found | {"runs": [{"timeline": empty} | run for run in found["runs"]]})


def test_plain_transformers_starts_from_the_same_weights_and_has_no_op_of_ours_but_the_optimizer(written):
    ours, theirs = written["runs"]
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-4)
    assert [entry["what"] for entry in entries(theirs, KERNELS)] == ["adamw"]
    parts = {row["part"] for row in theirs["parts"]}
    assert {"attention", "experts", "router", "LM head and losses", "norms and residuals", "optimizer"} <= parts


def test_the_comparison_has_every_part_and_ends_with_the_whole_step(written):
    rows = compared(written["runs"])
    ours, theirs = written["runs"]
    named = ", ".join(row["part"] for row in rows)
    assert all(row["part"] in named for row in ours["parts"] + theirs["parts"])
    assert sum(row["ours"] for row in rows[:-2]) == pytest.approx(ours["device_ms"])
    assert sum(row["theirs"] for row in rows[:-2]) == pytest.approx(theirs["device_ms"])
    assert rows[-1]["ratio"] == pytest.approx(theirs["step_ms"] / ours["step_ms"])


def test_the_page_needs_nothing_from_elsewhere(traced):
    text = (traced[0] / "out" / "trace.html").read_text()
    for forbidden in ("http://", "https://", "//cdn", " src=", "<link", "@import", "url(", "import(", "fetch("):
        assert forbidden not in text, forbidden
    for layer in LAYERS[:-2]:
        assert f">{layer}<" in text
    assert 'lang="en"' in text and "<noscript>" in text and "@media print" in text


def test_the_timeline_in_the_page_is_that_of_the_run(traced):
    text = (traced[0] / "out" / "trace.html").read_text()
    for run, raw in zip(traced[1]["runs"], re.findall(r'application/json">(.*?)</script>', text), strict=True):
        drawn = json.loads(raw)
        shown = [event for lane in drawn["lanes"] if lane["kind"] == "device" for event in lane["events"]]
        assert len(shown) == run["kernels_per_step"]
        assert {lane["kind"] for lane in drawn["lanes"]} == {"host", "device"}
        for start, duration, name, entry, _ in shown:
            assert start >= 0 and start + duration <= drawn["duration"] + 0.2
            assert name < len(drawn["names"]) and 0 <= entry < len(drawn["entries"])


def test_names_are_escaped_in_the_page(written):
    bad = "</script><img onerror=alert(1)>&"
    found = json.loads(json.dumps(written).replace("aten::mm", json.dumps(bad)[1:-1]))
    found["device"]["name"] = found["command"] = found["runs"][0]["name"] = bad
    for run in found["runs"]:
        lane = {"name": bad, "kind": "device", "events": [[0, 1, 0, 0, 0]]}
        run["timeline"] = {"duration": 1, "view": [0, 1], "names": [bad], "lanes": [lane], "left_out": 0}
    text = page(found)
    assert "<img" not in text and text.count("</script>") == len(found["runs"]) + 1
    assert "&lt;img onerror" in text


def test_the_bench_keeps_the_figures_as_a_result_file_with_the_page_beside_it(traced, tmp_path, monkeypatch):
    seen = []

    def trace(config, *rest):
        seen.append(config)
        return {name: value for name, value in traced[1].items() if name != "command"} | {
            "facts": {"x": [config.data.source]}
        }

    monkeypatch.setattr(bench, "trace", trace)
    monkeypatch.setattr(bench, "show", lambda found: None)
    monkeypatch.setattr(bench, "prepare", lambda folder, vocabulary: (folder / "text.jsonl", folder / "tokenizer"))
    path = bench.run(4, 2, 4096, tmp_path)
    run = json.loads(path.read_text())
    assert {"bench", "device", "versions", "commit", "date", "ceilings", "rows"} <= run.keys()
    assert seen[0].data.micro_batch_tokens == 8192 and seen[0].model.hidden == 2048
    page = path.with_suffix(".html").read_text()
    assert "bench trace --layers 4 --batch 2 --seqlen 4096" in page and "timeline" not in run["rows"][0]
    assert str(seen[0].data.source) not in page, "a folder that is no more"
    monkeypatch.setattr(tables, "result_files", lambda name: [path])
    monkeypatch.setattr(tables, "read", lambda path: run | {"configuration": to_plain(seen[0])})
    table = tables.trace_table()
    assert "4 layers, 2 x 4096 tokens" in table and "| experts |" in table and "| whole step," in table


def test_the_bench_s_tokenizer_has_as_many_tokens_as_the_model(tmp_path):
    text, folder = bench.prepare(tmp_path, 400)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 400 and tokenizer.eos_token_id is not None
    assert len(json.loads(text.read_text())["text"]) > 100_000


def test_a_rival_that_does_not_fit_is_said_and_the_rest_is_shown(written):
    found = written | {
        "runs": [written["runs"][0], {"name": "transformers", "error": "not enough memory <on the GPU>"}]
    }
    text = page_of(found)
    assert "not enough memory &lt;on the GPU&gt;" in text and "times the speed" not in text
    command.show({**found})


def test_parameters_are_counted_before_an_engine_splits_the_experts(traced, monkeypatch):
    config, _ = configure(["--config", str(traced[0] / "tiny.yaml")])
    world = World(0, 1, torch.device("cpu"))
    whole = {}

    def split(model, *args, **kwargs):
        whole["count"] = sum(each.numel() for each in model.parameters())
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.data = layer.mlp.experts.down_proj.data[:1]
        return model

    monkeypatch.setattr(session, "make_engine", split)
    source = session.open_source(config.data)
    tokenizer = session.open_tokenizer(config.data, config.model.path, source)
    made = session.Session(config, world, source, tokenizer, {}, 1, 1, lambda text: None)
    model, learned = session._engine(session.OURS, made)
    assert sum(each.numel() for each in model.parameters()) < learned == whole["count"]


def test_memory_that_runs_out_in_the_rival_is_its_error_alone(traced, monkeypatch):
    def run(name, *rest):
        if name == session.RIVAL:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. 3.00 GiB is free")
        return {"name": name}

    monkeypatch.setattr(session, "_run", run)
    config, _ = configure(["--config", str(traced[0] / "tiny.yaml")])
    world = World(0, 1, torch.device("cpu"))
    found = session.trace(config, world, session.RIVAL, 1, 1, lambda text: None)
    assert found["runs"][1] == {
        "name": "transformers",
        "error": "not enough memory on the GPU: 20.00 GiB more were needed, 3.00 GiB were free",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "liger"], "--compare must be transformers, got 'liger'"),
        (["--steps", "0"], "--steps must be a whole number of at least 1, got '0'"),
        (["--warmup", "many"], "--warmup must be a whole number"),
        (["--resume", "latest"], "--resume: trace starts from new weights"),
        (["--model.layer", "3"], "did you mean --model.layers"),
        (["--model.layers", "0"], "model.layers must be at least 1"),
    ],
)
def test_wrong_input_is_one_message_and_nothing_is_written(options, message, tmp_path):
    config = write_config(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        command.main(["--config", str(config), *options])
    assert not (tmp_path / "runs").exists()


def test_a_place_that_cannot_be_written_is_told_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: .*file/below cannot be made"):
        command.main(["--config", str(write_config(tmp_path)), "--out", str(tmp_path / "file" / "below")])


def test_a_comparison_is_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "start", lambda distributed: World(0, 2, torch.device("cpu")))
    with pytest.raises(UserError, match="--compare transformers runs in one process"):
        command.main(["--config", str(write_config(tmp_path)), "--compare", "transformers"])


def test_help_teaches_how_to_read_the_picture(capsys):
    assert main(["trace", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--compare transformers" in printed and "of ceiling" in printed and "add up to 100%" in printed


def test_the_device_s_ceilings_are_measured_on_a_cpu_too():
    found = ceilings(torch.device("cpu"), torch.float32)
    assert 1e-3 < found["matmul_tflops"] < 100 and 0.1 < found["copy_gbps"] < 10_000


def test_a_module_s_range_ends_where_its_forward_raises():
    class Odd(torch.nn.Module):
        def forward(self, x):
            raise KeyError("as a recomputation that stops")

    model = torch.nn.Sequential(torch.nn.Identity(), Odd())
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
        module_ranges(model),
        pytest.raises(KeyError),
    ):
        model(torch.zeros(1))
    ranges = [event.name for event in profiler.events() if event.name.startswith(MODULE)]
    assert sorted(ranges) == [MODULE, f"{MODULE}0", f"{MODULE}1"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_pieces_of_one_length_become_rows_for_transformers_and_others_stay_packed():
    def batch(*lengths):
        tokens = torch.arange(sum(lengths))[None]
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return {"input_ids": tokens, "labels": tokens, "position_ids": tokens, "cu_seqlens": offsets, "num_items": 3}

    rows = as_transformers_likes_it(batch(4, 4))
    assert rows["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and "position_ids" not in rows
    packed = as_transformers_likes_it(batch(4, 3))
    assert packed["input_ids"].shape == (1, 7) and "position_ids" in packed and "cu_seqlens" not in packed


def test_ranges_know_their_parents_and_the_time_that_is_their_own():
    def host(name, start, duration, kind="cpu_op", **arguments):
        return {"ph": "X", "cat": kind, "name": name, "tid": 1, "ts": start, "dur": duration, "args": arguments}

    launch = host("cudaLaunchKernel", 12, 1, "cuda_runtime", correlation=7)
    kernel = {
        "ph": "X",
        "cat": "kernel",
        "name": "k",
        "tid": 9,
        "ts": 50,
        "dur": 5,
        "args": {"correlation": 7, "stream": 3},
    }
    orphan = kernel | {"name": "orphan", "args": {"correlation": 8, "stream": 3}}
    trace = {"traceEvents": [launch, host("outer", 0, 40), host("inner", 10, 5), host("later", 40, 2), kernel, orphan]}
    found = events.read(trace)
    times = {event.name: event.self_us for event in found.host}
    assert times == {"outer": 35, "inner": 4, "cudaLaunchKernel": 1, "later": 2}
    first, second = found.device
    assert [each.name for each in first.launch.chain()] == ["cudaLaunchKernel", "inner", "outer"] and first.stream == 3
    assert second.launch is None


@pytest.mark.parametrize(
    ("value", "text"), [(0, ""), (1e-4, ""), (0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_times_have_three_digits_that_count(value, text):
    assert milliseconds(value) == text


def test_small_shares_are_not_said_to_be_nothing():
    assert [percent(each) for each in (0, 1e-5, 0.0123, 1)] == ["", "<0.1%", "1.2%", "100.0%"]
