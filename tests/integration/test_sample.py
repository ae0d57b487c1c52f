"""Text that a model writes itself: what it begins and ends with, what is refused, and calibrating on it."""

import json
import shutil
import sys

import pytest
import torch
import trawl_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

import trawl
from tests.integration.test_eval import BOS, make_tokenizer, sentence
from trawl import sampling
from trawl.errors import LoadError, PlanError


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def model(request, zoo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "model"
    shutil.copytree(zoo("llama"), folder)
    make_tokenizer(bos=request.param).save_pretrained(folder)
    return folder


@pytest.fixture
def batches(monkeypatch):
    """Documents of 16 tokens, four at once; yields what each batch began with and what was written."""
    seen = []
    write = sampling._write

    def spy(model, begin, *args):
        found = write(model, begin, *args)
        seen.append((begin, found))
        return found

    monkeypatch.setattr(sampling, "_write", spy)
    monkeypatch.setattr(sampling, "LENGTH", 16)
    monkeypatch.setattr(sampling, "AT_ONCE", 4)
    return seen


def test_documents_are_written_until_there_are_enough_and_a_seed_gives_them_again(model, batches):
    told = []
    before = torch.get_rng_state()
    text = trawl.sample(model, 150, observer=lambda *at: told.append(at))
    assert torch.equal(before, torch.get_rng_state())
    assert sum(len(document) for _, found in batches for document in found) >= 150
    assert sum(len(document) for _, found in batches[:-1] for document in found) < 150
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = [tokenizer.decode(each, skip_special_tokens=True).strip() for _, found in batches for each in found]
    assert text == "\n\n".join(filter(None, documents))
    assert told[-1] == ("sampling", 150, 150)
    assert [at for _, at, _ in told] == sorted(at for _, at, _ in told)
    assert trawl.sample(model, 150) == text
    assert trawl.sample(model, 150, seed=1) != text


def test_no_document_holds_what_no_text_holds(model, batches, monkeypatch):
    """A token of a byte-level vocabulary is NUL, which calibration takes for the mark of a binary file."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    decode = type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda *args, **more: f"a\0b {decode(*args, **more)}")
    assert "\0" not in (text := trawl.sample(model, 20))
    assert "ab" in text


def test_a_model_that_predicts_nan_and_a_seed_of_too_many_bits_are_refused(model):
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    with pytest.raises(PlanError, match="expected a number from 0 that has 63 bits"):
        trawl.sample(loaded, 20, tokenizer=tokenizer, seed=1 << 63)
    with torch.no_grad():
        loaded.lm_head.weight.fill_(torch.nan)
    with pytest.raises(PlanError, match="predictions are NaN or Inf, so nothing can be sampled"):
        trawl.sample(loaded, 20, tokenizer=tokenizer)


def test_a_document_begins_at_random_and_ends_where_the_model_ends_it(model, batches):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.generation_config.eos_token_id = [2, 7]
    tokenizer = AutoTokenizer.from_pretrained(model)
    trawl.sample(loaded, 400, tokenizer=tokenizer)
    own = [BOS] if tokenizer("a")["input_ids"][0] == BOS else []
    firsts = []
    for begin, found in batches:
        assert begin[:, : len(own)].tolist() == [own] * len(begin)
        firsts += begin[:, len(own)].tolist()
        for row, document in zip(begin.tolist(), found, strict=True):
            assert document[: len(row)] == row
            assert len(document) <= 16
            assert not {2, 7} & set(document[len(row) :])
    assert len(set(firsts)) > len(firsts) // 4
    assert not set(firsts) & set(tokenizer.all_special_ids)
    lengths = {len(document) for _, found in batches for document in found}
    assert len(lengths) > 1  # some were ended


def test_what_cannot_write_is_refused(zoo, tmp_path):
    shutil.copytree(zoo("bert"), tmp_path / "bert")
    make_tokenizer(bos=False).save_pretrained(tmp_path / "bert")
    with pytest.raises(PlanError, match="writes no text by itself; expected a causal language model"):
        trawl.sample(tmp_path / "bert")
    with pytest.raises(PlanError, match="0 tokens are to be sampled; expected a number from 1"):
        trawl.sample(tmp_path / "bert", 0)
    with pytest.raises(LoadError, match="no usable tokenizer"):
        trawl.sample(zoo("llama"))


def test_as_typed_and_calibrated_on_beside_a_text(model, tmp_path, monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["trawl", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            trawl_cli.main()
        return stopped.value.code, *capsys.readouterr()

    own, sea = tmp_path / "own.txt", tmp_path / "sea.txt"
    sea.write_text(sentence(3, 3000), encoding="utf-8")
    command = ("sample", model, "-o", own, "--tokens", 3000)
    assert trawl_cli.trawl.main(list(map(str, command)), standalone_mode=False) is None
    written = own.read_text()
    assert capsys.readouterr().out == f"wrote {own}\n"
    code, _, err = run(*command)
    assert code == 2
    assert "own.txt exists; choose another file with -o, or pass --overwrite" in err
    code, _, err = run("sample", model, "-o", tmp_path / "absent" / "own.txt")
    assert code == 2
    assert "absent is no folder" in err
    assert own.read_text() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.txt", "sea.txt"]
    recipe = trawl.Recipe(method="svd", rank=4)
    trawl.compress(model, recipe, tmp_path / "both", calibrate=[sea, own], calibration_tokens=1024)
    calibration = json.loads((tmp_path / "both" / "trawl.json").read_text())["calibration"]
    assert calibration["text"] == "sea.txt and own.txt"
    trawl.compress(model, recipe, tmp_path / "one", calibrate=sea, calibration_tokens=1024)
    alone = json.loads((tmp_path / "one" / "trawl.json").read_text())["calibration"]
    assert calibration["windows"] == 2 * alone["windows"]
    assert calibration["tokens"] == 2 * alone["tokens"]
