"""Files of strangers: each ends in TrawlError or is read, nothing outside the folder is touched, no secret is kept."""

import json
import os
import pickle
import random
import stat
import string
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trawl_cli.console import print_table

import trawl
from tests import hostile
from tests.hostile import (
    CONFIG,
    FAMILY_YAML,
    INDEX_NAME,
    RECIPE_YAML,
    SINGLE_NAME,
    cases,
    checkpoint_files,
    factored_files,
    make_kinds,
    outcome,
    watched,
    write_files,
)
from trawl import gguf
from trawl.checkpoint import open_folder
from trawl.errors import CheckpointError, FamilyError, LoadError, PlanError, TrawlError
from trawl.evaluation.tasks import parse_task
from trawl.families import match_family
from trawl.recipe_reader import make_recipe, read_recipe
from trawl.redaction import command_line, redacted
from trawl.report.reading import expand_layers, read_folder
from trawl.untrusted import own_file, parse_json, parse_yaml

SHORT = 120  # cases of each kind; benchmarks/fuzz.py runs a hundred thousand
RECIPE = trawl.Recipe(rank=2, roles="fc", layers="0", group_layers=1)
KINDS = (
    "safetensors header", "index", "config.json", "recipe YAML", "family YAML", "factored descriptor", "factored shard",
    "factor file", "trawl.json", "qa task", "choice task", "pairs task", "ppl task",
)  # fmt: skip


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return make_kinds(tmp_path_factory.mktemp("kinds"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_files(tmp_path / "model", checkpoint_files())


def header_file(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files(name, kinds):
    kind, folder = kinds[name]
    (folder / kind.file).write_bytes(kind.seed)
    assert outcome(kind, folder, kind.seed) == "read"
    found = {content: outcome(kind, folder, content) for content in islice(cases(kind, 1), SHORT)}
    faults = {what: content[:200] for content, what in found.items() if what.startswith("FAULT")}
    assert not faults
    assert len(set(found.values())) > 1


def test_all_kinds_are_tried(kinds):
    assert set(KINDS) == set(kinds)


@pytest.mark.parametrize("name", ["safetensors header", "config.json", "index"])
def test_an_output_of_a_mutated_source_is_whole_or_not_there(name, kinds, tmp_path):
    """Compress what still opens, and look at what is left."""
    kind, folder = kinds[name]
    made = 0
    for content in islice(cases(kind, 2), 40):
        (folder / kind.file).write_bytes(content)
        try:
            names = open_folder(folder).tensors.keys()
            trawl.compress(folder, RECIPE, tmp_path / "out", overwrite=True)
        except TrawlError:
            assert not (tmp_path / "out.partial").exists()
        else:
            made += 1
            assert open_folder(tmp_path / "out").tensors.keys() == names
            assert (tmp_path / "out" / "trawl.json").exists()
    (folder / kind.file).write_bytes(kind.seed)
    assert made > 0


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
ENTRY = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F4", "BOOL"]) | JSON,
    "shape": st.lists(st.integers(-2, 2**64), max_size=4) | JSON,
    "data_offsets": st.lists(st.integers(-1, 64), min_size=1, max_size=3) | JSON,
})  # fmt: skip


@settings(max_examples=150)
@given(header=st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=3), data=st.binary(max_size=64))
def test_any_header(kinds, header, data):
    kind, folder = kinds["safetensors header"]
    text = json.dumps(header).encode()
    assert not outcome(kind, folder, header_file(text, data)).startswith("FAULT")


@settings(max_examples=150)
@given(values=st.dictionaries(st.sampled_from(sorted(CONFIG)) | st.text(max_size=8), JSON))
def test_any_configuration(kinds, values):
    kind, folder = kinds["config.json"]
    assert not outcome(kind, folder, json.dumps(CONFIG | values).encode()).startswith("FAULT")


