"""``trawl report`` on what ``trawl compress`` and a sweep leave behind."""

import json
import re
import shutil
import sys

import pytest
import trawl_cli

import trawl

pytest.importorskip("matplotlib", reason="needs the extra: pip install 'trawl-llm[plot]'")

from tests.synthetic_sweep import write_sweep


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``trawl ARGS`` in this process: (exit code, standard output, standard error)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trawl", *map(str, args)])
        capsys.readouterr()
        try:
            trawl_cli.main()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def compressed(zoo, out, **options):
    """A compressed llama and its source, which is the test's own."""
    source = shutil.copytree(zoo("llama"), out.with_name("source"))
    trawl.compress(source, trawl.Recipe(rank=4, **options), out)
    return source, out


def test_a_dense_output(run, zoo, tmp_path):
    _, out = compressed(zoo, tmp_path / "out", group_layers=1)
    code, text, err = run("report", out, "--json")
    assert (code, err) == (0, "")
    written = json.loads(text)
    assert written["page"] == str(out / "report.html")
    assert [path.rpartition("/")[2] for path in written["pictures"]] == ["errors.png", "spectra.png"]
    page = (out / "report.html").read_text()
    record = json.loads((out / "trawl.json").read_text())
    assert all(f">{stack['name']}<" in page and f"{stack['relative_error']:.5f}" in page for stack in record["stacks"])
    assert "as before: the output is dense" in page
    assert "A model changed this much may be broken" in page
    assert "trawl compress" in page  # the command, made of the recipe


def test_a_report_into_a_file_is_refused(run, zoo, tmp_path):
    _, out = compressed(zoo, tmp_path / "out", group_layers=1)
    (tmp_path / "file").touch()
    for place in ("file", "file/report"):
        code, _, err = run("report", out, "-o", tmp_path / place)
        assert code == 2
        assert "file is no folder; choose another with -o" in " ".join(err.split())


def test_a_factored_output_tells_what_it_saves(run, zoo, tmp_path):
    source, out = compressed(zoo, tmp_path / "out", roles="fc", write="factored")
    shutil.rmtree(source)
    code, text, _ = run("report", out, "-o", tmp_path / "elsewhere")
    assert code == 0
    assert text.startswith(f"wrote {tmp_path / 'elsewhere' / 'report.html'} and 0 pictures")
    assert not (out / "report.html").exists()
    page = (tmp_path / "elsewhere" / "report.html").read_text()
    before, after = (json.loads(run("inspect", folder, "--json")[1]) for folder in (zoo("llama"), densified(out)))
    assert before["parameters"] == after["parameters"]
    assert f"of {before['parameters']:,}<" in page
    assert f"of {before['bytes']:,} bytes<" in page
    assert "is no folder at hand" in page


def densified(out):
    return trawl.densify(out, out.with_name("dense"))


def test_the_command_rebuilds_the_same_checkpoint(run, zoo, tmp_path, monkeypatch):
    options = {"method": "tucker", "roles": "fc", "layers": "1-2", "group_layers": 1, "seed": 3, "n_iter_max": 5}
    _, out = compressed(zoo, tmp_path / "out", **options)
    run("report", out)
    words = re.findall(r"<code>trawl (compress [^<]*)</code>", (out / "report.html").read_text())[-1].split()
    assert run(*words, "-o", tmp_path / "again")[0] == 0
    one, other = (json.loads((folder / "trawl.json").read_text()) for folder in (out, tmp_path / "again"))
    assert one["identity"] == other["identity"]
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_densified_output_counts_as_dense(run, zoo, tmp_path):
    _, out = compressed(zoo, tmp_path / "out", roles="fc", write="factored")
    dense = densified(out)
    assert run("report", dense)[0] == 0
    assert "as before: the output is dense" in (dense / "report.html").read_text()


def test_another_model_under_the_source_name_is_not_measured(run, zoo, tmp_path):
    source, out = compressed(zoo, tmp_path / "out")
    shutil.rmtree(source)
    shutil.copytree(zoo("qwen3"), source)
    run("report", out)
    assert "is not the source of this output" in (out / "report.html").read_text()
    assert not (out / "report" / "spectra.png").exists()


def test_a_sweep_measures_what_its_winner_approximates(run, zoo, tmp_path):
    source = shutil.copytree(zoo("llama"), tmp_path / "source")
    folder = write_sweep(tmp_path / "study", tried=3, model=str(source))
    values = json.loads((folder / "results.json").read_text())
    for trial in values["trials"]:
        trial["layers"] = "1" if trial["number"] == values["best"] else trial["layers"]
    (folder / "results.json").write_text(json.dumps(values))
    code, text, _ = run("report", folder, "--json")
    assert code == 0
    assert str(folder / "report" / "spectra.png") in json.loads(text)["pictures"]
    assert "3 in layer 1, roles fc." in (folder / "report.html").read_text()


MISTAKES = [
    ("absent", "no such folder: .*absent"),
    ("empty", r"empty has neither results.json \(written by trawl sweep\) nor trawl.json"),
    ("broken", "trawl.json is not readable JSON"),
    ("other", "trawl.json has no 'stacks'"),
]


@pytest.mark.parametrize(("name", "message"), MISTAKES)
def test_a_mistake_gives_one_line_and_writes_nothing(name, message, run, tmp_path):
    for folder in ("empty", "broken", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "trawl.json").write_text("{")
    (tmp_path / "other" / "trawl.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("report", tmp_path / name)
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_extra_the_fix_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("report", write_sweep(tmp_path / "study", tried=3))
    assert code == 2
    assert "pip install 'trawl-llm[plot]'" in err
