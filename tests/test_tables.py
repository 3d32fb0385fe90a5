"""Numbers in the documentation come from the committed result files."""

import pytest

from tilestack.bench import tables
from tilestack.bench.results import FOLDER, Row, read, short_device, write


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: str(path.relative_to(tables.ROOT)))
def test_tables_in_the_documentation_are_those_of_the_result_files(path):
    text = path.read_text()
    assert tables.with_tables(text) == text, "run `tilestack bench tables`"


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.json")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_result_file_says_on_what_and_when_it_was_measured(path):
    run = read(path)
    assert {"bench", "device", "versions", "commit", "date", "ceilings", "rows"} <= run.keys()
    assert run["rows"]


def test_a_result_file_is_named_by_its_machine_and_read_back_whole(tmp_path):
    row = Row("step", {"gpus": 1}, "tilestack", "step", ms_median=1.23456789)
    path = write("step", [row], {"matmul_tflops": 1.0}, folder=tmp_path)
    assert path == tmp_path / "step" / f"1x{short_device()}.json"
    assert read(path)["rows"][0]["ms_median"] == 1.2346


def test_a_changed_number_is_noticed():
    text = "<!-- table: step -->\nmade up\n<!-- end -->"
    assert tables.with_tables(text) != text