YAML_TEXT = st.lists(
    st.sampled_from(
        ["{", "}", "[", "]", ": ", "- ", "\n", "  ", "&a ", "*a", "!!int ", "!!set ", "? ", "|", '"', "rank"]
    )
    | st.sampled_from(RECIPE_YAML.split() + FAMILY_YAML.split())
    | st.text(string.printable, max_size=6),
    max_size=30,
).map("".join)


@settings(max_examples=150)
@given(text=YAML_TEXT)
def test_any_yaml(kinds, text):
    for name in ("recipe YAML", "family YAML"):
        kind, folder = kinds[name]
        assert not outcome(kind, folder, text.encode()).startswith("FAULT")


DEEP = b"[" * 500 + b"]" * 500
TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


def one(**values) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | values}).encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (TWICE, "the key 'a' stands twice"),
        (one(shape=[float("inf")]), r"shape \[inf\]; expected counts"),
        (one(shape=[1.0]), r"shape \[1\.0\]; expected counts"),
        (one(shape=[True]), r"shape \[True\]; expected counts"),
        (one(shape=["1"]), r"shape \['1'\]; expected counts"),
        (one(shape=[-1, -1]), r"shape \[-1, -1\]; expected counts"),
        (one(shape=[2**63]), "expected counts"),
        (one(shape=[2**62, 4]), "claims bytes"),
        (one(shape=[1] * 65), "65 axes"),
        (one(dtype=["F32"]), r"unknown dtype \['F32'\]"),
        (one(dtype="F33"), "unknown dtype 'F33'"),
        (one(data_offsets=[0, 4, 4]), "3 offsets"),
        (one(data_offsets=[4, 0]), "claims bytes"),
        (one(data_offsets=[0, 2**62]), "claims bytes"),
        (one(x=json.loads(DEEP)), "nested more than 64 levels deep"),
        (DEEP, "nested more than 64 levels deep"),
        (b'{"\xff": 1}', "not UTF-8"),
        (b'{"\\ud800": 1}', "not UTF-8"),
        (json.dumps({"x" * 1001: json.loads(one())["a"]}).encode(), "a name of 1001 characters"),
        (b'{"__metadata__": {"format": 1}}', "something else than texts"),
        ("{}".encode("utf-16"), "not UTF-8"),
    ],
)
def test_headers(header, message, folder):
    (folder / INDEX_NAME).unlink()
    (folder / SINGLE_NAME).write_bytes(header_file(header, bytes(4)))
    with pytest.raises(CheckpointError, match=message):
        open_folder(folder)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (["model.safetensors"], r"names the shard \['model\.safetensors'\]"),
        ("../model/model.safetensors", "expected a plain file name"),
        ("/etc/passwd", "expected a plain file name"),
        ("config.json", r"ends in \.safetensors"),
        (".safetensors", "which is not in"),
        ("a\0.safetensors", "which is not in"),
        ("x" * 300 + ".safetensors", "which is not in"),
        ("\ud800.safetensors", "not UTF-8"),
    ],
)
def test_shards_in_an_index(shard, message, folder):
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(CheckpointError, match=message):
        open_folder(folder)


@pytest.mark.parametrize("name", [SINGLE_NAME, INDEX_NAME, "config.json", "tokenizer.json", "README.md", "deep/x.json"])
def test_links_out_of_the_folder_are_refused(name, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"---\nlicense: secret\n---\n")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match="is a link out of the checkpoint folder"):
        trawl.compress(folder, RECIPE, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "secret"]


@pytest.mark.parametrize("name", [SINGLE_NAME, INDEX_NAME, "config.json"])
def test_links_out_of_the_folder_are_not_opened(name, folder, tmp_path):
    """Also by what reads headers alone, and with nothing before it that would have looked."""
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to("../secret")
    if name == SINGLE_NAME:
        (folder / INDEX_NAME).unlink()
    with watched(folder) as seen, pytest.raises(CheckpointError, match="is a link out of the checkpoint folder"):
        open_folder(folder)
    assert seen == []


