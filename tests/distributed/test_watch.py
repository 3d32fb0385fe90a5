"""A rank that dies, fails or hangs ends all of them, and is named. Real processes, without torch."""

import json
import signal
import subprocess
import sys
import time

import pytest

from distributed import ringed

LIMIT_S = 60


def run(folder, ranks: int, harm: str, victim: int = 0) -> tuple[list[int], list[str]]:
    """The exit codes of all ranks, and what each said; all within LIMIT_S."""
    started = [
        subprocess.Popen(
            [sys.executable, ringed.__file__, *map(str, (folder, rank, ranks, harm, victim))],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    deadline = time.monotonic() + LIMIT_S
    try:
        said = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said


def test_ranks_that_are_done_end_in_silence(tmp_path):
    assert run(tmp_path, 3, "none") == ([0, 0, 0], ["", "", ""])


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_all_and_is_named_with_its_host_step_and_data(tmp_path, victim):
    codes, said = run(tmp_path, 4, "kill", victim)
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(4)]
    speakers = {(victim - 1) % 4, 0} - {victim}
    for rank in range(4):
        assert ("died in step 2, data at document 20" in said[rank]) == (rank in speakers), said
        assert (f"rank {victim} (host " in said[rank]) == (rank in speakers)
    assert all("Resume." in said[rank] for rank in speakers)


def test_a_rank_that_raises_takes_the_others_with_it_and_its_words_reach_rank_0(tmp_path):
    codes, said = run(tmp_path, 3, "raise", victim=1)
    assert codes == [1, 1, 1]
    assert "ValueError: no more data" in said[1] and "Traceback" in said[1]
    assert "rank 1 (" in said[0] and "failed in step 2" in said[0] and "ValueError: no more data" in said[0]


def test_ranks_that_hang_leave_a_trace_of_where_each_was(tmp_path):
    codes, said = run(tmp_path, 3, "hang", victim=1)
    assert codes == [1, 1, 1]
    for rank in range(3):
        assert "for 1 s (distributed.timeout)" in said[rank]
        function = "come_to" if rank == 1 else "wait_in_a_collective"
        assert f"rank {rank} (host " in said[rank] and "was in step 2" in said[rank]
        stacks = (tmp_path / f"stuck-rank-{rank:05d}.txt").read_text()
        assert f"in {function}" in stacks and "this rank was in step 2, data at document 20" in stacks


def test_a_collective_that_waits_for_a_rank_is_named_with_the_line_it_was_called_from(tmp_path):
    codes, said = run(tmp_path, 2, "hang in gloo", victim=1)
    assert codes == [1, 1]
    assert "was in step 2, data at document 20, in all_reduce at ringed.py:" in said[0]
    assert "in all_reduce" not in said[1]
    assert "all_reduce" in (tmp_path / "stuck-rank-00000.txt").read_text()


def test_a_connection_that_does_not_know_the_word_is_no_rank(tmp_path):
    module = ringed.load_watch()
    with module.socket.create_server(("127.0.0.1", 0)) as listener:
        peer = module.Peer(("127.0.0.1",), listener.getsockname()[1], "right", "here", 1)
        stranger = module.socket.create_connection(listener.getsockname())
        stranger.sendall(b"wrong\n")
        ours = module._connect(peer)
        accepted = module._accept(listener, "right")
        assert accepted.getpeername() == ours.getsockname()
        assert stranger.recv(1) == b""


def test_a_neighbour_that_cannot_be_reached_is_a_warning_and_no_reason_to_stop(tmp_path):
    codes, said = run(tmp_path, 4, "unreachable", victim=3)
    assert codes == [0, 0, 0, 0]
    assert "warning: rank 2 cannot watch rank 3, so no rank is watched: port 1 of" in said[2]
    assert said[1] == ""


def test_what_all_ranks_agreed_to_is_no_failure_of_the_first_to_leave(tmp_path):
    codes, said = run(tmp_path, 3, "agree to stop", victim=0)
    assert codes == [1, 1, 1]
    assert all("StopIteration" in each and "error: rank" not in each for each in said)


def test_a_rank_that_is_stuck_ends_where_its_stacks_cannot_be_written(tmp_path):
    (tmp_path / "stuck-rank-00000.txt").mkdir()
    codes, said = run(tmp_path, 2, "hang", victim=1)
    assert codes == [1, 1]
    assert "for 1 s (distributed.timeout)" in said[0] and "in wait_in_a_collective" in said[0]


def test_where_a_thread_is_names_the_collective_and_our_line():
    module = ringed.load_watch()
    program = "import sys\ndef {name}(inner): return inner()"
    frames = {}
    space = {}
    for name, path in (("all_reduce", "torch/distributed/distributed_c10d.py"), ("train", "somewhere/train.py")):
        exec(compile(program.format(name=name), path, "exec"), space)
    space["train"](lambda: space["all_reduce"](lambda: frames.update(here=sys._getframe())))
    assert module.place(frames["here"]) == "in all_reduce at train.py:2, train"
    assert module.place(None) == "nowhere"


def test_what_nccl_has_not_finished_is_read_from_its_own_recorder(monkeypatch):
    import torch  # the other tests do without

    states = [("all_gather", "completed"), ("all_reduce", "started")]
    entries = [{"profiling_name": f"nccl:{name}", "state": state, "input_sizes": [[4]]} for name, state in states]
    recorders = torch._C._distributed_c10d
    for name, found in (("_dump_nccl_trace_json", entries), ("_dump_fr_trace_json", [])):
        monkeypatch.setattr(recorders, name, lambda found=found, **_: json.dumps({"entries": found}), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert ringed.load_watch().unfinished_on_gpu() == ["nccl:all_reduce started of [[4]]"]
