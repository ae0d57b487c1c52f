"""Narrow checkpoints: ordinary ones that are smaller, in every family, or refused with the reason."""

import json
import shutil
import sys

import pytest
import torch
import transformers
import trawl_cli
from safetensors.torch import load_file, save_file

import trawl
from tests.integration.test_compress import StopError, stop_at, weights_hash
from tests.integration.test_zoo import logits, stored_bytes
from tests.zoo import HEADS, HIDDEN, INNER, ZOO, save_unlisted
from trawl import decomposing
from trawl.checkpoint import open_folder
from trawl.densifying import densify
from trawl.errors import PlanError

TOKENS = 512
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level("ERROR", "trawl")


@pytest.fixture
def results(monkeypatch):
    """Collect what each stack comes to, by its name."""
    found = {}

    def note(checkpoint, cut, *arguments, **options):
        found[cut.stack.name] = cut, original(checkpoint, cut, *arguments, **options)
        return found[cut.stack.name][1]

    original = decomposing.narrow_stack
    monkeypatch.setattr(decomposing, "narrow_stack", note)
    return found


def narrow(source, out, **options):
    return trawl.compress(source, trawl.Recipe(method="narrow", **options), out, calibration_tokens=TOKENS)


def config(folder):
    return json.loads((folder / "config.json").read_text())