def test_links_out_of_a_factored_folder_are_refused(tmp_path):
    folder = write_files(tmp_path / "factored", factored_files())
    (folder / "trawl.json").rename(tmp_path / "record")
    (folder / "trawl.json").symlink_to("../record")
    with pytest.raises(CheckpointError, match="is a link out of the checkpoint folder"):
        trawl.densify(folder, tmp_path / "out")


def test_links_inside_the_folder_and_into_the_hubs_cache_are_followed(tmp_path):
    files = checkpoint_files()
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    write_files(blobs, {str(number): content for number, content in enumerate(files.values())})
    snapshot.mkdir(parents=True)
    for number, name in enumerate(files):
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    (snapshot / "copy.json").symlink_to("config.json")
    trawl.compress(snapshot, RECIPE, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    (snapshot / "copy.json").unlink()
    (snapshot / "copy.json").symlink_to("../../../secret")
    (tmp_path / "secret").write_text("{}")
    with pytest.raises(CheckpointError, match="link out"):
        open_folder(snapshot).side_files  # noqa: B018 (a property)


def test_circles_and_pipes_neither_hang_nor_fill_the_output(folder, tmp_path):
    (folder / "again").symlink_to(".")
    (folder / "a.json").symlink_to("b.json")
    (folder / "b.json").symlink_to("a.json")
    os.mkfifo(folder / "pipe")
    trawl.compress(folder, RECIPE, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*checkpoint_files(), "README.md", "trawl.json"}
    for name in ("config.json", SINGLE_NAME):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match="is not a regular file"):
            open_folder(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(content)


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(folder, tmp_path):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    trawl.compress(folder, RECIPE, tmp_path / "out")
    for name in (SINGLE_NAME, INDEX_NAME):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="only pickled weights"):
        open_folder(folder)
    assert not (tmp_path / "ran").exists()


def test_no_code_of_a_checkpoint_runs(folder, tmp_path, monkeypatch):
    config = CONFIG | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["EvilForCausalLM"]}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\nclass M: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # somebody who says yes to everything
    with pytest.raises(LoadError, match="needs code of its own, which is not run"):
        trawl.load(folder)
    (tmp_path / "text").write_text("text")
    with pytest.raises(LoadError):
        trawl.evaluate(folder, [f"ppl:{tmp_path / 'text'}"])
    trawl.compress(folder, RECIPE, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "an alias"),
        ("rank: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("rank: !!timestamp x", "does not fit its tag"),
        ("rank: !!int ''", "does not fit its tag"),
        ("rank: !!bool x", "does not fit its tag"),
        ("rank: 0x" + "f" * 5000, "an integer of 20000 bits"),
        ("rank: " + "[" * 500 + "]" * 500, "nested more than 64 levels deep"),
        ('rank: "\\ud800"', "a lone surrogate"),
        ("roles: [1, 2]\nrank: 1", "unknown role"),
        ("seed: 18446744073709551615\nrank: 1", "seed is 18446744073709551615"),
        (f"layers: '{'1' * 5000}'\nrank: 1", r"cannot read '1{70,}\.\.\."),
        ("x" * 2_000_000, "expected at most"),
        ("[]: 1", "unhashable key"),
    ],
)
def test_recipes(text, message, folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(PlanError, match=message) as error, watched(tmp_path):
        trawl.plan(folder, make_recipe(read_recipe(tmp_path / "recipe.yaml"), "recipe"))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("inner hidden", " ".join(f"a{n}" for n in range(30_000)) + " hidden"),
        ("(heads head_dim) hidden", "(" * 150 + ")" * 150),
        ("(heads head_dim) hidden", "(in head_dim) hidden"),
        ("layers.{layer}.", "layers.{layer % 1}."),
        ("layers.{layer}.", "layers.{layer * 9223372036854775807}."),
        ("[num_hidden_layers, ", "[9223372036854775807, "),
        ("hidden: hidden_size", "hidden: " + "*".join(["hidden_size"] * 3000)),
        ("hidden: hidden_size", "hidden: " + "(" * 190 + "1" + ")" * 190),
        ("hidden: hidden_size", "hidden: vocab_size * 9223372036854775807"),
        ('prefixes: ["model.", ""]', f"prefixes: {['model.'] * 1000}"),
        ("layers: [num_hidden_layers,", f"layers: [{'1, ' * 1000}"),
    ],
)
def test_family_files(old, new, folder, tmp_path):
    assert old in FAMILY_YAML
    (tmp_path / "family.yaml").write_text(FAMILY_YAML.replace(old, new))
    checkpoint = open_folder(folder)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    with pytest.raises(FamilyError) as error, watched(tmp_path):
        match_family(checkpoint.config, shapes, tmp_path / "family.yaml")
    assert len(str(error.value)) < 1000


