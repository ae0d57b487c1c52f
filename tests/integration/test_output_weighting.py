"""Compression whose error is weighed by gradients too: made, kept, reused and refused."""

import json
import shutil

import pytest

import trawl
from tests.integration.test_calibrate import cli, model, text  # noqa: F401 (fixtures)
from tests.integration.test_compress import weights_hash
from trawl.calibration import gradients
from trawl.errors import PlanError


def recipe(kind, **options):
    return trawl.Recipe(method="svd", rank=4, roles="fc", output_weighting=kind, **options)


def test_gradients_are_added_to_moments_that_are_there_and_reused(model, text, tmp_path):  # noqa: F811
    kept = tmp_path / "moments"
    inputs = trawl.compress(model, recipe("none"), tmp_path / "a", calibrate=text, calibration_tokens=512, moments=kept)
    files = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    with pytest.raises(PlanError, match="none of gradients, which output weighting 'kronecker' needs"):
        trawl.compress(model, recipe("kronecker"), tmp_path / "b", moments=kept)
    both = trawl.compress(
        model, recipe("kronecker"), tmp_path / "b", calibrate=text, calibration_tokens=512, moments=kept
    )
    assert files.items() < {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}.items()
    assert not (kept / "hidden").exists()
    trawl.compress(model, recipe("kronecker"), tmp_path / "c", moments=kept)
    assert weights_hash(tmp_path / "b") == weights_hash(tmp_path / "c") != weights_hash(tmp_path / "a")
    assert all(
        one.weighted_error != other.weighted_error for one, other in zip(inputs.stacks, both.stacks, strict=True)
    )
    record = json.loads((tmp_path / "c" / "trawl.json").read_text())
    assert record["calibration"]["output_weighting"] == "kronecker"
    assert "gradients by what it gives (kronecker)" in (tmp_path / "c" / "README.md").read_text()


def test_gradients_of_the_same_text_under_another_name_are_made_once(model, text, tmp_path, monkeypatch):  # noqa: F811
    passes, gather = [], gradients.gather_gradients
    monkeypatch.setattr(gradients, "gather_gradients", lambda *args, **more: passes.append(1) or gather(*args, **more))
    other = shutil.copy(text, tmp_path / "other.txt")
    for number, (words, kind) in enumerate(((text, "none"), (other, "fisher"), (text, "fisher"))):
        options = {"calibrate": words, "calibration_tokens": 512, "moments": tmp_path / "moments"}
        trawl.compress(model, recipe(kind), tmp_path / str(number), **options)
    assert len(passes) == 1


def test_fisher_rows_as_typed_with_shared_factors(cli, model, text, tmp_path):  # noqa: F811
    options = ("--method", "svd", "--rank", 4, "--share", "input", "--output-weighting", "fisher")
    calibration = ("--calibrate", text, "--calibration-tokens", 512)
    code, out, err = cli("plan", model, *options, *calibration)
    assert code == 0, err
    assert "weighed by moments and gradients (fisher)" in out
    code, _, err = cli("compress", model, *options, *calibration, "-o", tmp_path / "out")
    assert code == 0, err
    code, _, err = cli("compress", model, *options, "-o", tmp_path / "b")
    assert code == 2
    assert "takes gradients on a text; give it with --calibrate TEXT" in err


@pytest.mark.parametrize("kind", ["fisher", "kronecker"])
def test_gradients_choose_the_units_that_stay(model, text, tmp_path, kind):  # noqa: F811
    def narrowed(weighting):
        asked = trawl.Recipe(method="narrow", width=8, output_weighting=weighting)
        trawl.compress(model, asked, tmp_path / weighting, calibrate=text, calibration_tokens=512)
        return weights_hash(tmp_path / weighting)

    assert narrowed(kind) != narrowed("none")
