"""The scoreboard of benchmarks/quality.py, on a tiny model: its rows, and what another run goes on with."""

import importlib
import json
import math
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers.utils.logging import enable_progress_bar

import trawl
from tests.integration.test_eval import sentence

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PUBLISHED = ("whitened SVD", "joint whitened SVD", "Basis Sharing", "ASVD scaling", "plain SVD")
ROWS = (*PUBLISHED, "whitened SVD, interpolative", "Tucker of each FC", "uniform narrow", "trawl", "trawl --plain")
KEEP, CONTEXT = 0.8, 64


@pytest.fixture(scope="module")
def quality():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("quality")
    enable_progress_bar()


@pytest.fixture(scope="module")
def board(quality, model, text, tmp_path_factory):
    """A function that runs the command with options more, and returns what it printed."""
    folder = tmp_path_factory.mktemp("board")
    for number, name in enumerate(("wikitext2raw-valid.txt", "c4val.txt")):
        (folder / name).write_text(sentence(5 + number, 2000), encoding="utf-8")
    fixed = ["--data", folder, "--calibrate", text, "--work", folder / "work", "--raw", folder / "raw.json"]
    fixed += ["--keep", KEEP, "--windows", 2, "--context", CONTEXT, "--no-accuracy", "--device", "cpu"]

    def run(*more):
        printed = StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
            patch.setattr(sys, "argv", ["quality.py", *map(str, (model, *fixed, *more))])
            quality.main()
        return printed.getvalue()

    run.folder = folder
    run()
    return run


def rows(board):
    return json.loads((board.folder / "raw.json").read_text())["rows"]


def test_it_has_every_row_and_none_is_larger_than_its_share(board, model):
    found = rows(board)
    assert found.keys() == {"dense", "int8", *(f"{KEEP}: {name}" for name in ROWS)}
    stored = load_file(model / "model.safetensors")
    inside = sum(tensor.numel() for name, tensor in stored.items() if ".layers." in name and tensor.dim() == 2)
    whole = sum(tensor.numel() for tensor in stored.values())
    assert found["dense"]["parameters"] == whole
    for name in ROWS:
        row = found[f"{KEEP}: {name}"]
        assert 0.55 * inside <= row["parameters"] - (whole - inside) <= KEEP * inside, name
        assert row["bytes"] < found["dense"]["bytes"]
        assert all(math.isfinite(row[text]["value"]) for text in ("WikiText", "C4"))


def test_dense_is_scored_as_eval_scores_it(board, model):
    task = f"ppl:{board.folder / 'wikitext2raw-valid.txt'}"
    result = trawl.evaluate(model, task, limit=2, context=CONTEXT, stride=CONTEXT, dtype="float32")[0]
    assert rows(board)["dense"]["WikiText"]["value"] == pytest.approx(result.figure("perplexity").value, rel=1e-5)


def test_another_run_times_what_it_is_asked_for_and_makes_no_row_again(board):
    path = board.folder / "raw.json"
    before = json.loads(path.read_text())
    name = f"{KEEP}: uniform narrow"
    before["rows"][name]["WikiText"]["value"] = 12.3456  # which no run would find
    path.write_text(json.dumps(before))
    printed = board("--row", "uniform narrow", "--speed")
    after = json.loads(path.read_text())
    times = {key: after["rows"][name].pop(key) for key in ("decode", "prefill", "timed")}
    assert after == before
    assert times["decode"] > 0
    assert times["prefill"] > 0
    assert "12.35" in printed


def test_its_tables_are_markdown_in_one_order_and_its_rows_are_drawn(board, tmp_path):
    printed = board("--plot", tmp_path / "board.png")
    lines = [line.split("|") for line in printed.splitlines() if line.startswith("| ")]
    plainest = ("plain SVD", "ASVD scaling", "whitened SVD", "whitened SVD, interpolative", "Basis Sharing")
    rest = ("joint whitened SVD", "Tucker of each FC", "uniform narrow", "trawl --plain", "trawl")
    assert [line[1].strip() for line in lines] == ["", "dense", "int8", *plainest, *rest]
    assert len({len(line) for line in lines}) == 1
    assert [line[6].strip() for line in lines if line[1].strip() == "whitened SVD"] == ["1.000 / 1.000"]
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_that_is_none_is_refused(board):
    with pytest.raises(SystemExit, match=r"no such row: trawl --plan; the rows are whitened SVD, .* trawl --plain,"):
        board("--row", "trawl --plan")


def test_rows_of_other_settings_are_not_mixed(board):
    before = (board.folder / "raw.json").read_text()
    with pytest.raises(SystemExit, match="holds rows of other settings: dtype; name another file"):
        board("--dtype", "bfloat16")
    with pytest.raises(SystemExit, match="holds rows of other settings: calibrate; name another file"):
        board("--calibrate", board.folder / "c4val.txt")
    assert (board.folder / "raw.json").read_text() == before


def test_what_was_scored_tells_rows_apart_and_not_where_it_lies(board, tmp_path):
    before = (board.folder / "raw.json").read_text()
    assert str(board.folder) not in before
    elsewhere = tmp_path / "data"
    shutil.copytree(board.folder, elsewhere, ignore=shutil.ignore_patterns("work"))
    assert "uniform narrow" in board("--data", elsewhere, "--row", "uniform narrow")
    assert (board.folder / "raw.json").read_text() == before
    (elsewhere / "wikitext2raw-valid.txt").write_text("another text", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds rows of other settings: scored"):
        board("--data", elsewhere)
    assert (board.folder / "raw.json").read_text() == before