def test_names_that_make_inference_slow(tmp_path):
    names = [f"{'0.' * 200}{number}.0.self_attn.q_proj.weight" for number in range(3000)]
    shapes = {f"a{number}.{name}": (4, 4) for number, name in enumerate(names)}
    shapes |= {f"model.layers.{'9' * 5000}.mlp.up_proj.weight": (4, 4)}
    with pytest.raises(FamilyError), watched(tmp_path):
        match_family({"model_type": "x", "hidden_size": 4, "num_hidden_layers": 1}, shapes)


def test_a_descriptor_of_ten_thousand_slices_is_read_at_once(tmp_path):
    files = factored_files()
    config = json.loads(files["config.json"])
    stack = config["quantization_config"]["stacks"][0]
    stack["slices"] *= 2000
    folder = write_files(tmp_path / "out", files | {"config.json": json.dumps(config).encode()})
    with pytest.raises(TrawlError), watched(tmp_path):
        trawl.densify(folder, tmp_path / "dense")


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("pairs", '{"sentence1": "a", "sentence2": "b", "score": 1' + "0" * 400 + "}", "score is 1000"),
        ("qa", '{"prompt": "\\ud800", "answers": ["a"]}', "not UTF-8"),
        ("qa", '{"prompt": "a", "answers": ' + "[" * 500 + "]" * 500 + "}", "nested more than"),
        ("choice", '{"query": "a", "choices": ["b", "c"], "gold": ' + "1" * 4000 + "}", r"gold is 1{70,}\.\.\."),
    ],
)
def test_task_files(kind, line, message, tmp_path):
    (tmp_path / "task").write_text(line)
    with pytest.raises(PlanError, match=message) as error:
        parse_task(f"{kind}:{tmp_path / 'task'}")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("key", "value"), [("parameters_before", float("inf")), ("relative_error", 10**400), ("shape", {"a": 1})]
)
def test_records_of_an_output(key, value, tmp_path):
    record = json.loads(factored_files()["trawl.json"])
    record["stacks"][0] |= {key: value}
    (tmp_path / "trawl.json").write_text(json.dumps(record))
    with pytest.raises(PlanError, match="is not as trawl writes it"), watched(tmp_path):
        read_folder(tmp_path)


def test_a_range_of_layers_without_end_is_none():
    assert expand_layers("0-9999999999") == ()
    assert expand_layers("2-4,7") == (2, 3, 4, 7)


