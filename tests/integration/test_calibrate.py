"""Compression weighed by calibration moments: what is made, kept, reused and refused, from Python and as typed."""

import json
import shutil
import sys
from contextlib import nullcontext

import pytest
import torch
import trawl_cli
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trawl
from tests.integration.test_compress import weights_hash
from tests.integration.test_eval import make_tokenizer, sentence
from tests.zoo import HIDDEN
from trawl import compressing
from trawl.calibration import calibrating, gathering
from trawl.calibration.calibrating import GRADIENT_WINDOWS, WINDOW, open_moments
from trawl.calibration.gradients import scratch_bytes
from trawl.calibration.moments import RECORD
from trawl.errors import LoadError, PlanError, ResumeError
from trawl.hub import open_checkpoint
from trawl.planning import match_checkpoint

RECIPE = trawl.Recipe(method="svd", rank=4)


@pytest.fixture(scope="module")
def model(zoo, tmp_path_factory):
    """A tiny llama with its tokenizer and a text beside it, never to be written to."""
    folder = tmp_path_factory.mktemp("calibrate") / "model"
    shutil.copytree(zoo("llama"), folder)
    make_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "sea.txt"
    path.write_text(sentence(3, 3000), encoding="utf-8")
    return path


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run ``trawl ARGS`` in this process: (exit code, standard output, standard error)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["trawl", *map(str, args)])
        try:
            trawl_cli.main()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    return run