def padded(source, folder, results):
    """Write the whole model with zeros where readers would read units that are left out."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for cut, result in results.values():
        full = torch.zeros(cut.reader.shape)
        full[cut.rows(cut.reader, result.kept)] = result.reader
        cut.reader.view.scatter(full, tensors[cut.reader.tensor])
        if result.bias is not None:
            tensors[cut.reader.tensor.removesuffix("weight") + "bias"] = result.bias
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def assert_as_planned(source, out, **options):
    """Check sizes, the index, and that what does not change is the same to the last bit."""
    planned = trawl.plan(source, trawl.Recipe(method="narrow", **options))
    old, new = open_folder(source), open_folder(out)
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) == new.nbytes == planned.output_bytes
    assert new.parameters == planned.output_parameters < old.parameters
    if (out / "model.safetensors.index.json").exists():
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(info.nbytes for info in new.tensors.values())
    readers = {cut.reader.tensor.removesuffix("weight") for cut in planned.narrowed.cuts}
    for tensor, info in old.tensors.items():
        shape = planned.narrowed.shapes.get(tensor, info.shape)
        assert (new.tensors[tensor].shape, new.tensors[tensor].dtype) == (shape, info.dtype)
        if shape == info.shape and tensor.removesuffix("bias") not in readers:
            assert stored_bytes(old, tensor) == stored_bytes(new, tensor), tensor


@pytest.mark.parametrize("name", ZOO)
def test_full_width_gives_the_same_logits(name, zoo, tmp_path):
    report = narrow(zoo(name), tmp_path / "out", width=1.0)
    assert all(stack.relative_error < 1e-6 for stack in report.stacks)
    torch.testing.assert_close(logits(name, tmp_path / "out"), logits(name, zoo(name)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ZOO)
def test_half_the_width_is_an_ordinary_checkpoint(name, shards, zoo, tmp_path, results):
    source = zoo(name, shards)
    report = narrow(source, tmp_path / "out", width=0.5)
    assert {stack.rank[1] for stack in report.stacks} == {32}  # half of 48 to a multiple of 16
    assert_as_planned(source, tmp_path / "out", width=0.5)
    whole = padded(zoo(name), tmp_path / "whole", results)
    torch.testing.assert_close(logits(name, tmp_path / "out"), logits(name, whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GROUPED)
def test_a_key_value_group_is_left_out_with_its_queries(name, zoo, tmp_path, results):
    narrow(zoo(name), tmp_path / "out", kv_heads=1, width=40)
    assert_as_planned(zoo(name), tmp_path / "out", kv_heads=1, width=40)
    head_dim = config(zoo(name)).get("head_dim") or HIDDEN // HEADS
    expected = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": head_dim, "intermediate_size": 40}
    assert config(tmp_path / "out") == config(zoo(name)) | expected
    whole = padded(zoo(name), tmp_path / "whole", results)
    torch.testing.assert_close(logits(name, tmp_path / "out"), logits(name, whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_stored_dtype_is_kept(dtype, zoo, tmp_path):
    report = narrow(zoo("gpt2", 1, dtype), tmp_path / "out", width=32)
    assert_as_planned(zoo("gpt2", 1, dtype), tmp_path / "out", width=32)
    assert all((stack.rounding_error == 0) == (dtype == torch.float64) for stack in report.stacks)


def test_a_nested_config_is_changed_where_the_field_stands(zoo, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(zoo("gemma3_text"), source)
    inside = config(source)
    (source / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": inside}))
    planned = trawl.plan(source, trawl.Recipe(method="narrow", width=32))
    assert planned.narrowed.config == {"model_type": "gemma3", "text_config": inside | {"intermediate_size": 32}}


def test_an_interrupted_run_is_gone_on_with(zoo, tmp_path, monkeypatch):
    options = {"width": 0.5, "kv_heads": 1}
    recipe = trawl.Recipe(method="narrow", **options)
    narrow(zoo("llama", 3), tmp_path / "whole", **options)
    with pytest.raises(StopError):
        trawl.compress(
            zoo("llama", 3), recipe, tmp_path / "out", calibration_tokens=TOKENS, observer=stop_at("writing")
        )
    assert len(list((tmp_path / "out.partial" / "factors").glob("*.safetensors"))) == 6
    monkeypatch.setattr(decomposing, "narrow_stack", None)  # all that it would do is sealed
    trawl.compress(zoo("llama", 3), recipe, tmp_path / "out", calibration_tokens=TOKENS, resume=True)
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")


def test_records_say_what_was_left_out(zoo, tmp_path):
    report = narrow(zoo("llama"), tmp_path / "out", width=0.5)
    record = json.loads((tmp_path / "out" / "trawl.json").read_text())
    assert [stack["name"] for stack in record["stacks"]] == ["fc.0", "fc.1", "fc.2"]
    assert record["stacks"][0]["rank"] == [3, 32, HIDDEN]
    assert record["stacks"][0]["parameters_after"] == 3 * 32 * HIDDEN
    assert record["stacks"][1]["relative_error"] == report.stacks[1].relative_error
    assert record["calibration"]["text"] == "random tokens"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "narrowed with TRAWL" in card
    assert "Method NARROW, width 0.5" in card
    assert "ordinary, smaller checkpoint" in card
    assert f"{report.stacks[1].relative_error:.5f}" in card


def test_the_report_page_tells_of_a_narrow_output(zoo, tmp_path):
    pytest.importorskip("jinja2")
    from trawl.report import write_report

    narrow(zoo("llama"), tmp_path / "out", width=0.5)
    page = write_report(tmp_path / "out").page.read_text()
    assert "weights stay around fewer inner units" in page
    assert "an ordinary checkpoint with fewer units" in page
    assert "of what each stack puts out" in page


def test_without_a_text_the_cost_is_told(zoo, tmp_path, caplog):
    caplog.set_level("WARNING", "trawl")
    narrow(zoo("llama"), tmp_path / "out", width=0.5)
    assert "no calibration text" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"width": 0}, r"width 0 is outside 1\.\.48"),
        ("llama", {"width": 49}, r"width 49 is outside 1\.\.48, the inner width of layer 0"),
        ("llama", {"width": 0.0}, "width 0.0 is not between 0 and 1"),
        ("llama", {"width": 1.5}, "width 1.5 is not between 0 and 1"),
        ("llama", {"width": (40, 32)}, "width has 2 numbers for 3 layers"),
        ("llama", {"width": (40, 32, 40)}, "would have 2, from 32 to 40; .* pass --write factored"),
        ("llama", {"width": 32, "layers": "1"}, "would have 2, from 32 to 48; .* pass --write factored"),
        ("llama", {"width": 32, "roles": "fc"}, "whole FCs .* leave --roles out"),
        ("llama", {"kv_heads": 3}, r"kv-heads 3 is outside 1\.\.2"),
        ("llama", {"kv_heads": 1, "layers": "0-1"}, "the same in all layers"),
        ("olmo2", {"kv_heads": 1}, r"k_norm.weight \(16,\) runs over all heads"),
        ("gpt2", {"kv_heads": 1}, "derives the size of a head from their number"),
    ],
)
def test_sizes_that_no_checkpoint_can_have_are_refused(name, options, message, zoo):
    with pytest.raises(PlanError, match=message):
        trawl.plan(zoo(name), trawl.Recipe(method="narrow", **options))


def test_a_family_without_a_field_of_the_width_says_what_works(tmp_path):
    source = save_unlisted(tmp_path / "source")
    with pytest.raises(PlanError, match=r"no config field of the inner width .* pass --write factored"):
        trawl.plan(source, trawl.Recipe(method="narrow", width=0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "narrow"}, "method narrow needs a size"),
        ({"method": "narrow", "width": 0.5, "rank": 8}, "method narrow takes none; pass --width"),
        ({"method": "svd", "rank": 8, "width": 0.5}, "width goes with method narrow, and the method is svd"),
        ({"rank": 8, "kv_heads": 1}, "kv_heads goes with method narrow"),
        ({"method": "svd"}, "no rank given"),
        ({"method": "narrow", "width": 0.5, "tol": 0.1}, "tol is 0.1, and narrow selects units"),
        ({"method": "narrow", "width": 8, "write": "factored", "factor_dtype": "bfloat16"}, "factor_dtype is 'bfl"),
        ({"keep": 0.5, "plain": True, "factor_dtype": "bfloat16"}, "a dense output stores no factors"),
        ({"keep": 0.5, "plain": True, "allow_larger": True}, "allow_larger is True, and narrow selects units"),
    ],
)
def test_sizes_and_options_of_another_method_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        trawl.Recipe(**options)


def test_what_needs_factors_refuses_narrow(zoo):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(zoo("llama"))
    with pytest.raises(PlanError, match="makes no factors"):
        trawl.apply(model, trawl.Recipe(method="narrow", width=0.5))


def test_narrow_as_typed(zoo, tmp_path, monkeypatch, capsys):
    for command in ("plan", "compress"):
        words = ["trawl", command, str(zoo("llama")), "--method", "narrow", "--width", "0.5", "--kv-heads", "1"]
        words += ["-o", str(tmp_path / "out")] * (command == "compress")
        monkeypatch.setattr(sys, "argv", words)
        trawl_cli.main()
        assert "fc.1" in capsys.readouterr().out
    assert config(tmp_path / "out")["intermediate_size"] == 32
    monkeypatch.setattr(sys, "argv", ["trawl", "plan", str(zoo("llama")), "--method", "narrow", "--width", "wide"])
    with pytest.raises(SystemExit):
        trawl_cli.main()
    assert "'wide' is not a width" in capsys.readouterr().err


def wide_logits(name, folder):
    model = trawl.load(folder, ZOO[name].auto)
    with torch.no_grad():
        return model(torch.arange(3, 35).reshape(2, 16)).logits


@pytest.mark.parametrize("name", ZOO)
def test_unequal_widths_load_with_trawl_and_densify_to_the_widest(name, zoo, tmp_path, results):
    out = tmp_path / "out"
    options = {"width": (40, 24, 32), "write": "factored"}
    narrow(zoo(name), out, **options)
    planned = trawl.plan(zoo(name), trawl.Recipe(method="narrow", **options))
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) == planned.output_bytes
    assert open_folder(out, factored=True).parameters == planned.output_parameters
    whole = logits(name, padded(zoo(name), tmp_path / "whole", results))
    torch.testing.assert_close(wide_logits(name, out), whole, rtol=1e-4, atol=1e-4)

    densify(out, tmp_path / "dense")
    found = config(tmp_path / "dense")
    assert "quantization_config" not in found
    assert 40 in found.values()
    torch.testing.assert_close(logits(name, tmp_path / "dense"), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
def test_unequal_widths_are_saved_and_made_ordinary_again(name, zoo, tmp_path):
    narrow(zoo(name), tmp_path / "out", width=24, layers="0,2", write="factored")
    expected = wide_logits(name, tmp_path / "out")
    model = trawl.load(tmp_path / "out", ZOO[name].auto)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(wide_logits(name, tmp_path / "again"), expected)
    sizes = {getattr(module, "in_features", getattr(module, "nx", None)) for module in model.modules()}
    assert {24, INNER} <= sizes
    model.dequantize().save_pretrained(tmp_path / "ordinary")
    torch.testing.assert_close(logits(name, tmp_path / "ordinary"), expected)


def test_unequal_widths_fail_without_trawl(zoo, tmp_path):
    narrow(zoo("llama"), tmp_path / "out", width=(40, 24, 32), write="factored")
    found = config(tmp_path / "out")
    assert found.pop("quantization_config")["quant_method"] == "trawl"
    (tmp_path / "out" / "config.json").write_text(json.dumps(found))
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        logits("llama", tmp_path / "out")


def test_equal_widths_written_as_factored_are_an_ordinary_checkpoint(zoo, tmp_path):
    narrow(zoo("llama"), tmp_path / "a", width=24, write="factored")
    narrow(zoo("llama"), tmp_path / "b", width=24)
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b")
    assert config(tmp_path / "a") == config(tmp_path / "b")


def test_an_unlisted_family_is_narrowed_when_factored(tmp_path, results):
    source = save_unlisted(tmp_path / "source")
    narrow(source, tmp_path / "out", width=24, write="factored")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    whole = transformers.LlamaForCausalLM.from_pretrained(padded(source, tmp_path / "whole", results))
    tokens = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, rtol=1e-4, atol=1e-4)


def test_falcons_own_linear_modules_are_narrowed_too(zoo, tmp_path):
    narrow(zoo("falcon"), tmp_path / "out", width=(40, 24), write="factored")
    densify(tmp_path / "out", tmp_path / "dense")
    narrowed, widened = (logits("falcon", tmp_path / name) for name in ("out", "dense"))
    torch.testing.assert_close(narrowed, widened, rtol=1e-4, atol=1e-4)