def test_a_watch_sees_what_it_looks_for(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").write_text("x")
    with watched(tmp_path / "inside") as seen:
        (tmp_path / "outside").read_text()
        (tmp_path / "written").write_text("x")
        pickle.loads(pickle.dumps(Path.touch))
    assert [what.split()[0] for what in seen] == ["open", "open", "pickle.find_class"]


def work_on():
    while True:
        pass


@pytest.mark.parametrize(("bound", "case"), [("LIMIT", work_on), ("PATIENCE", threading.Event().wait)])
def test_a_watch_stops_what_works_or_waits_too_long(bound, case, tmp_path, monkeypatch):
    monkeypatch.setattr(hostile, bound, 0.2)
    began = time.monotonic()
    with pytest.raises(hostile.TooSlowError), watched(tmp_path):
        case()
    assert time.monotonic() - began < 30  # on a busy machine too; the other bound is never met or takes 60


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        (["plan", "m", "--rank", "8"], "trawl plan m --rank 8"),
        (["plan", "hf_abcdefghijklmnopqrstuvwxyz012345"], "trawl plan '***'"),
        (["plan", "m", "--hub-token", "abc"], "trawl plan m --hub-token '***'"),
        (["plan", "m", "--password=abc def"], "trawl plan m '--password=***'"),
        (["sweep", "--storage", "postgresql://me:pa@ss@host:5/db"], "trawl sweep --storage 'postgresql://***@host:5/db'"),
        (["sweep", "--storage", "mysql://host/db?password=abc&x=1"], "trawl sweep --storage 'mysql://host/db?password=***&x=1'"),
        (["plan", "m", "--calibration-tokens", "9", "--task", "qa:f?tokens=5"], None),
        (["plan", "secret-from-the-environment"], "trawl plan '***'"),
    ],
)  # fmt: skip
def test_command_lines_are_recorded_without_secrets(arguments, recorded, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-from-the-environment")
    if recorded is None:
        assert "***" not in (command_line(arguments) or "")
    else:
        assert command_line(arguments) == recorded


def test_a_token_lands_in_no_file_and_no_log(folder, tmp_path, monkeypatch, caplog):
    token = "hf_" + "".join(random.Random(0).choices(string.ascii_letters, k=34))
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/trawl", "compress", str(folder), f"--url=https://me:{token}@hub/x"])
    named = folder.rename(folder.with_name(f"model-{token}"))
    trawl.compress(named, RECIPE, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "trawl.json").read_text())["command"].endswith("'--url=https://***@hub/x'")
    for path in (tmp_path / "out").iterdir():
        assert token.encode() not in path.read_bytes(), path.name
    assert token not in caplog.text
    assert redacted(f"401 for {token}") == "401 for ***"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask_and_the_folder_of_work_is_private(umask, folder, tmp_path):
    modes = []

    def look(*_args) -> None:
        modes.append(stat.S_IMODE((tmp_path / "out.partial").stat().st_mode))

    before = os.umask(umask)
    try:
        trawl.compress(folder, RECIPE, tmp_path / "out", observer=look)
    finally:
        os.umask(before)
    assert set(modes) == {0o700}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_converted_file_follows_the_umask_and_leaves_no_temporary_folder(tmp_path, monkeypatch):
    modes = []

    def convert(_path: Path, folder: Path) -> None:
        modes.append(stat.S_IMODE(folder.parent.stat().st_mode))
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert_into", convert)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda _: True)
    before = os.umask(0o022)
    try:
        gguf.convert(tmp_path / "m.gguf", tmp_path / "cache" / "m")
    finally:
        os.umask(before)
    assert modes == [0o700]
    assert stat.S_IMODE((tmp_path / "cache" / "m").stat().st_mode) == 0o755
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["m"]


def test_plain_values():
    assert parse_json(b"[" * 64 + b"]" * 64)
    assert parse_yaml("a: 1\nb: [x, 2.5]") == {"a": 1, "b": ["x", 2.5]}


def test_names_steer_neither_tables_nor_the_terminal(capsys):
    print_table("model[/b]", ("name",), [["[/red]\x1b[2J"]])
    shown = capsys.readouterr().out
    assert "model[/b]" in shown
    assert "[/red]\\x1b[2J" in shown
    assert "\x1b" not in shown


def test_own_file_names_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.json is missing"):
        own_file(tmp_path, "absent.json")