def damage(folder, model, text):
    """Return how far a compressed model's logits are from the model's own on the text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(), return_tensors="pt", verbose=False)["input_ids"][:, :60]
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(each)(ids).logits for each in (model, folder))
    return float((one - other).norm())


@pytest.mark.parametrize("method", ["svd", "tucker", "cp"])
def test_what_the_model_computes_on_the_text_is_kept_better(model, text, tmp_path, method):
    recipe = trawl.Recipe(method=method, rank=12, layers="1", roles="fc")
    plain = trawl.compress(model, recipe, tmp_path / "plain")
    calibrated = trawl.compress(model, recipe, tmp_path / "out", calibrate=text, calibration_tokens=2048)
    assert damage(tmp_path / "out", model, text) < damage(tmp_path / "plain", model, text)
    for one, other in zip(plain.stacks, calibrated.stacks, strict=True):
        assert one.weighted_error is None
        assert other.weighted_error < other.relative_error
        assert one.relative_error <= other.relative_error + 1e-6
    record = json.loads((tmp_path / "out" / "trawl.json").read_text())
    assert record["calibration"]["text"] == "sea.txt"
    assert record["calibration"]["tokens"] == 2048
    assert record["identity"]["moments"] == record["calibration"]["fingerprint"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2,048 tokens of sea.txt" in card
    assert "weighted error" in card
    assert str(text.parent) not in card
    assert not (tmp_path / "out.partial").exists()


def test_the_same_text_gives_the_same_bytes_and_kept_moments_too(model, text, tmp_path, monkeypatch):
    moments = tmp_path / "moments"
    trawl.compress(model, RECIPE, tmp_path / "a", calibrate=text, calibration_tokens=1024)
    trawl.compress(model, RECIPE, tmp_path / "b", calibrate=text, calibration_tokens=1024, moments=moments)
    monkeypatch.setattr(gathering, "gather", None)  # never called again
    trawl.compress(model, RECIPE, tmp_path / "c", calibrate=text, calibration_tokens=1024, moments=moments)
    trawl.compress(model, RECIPE, tmp_path / "d", moments=moments)
    assert len({weights_hash(tmp_path / out) for out in "abcd"}) == 1


def test_kept_moments_of_something_else_are_refused(model, text, tmp_path, zoo):
    moments = tmp_path / "moments"
    trawl.compress(model, RECIPE, tmp_path / "a", calibrate=text, calibration_tokens=1024, moments=moments)
    other = tmp_path / "other.txt"
    other.write_text(sentence(4, 3000))
    with pytest.raises(PlanError, match=r"holds moments of another text \(sea\.txt, not other\.txt\)"):
        trawl.compress(model, RECIPE, tmp_path / "b", calibrate=other, calibration_tokens=1024, moments=moments)
    with pytest.raises(PlanError, match="holds moments of 16 windows of 64 tokens, not 8 of 64"):
        trawl.compress(model, RECIPE, tmp_path / "b", calibrate=text, calibration_tokens=512, moments=moments)
    with pytest.raises(PlanError, match="are of another model"):
        trawl.compress(zoo("qwen2"), RECIPE, tmp_path / "b", moments=moments)
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    make_tokenizer(bos=False).save_pretrained(changed)
    with pytest.raises(PlanError, match="holds moments of another tokenizer"):
        trawl.compress(changed, RECIPE, tmp_path / "b", calibrate=text, calibration_tokens=1024, moments=moments)
    assert not (tmp_path / "b.partial").exists()


def test_a_killed_calibration_leaves_nothing_that_opens_and_is_gone_on_with(model, text, tmp_path, monkeypatch):
    trawl.compress(model, RECIPE, tmp_path / "whole", calibrate=text, calibration_tokens=1024)
    write = gathering._write

    def stop_at_the_second(path, sums):
        write(path, sums)
        if path.name == "block-0001.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(gathering, "_write", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        trawl.compress(model, RECIPE, tmp_path / "out", calibrate=text, calibration_tokens=1024)
    moments = tmp_path / "out.partial" / "moments"
    assert (moments / "block-0001.safetensors").exists()
    assert not (moments / RECORD).exists()
    with pytest.raises(PlanError, match="holds no moments"):
        trawl.compress(model, RECIPE, tmp_path / "other", moments=moments)
    monkeypatch.setattr(gathering, "_write", write)
    with pytest.raises(ResumeError, match="differs in moments"):
        trawl.compress(model, RECIPE, tmp_path / "out", calibrate=text, calibration_tokens=512, resume=True)
    trawl.compress(model, RECIPE, tmp_path / "out", calibrate=text, calibration_tokens=1024, resume=True)
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")


def test_damaged_moments_are_made_anew_from_the_text_alone(model, text, tmp_path):
    """A folder that is to be used as it is must be whole; one that a text can fill again need not."""
    moments = tmp_path / "moments"
    trawl.compress(model, RECIPE, tmp_path / "a", calibrate=text, calibration_tokens=1024, moments=moments)
    (moments / "block-0002.safetensors").unlink()
    with pytest.raises(LoadError, match="incomplete"):
        trawl.compress(model, RECIPE, tmp_path / "b", moments=moments)
    source = calibrating.open_moments(*opened(model), text, 1024)
    found = calibrating.make_moments(source, moments)
    assert len(found.infos) == 14


def test_moments_that_another_run_makes_are_not_made_beside_it(model, text, tmp_path, monkeypatch):
    moments, gather = tmp_path / "moments", gathering.gather

    def beside(*args):
        monkeypatch.setattr(gathering, "gather", gather)
        with pytest.raises(PlanError, match=r"another run is working in .*moments"):
            trawl.compress(model, RECIPE, tmp_path / "b", calibrate=text, calibration_tokens=512, moments=moments)
        return gather(*args)

    monkeypatch.setattr(gathering, "gather", beside)
    trawl.compress(model, RECIPE, tmp_path / "a", calibrate=text, calibration_tokens=1024, moments=moments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "moments"]


def test_moments_that_are_there_are_read_where_nothing_may_be_written(model, text, tmp_path, monkeypatch):
    moments = tmp_path / "moments"
    options = {"calibrate": text, "calibration_tokens": 512, "moments": moments}
    trawl.compress(model, RECIPE, tmp_path / "a", **options)
    (moments / "lock").unlink()
    monkeypatch.setattr(compressing, "may_write", lambda folder: folder != moments)
    trawl.compress(model, RECIPE, tmp_path / "b", **options)
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b")
    assert not (moments / "lock").exists()


def test_moments_lie_neither_in_the_source_nor_in_the_output(model, text, tmp_path):
    before = sorted(path.name for path in model.iterdir())
    for moments, message in (
        (model / "moments", "equal or lie inside the source"),
        (model, "equal or lie inside the source"),
        (tmp_path / "out", "equal or lie inside the output"),
        (tmp_path / "out" / "moments", "equal or lie inside the output"),
    ):
        for recipe in (RECIPE, trawl.Recipe(keep=0.8)):
            with pytest.raises(PlanError, match=message):
                trawl.compress(model, recipe, tmp_path / "out", calibrate=text, moments=moments)
    with pytest.raises(PlanError, match="equal or lie inside the source"):
        trawl.find_recipe(model, trawl.Recipe(keep=0.8), model / "moments", calibrate=text)
    assert sorted(path.name for path in model.iterdir()) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("compute", "units", "rounds"), [("bf16", True, True), ("bf16", False, False), ("float32", True, False)]
)
def test_blocks_multiply_in_bfloat16_where_it_is_asked_for_and_fast(  # noqa: PLR0917 (fixtures)
    model, text, tmp_path, monkeypatch, compute, units, rounds
):
    monkeypatch.setattr(calibrating, "multiplies_bfloat16", lambda _: units)
    monkeypatch.setattr("trawl.models.fast_products", nullcontext)  # which rounds too, on some processors
    checkpoint, match = opened(model)
    folders = [tmp_path / name for name in ("exact", "made")]
    for folder, asked in zip(folders, ("float32", compute), strict=True):
        calibration = open_moments(checkpoint, match, text, 128, output_weighting="fisher", compute=asked)
        calibration.make(folder)
    for name in ("block-0001.safetensors", "fisher-0001.safetensors"):
        exact, made = (load_file(folder / name) for folder in folders)
        assert all(tensor.dtype == exact[key].dtype for key, tensor in made.items())
        differences = [float((exact[key] - tensor).norm() / exact[key].norm()) for key, tensor in made.items()]
        assert (max(differences) > 1e-4) is rounds


def test_the_disk_that_is_asked_for_is_no_more_than_is_used(model, text):
    """Hidden states wait on disk of no more than 32 windows, however long the text."""
    checkpoint, match = opened(model)

    def nbytes(windows, kind):
        return open_moments(checkpoint, match, text, windows * WINDOW, output_weighting=kind).nbytes

    assert nbytes(128, "fisher") == nbytes(GRADIENT_WINDOWS, "fisher")
    waiting = nbytes(GRADIENT_WINDOWS, "fisher") - nbytes(GRADIENT_WINDOWS // 2, "fisher")
    assert waiting == scratch_bytes(match.layers, GRADIENT_WINDOWS // 2 * WINDOW, HIDDEN)
    assert nbytes(128, "none") == nbytes(1, "none")


def opened(model):
    checkpoint = open_checkpoint(model)
    return checkpoint, match_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrate": "absent.txt"}, "no such calibration text"),
        ({"moments": "absent"}, "holds no moments"),
        ({"calibration_tokens": 0}, "calibration tokens are 0"),
        ({"calibration_tokens": 10**6, "factors": "absent"}, "absent has no library.json"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(model, text, tmp_path, options, message):
    given = {} if "moments" in options else {"calibrate": text}
    with pytest.raises(PlanError, match=message):
        trawl.compress(model, RECIPE, tmp_path / "out", **{**given, **options})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_weighed_is_refused(model, text, tmp_path):
    with pytest.raises(PlanError, match="engine tensorly cannot weigh"):
        trawl.compress(model, trawl.Recipe(rank=4, engine="tensorly"), tmp_path / "out", calibrate=text)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "library.json").write_text('{"ladder": [4]}')
    with pytest.raises((PlanError, LoadError), match=r"--factors takes factors as they are|no factors of stack"):
        trawl.compress(model, RECIPE, tmp_path / "out", calibrate=text, factors=tmp_path / "library")


def test_a_model_without_a_tokenizer_is_told(zoo, text, tmp_path):
    with pytest.raises(LoadError, match="no usable tokenizer"):
        trawl.compress(zoo("llama"), RECIPE, tmp_path / "out", calibrate=text)


def test_the_plan_tells_what_calibration_takes(cli, model, text, tmp_path):
    code, out, err = cli("plan", model, "--method", "svd", "--rank", 4, "--calibrate", text)
    assert code == 0, err
    assert "weighed by moments of up to 131,072 tokens of sea.txt" in out
    trawl.compress(model, RECIPE, tmp_path / "a", calibrate=text, calibration_tokens=1024, moments=tmp_path / "moments")
    code, out, err = cli("plan", model, "--method", "svd", "--rank", 4, "--moments", tmp_path / "moments")
    assert code == 0, err
    assert "weighed by moments of 1,024 tokens of sea.txt" in out


def test_calibration_as_typed(cli, model, text, tmp_path):
    options = ("--method", "svd", "--rank", 4, "--calibrate", text, "--calibration-tokens", 512)
    code, out, err = cli("compress", model, *options, "-o", tmp_path / "out")
    assert code == 0, err
    assert "weighted error" in out
    assert cli("compress", model, *options, "-o", tmp_path / "out", "--resume")[0] == 0
    code, _, err = cli("compress", model, "--rank", 4, "--calibration-tokens", 512, "-o", tmp_path / "b")
    assert code == 2
    assert "--calibrate" in err
    empty = tmp_path / "empty.txt"
    empty.touch()
    code, _, err = cli("compress", model, "--rank", 4, "--calibrate", empty, "-o", tmp_path / "b")
    assert (code, err) == (2, f"PlanError: calibration text {empty} is empty; expected text\n")
