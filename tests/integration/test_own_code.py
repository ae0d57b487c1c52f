"""Checkpoints that bring code of their own: nothing of it runs, whoever asks, unless it is asked for by name."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import trawl_cli
from transformers import dynamic_module_utils

import trawl
from tests.integration.test_eval import make_tokenizer, sentence
from trawl.cluster import Cluster
from trawl.errors import LoadError, PlanError, ResumeError

OWN = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
with Path({marker!r}).open("a") as file:
    file.write(f"{{__name__}}\\n")
class OwnConfig(LlamaConfig):
    model_type = {model_type!r}
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
IN_CONFIG, IN_TOKENIZER = "config.json", "tokenizer_config.json"
NAMED = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
MODEL = {IN_CONFIG: {"auto_map": NAMED, "architectures": ["OwnForCausalLM"], "model_type": "own"}}
KNOWN = {IN_CONFIG: {"auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}}  # transformers has the model too
TOKENIZER = {
    IN_TOKENIZER: {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
}
FLAG = "--trust-remote-code"
GRID = {"methods": ("svd",), "ranks": (2,), "objectives": ("log_loss",), "layers": "2", "validation": 0.5}


@pytest.fixture(autouse=True)
def _apart(tmp_path_factory, monkeypatch):
    """Keep transformers' copies of the code apart, and have somebody at the terminal who says yes to everything."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    yield
    forget_code()


def forget_code() -> None:
    """Let code that was imported be imported again, as in another process."""
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def marker(tmp_path) -> Path:
    """Where the code leaves a line when it is imported."""
    return tmp_path / "ran"


@pytest.fixture
def make(zoo, tmp_path, marker):
    """Make a checkpoint with code beside it, and let its config.json and tokenizer_config.json name it."""

    def checkpoint(changes: dict[str, dict]) -> Path:
        folder = Path(shutil.copytree(zoo("llama"), tmp_path / "model"))
        make_tokenizer(bos=True).save_pretrained(folder)
        own_type = changes.get(IN_CONFIG, {}).get("model_type", "llama")
        (folder / "own.py").write_text(OWN.format(marker=str(marker), model_type=own_type))
        for name, values in changes.items():
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))
        return folder

    return checkpoint


@pytest.fixture
def task(tmp_path) -> str:
    records = [
        {"query": sentence(i, 4), "choices": [sentence(i + j, 2) for j in (50, 90)], "gold": 0} for i in range(8)
    ]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"choice:{tmp_path / 'choice.jsonl'}"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``trawl ARGS`` in this process: (exit code, standard error)."""

    def run(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["trawl", *map(str, args)])
        try:
            trawl_cli.main()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("changes", [MODEL, TOKENIZER], ids=["model", "tokenizer"])
@pytest.mark.parametrize("command", ["eval", "sweep"])
def test_code_runs_with_the_flag_only(changes, command, make, task, run):
    folder = make(changes)
    marker, out = folder.parent / "ran", folder.parent / "study"
    options = [
        "--ranks",
        2,
        "--method",
        "svd",
        "--layers",
        2,
        "--objective",
        "log_loss",
        "--validation",
        0.5,
        "-o",
        out,
    ]
    arguments = [command, folder, "--task", task, *(options if command == "sweep" else [])]
    code, said = run(*arguments)
    assert code == 2
    assert said.splitlines()[-1].startswith(f"LoadError: {folder} needs code of its own, which is not run; read it,")
    assert FLAG in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not marker.exists()
    assert not out.exists()
    code, said = run(*arguments, FLAG)
    assert code == 0, said
    assert marker.exists()
    if command == "sweep":
        assert json.loads((out / "results.json").read_text())["state"] == "complete"


def test_code_gives_the_figures_of_the_class_that_it_is(make, zoo, task, marker):
    """The code of this model is llama's by another name."""
    folder = make(MODEL)
    found = trawl.evaluate(folder, task, trust_remote_code=True)[0].figures
    assert marker.exists()
    own = trawl.load(folder, trust_remote_code=True)
    assert type(own).__module__.startswith("transformers_modules.")
    expected = trawl.evaluate(trawl.load(zoo("llama")), task, tokenizer=make_tokenizer(bos=True))[0].figures
    assert found == expected


def test_code_beside_a_model_that_transformers_knows_runs_with_the_flag_only(make, task, marker):
    folder = make(KNOWN)
    plain = trawl.evaluate(folder, task)[0].figures
    assert not marker.exists()
    assert type(trawl.load(folder)).__module__.startswith("transformers.")
    assert trawl.evaluate(folder, task, trust_remote_code=True)[0].figures == plain
    assert marker.exists()


def test_a_sweeps_folder_runs_no_code(make, task, marker, tmp_path):
    folder, out = make(MODEL), tmp_path / "study"
    first = trawl.sweep(folder, task, out, **GRID, trust_remote_code=True)
    marker.unlink()
    forget_code()
    with pytest.raises(LoadError, match=FLAG):
        trawl.sweep(folder, task, out, **GRID)
    assert not marker.exists()
    again = trawl.sweep(folder, task, out, **GRID, trust_remote_code=True)
    assert again.rows == first.rows


def test_a_sweep_with_the_flag_is_another_one(make, task, marker, tmp_path):
    """Where the model can be loaded either way, figures of the two are not mixed."""
    folder = make(KNOWN)
    trawl.sweep(folder, task, tmp_path / "study", **GRID)
    assert "trust_remote_code" not in (tmp_path / "study" / "sweep.json").read_text()
    with pytest.raises(ResumeError, match="differs in trust_remote_code"):
        trawl.sweep(folder, task, tmp_path / "study", **GRID, trust_remote_code=True)
    assert not marker.exists()


@pytest.mark.parametrize("trusted", [True, False])
def test_workers_are_told(trusted, zoo, task, tmp_path, monkeypatch):
    """What a Ray worker is started with says whether it may run code."""
    pytest.importorskip("ray", reason="needs the extra: pip install 'trawl-llm[ray]'")
    from trawl.sweeps.ray_pool import RayPool
    from trawl.sweeps.setup import Setup
    from trawl.sweeps.space import Space

    monkeypatch.setattr(Cluster, "connect", lambda *_: Cluster(1, "cpu", str(tmp_path), False))
    monkeypatch.setattr(RayPool, "_grow", lambda _: None)
    setup = Setup(str(zoo("llama")), Space((2,), ("svd",), ("fc",), "all", (1,)), (task,), trust_remote_code=trusted)
    assert RayPool.start(setup, tmp_path, "local").setup.trust_remote_code is trusted


@pytest.mark.parametrize("changes", [MODEL, TOKENIZER], ids=["model", "tokenizer"])
def test_a_calibration_runs_none(changes, make, marker, tmp_path):
    folder = make(changes)
    (tmp_path / "text.txt").write_text("\n".join(sentence(seed, 30) for seed in range(40)))
    recipe = trawl.Recipe(method="svd", rank=2, layers="0")
    with pytest.raises(LoadError, match="code of its own, which a calibration never runs; leave out --calibrate") as e:
        trawl.compress(folder, recipe, tmp_path / "out", calibrate=tmp_path / "text.txt", calibration_tokens=256)
    assert "trust_remote_code" not in str(e.value)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_a_loaded_model_needs_no_trust(zoo, task):
    with pytest.raises(PlanError, match="trust_remote_code go with a path or hub id"):
        trawl.evaluate(trawl.load(zoo("llama")), task, tokenizer=make_tokenizer(bos=True), trust_remote_code=True)
