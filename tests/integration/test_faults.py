"""Faults: whatever happens to a run, the source stays as it is and a second run gives what an undisturbed one gives."""

import errno
import itertools
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import trawl
from tests import faults
from tests.faults import RECIPE, contents, disturbed, failing, finished, start, state
from tests.integration.test_hub import FakeHub, Handler
from trawl.errors import CheckpointError, PlanError, ResumeError
from trawl.workspace import Workspace

STEP = 6  # of the file operations that are disturbed here; benchmarks/faults.py disturbs each


@pytest.fixture(scope="module")
def source(zoo, tmp_path_factory) -> Path:
    """A checkpoint of several shards, with side files in folders."""
    folder = Path(shutil.copytree(zoo("llama", 3), tmp_path_factory.mktemp("faults") / "source"))
    (folder / "1_Pooling" / "deep").mkdir(parents=True)
    (folder / "1_Pooling" / "deep" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    trawl.compress(source, RECIPE, out)
    return contents(out)


@pytest.fixture
def second(source, undisturbed):
    """Run again over what a fault left, and compare."""
    before = state(source)

    def check(out: Path, **options) -> None:
        trawl.compress(source, RECIPE, out, **options)
        assert contents(out) == undisturbed
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        assert state(source) == before
        shutil.rmtree(out)

    return check


@pytest.mark.slow
def test_killed_at_file_operations(source, tmp_path, second):
    out = tmp_path / "out"
    for at in itertools.count(0, STEP):
        code = finished(faults.run_disturbed, source, out, at, {})
        if code == 0:
            break
        assert code == -signal.SIGKILL
        second(out, resume=True)
    assert at > 60


@pytest.mark.parametrize("stage", ["checking weights", "decomposing fc.0", "decomposing fc.1", "writing"])
def test_killed_at_a_stage(stage, source, tmp_path, second):
    assert finished(faults.run_until, source, tmp_path / "out", stage) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    second(tmp_path / "out", resume=True)


def test_killed_at_random_moments(source, tmp_path, second):
    moments = random.Random(0)
    for _ in range(4):
        process = start(faults.run_plain, source, tmp_path / "out", RECIPE, {})
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        second(tmp_path / "out", resume=True)


def test_killed_while_an_output_is_replaced(source, tmp_path, second):
    """The old output, or the new one, or all that the new one is made of is there at every moment."""
    out, other = tmp_path / "out", RECIPE.model_copy(update={"rank": 1})
    for at in itertools.count(74, 4):
        trawl.compress(source, other, out)
        code = finished(faults.run_disturbed, source, out, at, {"overwrite": True})
        if code == 0:
            break
        assert out.exists() or (Workspace(out).staged / "trawl.json").exists()
        second(out, resume=True, overwrite=True)


def test_killed_while_a_checkpoint_is_made_dense(source, tmp_path):
    factored, undisturbed = tmp_path / "factored", tmp_path / "undisturbed"
    trawl.compress(source, RECIPE.model_copy(update={"write": "factored"}), factored)
    with disturbed(sys.maxsize, failing(errno.EIO)) as operations:
        trawl.densify(factored, undisturbed)
    before, wanted, out = state(factored), contents(undisturbed), tmp_path / "work" / "out"
    appears = operations.index("rename") + 1
    for at in (*range(3, appears, 12), appears - 1, appears, len(operations) - 1):
        assert finished(faults.densify_disturbed, factored, out, at) == -signal.SIGKILL
        assert out.exists() == (at >= appears)
        assert state(factored) == before
        with pytest.raises(PlanError, match="pass --overwrite"):
            trawl.densify(factored, out)
        if Workspace(out).staged.exists():
            (Workspace(out).staged / "stray").touch()  # as a run on another checkpoint leaves
        trawl.densify(factored, out, overwrite=True)
        assert contents(out) == wanted
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert state(factored) == before
        shutil.rmtree(out.parent)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_file_operations_that_fail(code, source, tmp_path, second):
    out = tmp_path / "out"
    for at in itertools.count(code % STEP, STEP):
        with disturbed(at, failing(code)) as operations:
            raised = None
            try:
                trawl.compress(source, RECIPE, out)
            except OSError as e:
                raised = e.errno
        if len(operations) <= at:
            break
        assert raised == code or operations[at] == "mkdir"  # of a folder that is there
        left = [path.name for path in tmp_path.rglob("*") if path.name.endswith(".partial") and path.is_file()]
        assert not left or operations[at] == "unlink"
        second(out, resume=True)
    assert at > 60


@pytest.mark.parametrize("limit", [100, 3_000, 20_000])
def test_no_room_for_a_file(limit, source, tmp_path, second):
    """The kernel's own refusal, in place of a write."""
    assert finished(faults.run_limited, source, tmp_path / "out", limit) == 3
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors.partial"))
    second(tmp_path / "out", resume=True)


FULL_DISK = """
import errno, pathlib, shutil, subprocess, sys
from unittest import mock
import trawl
from tests.faults import RECIPE
source, disk, size, copied = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
out = pathlib.Path(disk) / "out"
try:
    with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=1 << 40)):
        trawl.compress(source, RECIPE, out)
except OSError as e:
    assert e.errno == errno.ENOSPC and not out.exists(), e
else:
    raise AssertionError("the disk had room")
subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
trawl.compress(source, RECIPE, out, resume=True)
assert [path.name for path in out.parent.iterdir()] == ["out"]
shutil.copytree(out, copied)
"""


def test_a_disk_that_is_full(source, undisturbed, tmp_path):
    """A tmpfs, in a mount namespace of its own, that says it has room."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no tmpfs can be mounted: this system allows no mount namespaces")
    (tmp_path / "disk").mkdir()
    before = state(source)
    command = [sys.executable, "-c", FULL_DISK, source, tmp_path / "disk", "60", tmp_path / "copied"]
    found_from_anywhere = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    words = ["unshare", "-rm", *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=found_from_anywhere)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "copied") == undisturbed
    assert state(source) == before


def test_nothing_is_renamed_before_it_is_on_disk(source, tmp_path, monkeypatch):
    """What a power cut leaves: bytes before names, names inside a folder before the folder's own."""
    synced: dict[int, tuple[int, int]] = {}
    pending: set[Path] = set()
    renamed: list[Path] = []
    fsync, replace, rename, mkdir = os.fsync, os.replace, os.rename, os.mkdir

    def seen(path: Path) -> tuple[int, int]:
        return path.stat().st_size, path.stat().st_mtime_ns

    def on_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced[path.stat().st_ino] = seen(path)
        pending.discard(path)
        fsync(descriptor)

    def on_replace(old: Path, new: Path) -> None:
        assert synced.get(old.stat().st_ino) == seen(old), f"{old} was renamed before its bytes were on disk"
        replace(old, new)
        pending.add(Path(new).parent)

    def on_mkdir(path: Path, mode: int = 0o777) -> None:
        mkdir(path, mode)
        pending.add(Path(path).parent)

    def on_rename(old: Path, new: Path) -> None:
        assert not [folder for folder in pending if folder.is_relative_to(old)], "names inside are not on disk"
        files = [path for path in old.rglob("*") if path.is_file()]
        assert all(synced.get(path.stat().st_ino) == seen(path) for path in files)
        rename(old, new)
        renamed.append(new)
        pending.add(new.parent)

    for name, function in (("fsync", on_fsync), ("replace", on_replace), ("rename", on_rename), ("mkdir", on_mkdir)):
        monkeypatch.setattr(os, name, function)
    trawl.compress(source, RECIPE, tmp_path / "out")
    assert renamed == [tmp_path / "out"]
    assert tmp_path not in pending


def test_another_file_system(source, undisturbed, tmp_path, monkeypatch):
    shared = Path("/dev/shm")  # a file system of its own
    assert shared.stat().st_dev != source.stat().st_dev
    out = shared / f"trawl-test-{os.getpid()}"
    try:
        trawl.compress(source, RECIPE, out)
        assert contents(out) == undisturbed
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_a_source_that_cannot_be_written_to(source, undisturbed, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    for path in (*copy.rglob("*"), copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = state(copy)
    trawl.compress(copy, RECIPE, tmp_path / "out")
    assert state(copy) == before
    assert contents(tmp_path / "out").keys() == undisturbed.keys()
    assert all(path.stat().st_mode & stat.S_IWUSR for path in (tmp_path / "out").rglob("*"))
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755)


def scribble(path: Path) -> None:
    """Change a shard's last bytes in place, which no header tells of."""
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(bytes(4))


def put_another(path: Path) -> None:
    """Put another file of the same size in its place."""
    path.with_name("new").write_bytes(path.read_bytes()[:-4] + bytes(4))
    path.with_name("new").replace(path)


@pytest.mark.parametrize("change", [scribble, put_another])
def test_a_source_that_changes_during_the_run(change, source, tmp_path):
    copy, out = Path(shutil.copytree(source, tmp_path / "source")), tmp_path / "out"

    def meddle(stage: str, done: int, _total: int | None) -> None:
        if stage == "writing" and done and change.__name__ not in meddled:
            meddled.append(change.__name__)
            change(copy / "model-00001-of-00004.safetensors")

    meddled: list[str] = []
    with pytest.raises(CheckpointError, match=r"model-00001-of-\d+\.safetensors changed while it was being read"):
        trawl.compress(copy, RECIPE, out, observer=meddle)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    trawl.compress(copy, RECIPE, out)
    trawl.compress(copy, RECIPE, tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_source_that_changes_between_two_runs(source, tmp_path):
    copy, out = Path(shutil.copytree(source, tmp_path / "source")), tmp_path / "out"
    assert finished(faults.run_until, copy, out, "writing") == -signal.SIGKILL
    (copy / "1_Pooling" / "deep" / "config.json").write_text("{ }")
    with pytest.raises(ResumeError, match=r"files\.1_Pooling/deep/config\.json"):
        trawl.compress(copy, RECIPE, out, resume=True)
    trawl.compress(copy, RECIPE, out, overwrite=True)
    assert (out / "1_Pooling" / "deep" / "config.json").read_text() == "{ }"


def test_a_second_run_is_refused_before_it_reads_a_weight(source, tmp_path, second):
    out = tmp_path / "out"
    stages: list[str] = []

    def meanwhile(stage: str, _done: int, _total: int | None) -> None:
        if stage == "writing":
            for options in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(PlanError, match="another run is working in"):
                    trawl.compress(source, RECIPE, out, observer=lambda name, *_: stages.append(name), **options)

    second(out, observer=meanwhile)
    assert stages == []


def test_an_output_that_appears_meanwhile_is_not_replaced(source, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def meanwhile(workspace: Workspace, path: Path, **options) -> None:
        check(workspace, path, **options)
        out.mkdir()
        (out / "precious").write_text("kept")

    check = Workspace.check
    monkeypatch.setattr(Workspace, "check", meanwhile)
    with pytest.raises(PlanError, match="exists; pass --overwrite"):
        trawl.compress(source, RECIPE, out)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/precious"]


def test_a_folder_that_is_not_a_runs_is_left_alone(source, tmp_path):
    out = tmp_path / "out"
    Workspace(out).partial.mkdir()
    (Workspace(out).partial / "precious").write_text("kept")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(PlanError, match="is no run's folder"):
            trawl.compress(source, RECIPE, out, **options)
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(PlanError, match="exists; pass --overwrite"):
        trawl.compress(source, RECIPE, out)


def test_a_clock_that_is_set_back(source, tmp_path, second, monkeypatch):
    out = tmp_path / "out"
    assert finished(faults.run_until, source, out, "writing") == -signal.SIGKILL
    tomorrow = time.time() + 86_400
    for path in (Workspace(out).partial, *Workspace(out).partial.rglob("*")):
        os.utime(path, (tomorrow, tomorrow))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    second(out, resume=True)


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_a_command_with_one_line(number, word, source, tmp_path):
    slow = tmp_path / "slow"
    tensors = {
        f"model.layers.{layer}.mlp.{role}_proj.weight": torch.randn(256, 256)
        for layer in range(4)
        for role in ("gate", "up", "down")
    }
    slow.mkdir()
    save_file(tensors | {"model.embed_tokens.weight": torch.randn(8, 256)}, slow / "model.safetensors")
    (slow / "config.json").write_text('{"model_type": "x", "hidden_size": 256, "num_hidden_layers": 4}')
    options = ["compress", str(slow), "--rank", "64", "--group-layers", "1", "--tol", "0", "--n-iter-max", "9"]
    process = start(faults.run_command, [*options, "-o", str(tmp_path / "out")], tmp_path / "errors")
    until = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/factors/*.safetensors")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    said = (tmp_path / "errors").read_text()
    assert said.splitlines()[-1] == f"{word}; finished parts are kept, go on with --resume"
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    recipe = trawl.Recipe(rank=64, group_layers=1, tol=0, n_iter_max=9)
    report = trawl.compress(slow, recipe, tmp_path / "out", resume=True)
    assert report.stacks[0].seconds == 0
    trawl.compress(slow, recipe, tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("memory", [10_000_000, 60_000_000, 112_000_000])
def test_too_little_memory_is_said_in_one_line(memory, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tensors = {f"model.layers.0.mlp.{role}_proj.weight": torch.randn(2048, 2048) for role in ("gate", "up", "down")}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "x", "hidden_size": 2048, "num_hidden_layers": 1}')
    before = state(source)
    options = ["compress", str(source), "--rank", "512", "--n-iter-max", "1", "-o", str(tmp_path / "out")]
    assert finished(faults.run_command, options, tmp_path / "errors", memory) == 2
    said = (tmp_path / "errors").read_text()
    assert said.splitlines()[-1].startswith(("MemoryError: not enough memory", "CheckpointError: "))
    assert "Traceback" not in said
    assert state(source) == before
    assert not (tmp_path / "out").exists()


class Broken(Handler):
    """Breaks every download of a shard off half-way, as long as it is told to."""

    def send(self, data: bytes, headers: dict[str, str], *, body: bool, status: int = 200) -> None:
        broken = (self.server.folder / "broken").exists()
        if body and broken and self.path.endswith(".safetensors") and "/resolve/" in self.path:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        super().send(data, headers, body=body, status=status)


TWICE = """
import sys, pathlib, trawl
recipe = trawl.Recipe(rank=2, roles="fc", layers="0-1", group_layers=1)
try:
    trawl.compress("org/tiny", recipe, sys.argv[1])
except trawl.TrawlError as e:
    print(type(e).__name__, e, sep="|")
assert not pathlib.Path(sys.argv[1]).exists()
pathlib.Path(sys.argv[2]).unlink()
trawl.compress("org/tiny", recipe, sys.argv[1])
"""


def test_a_download_that_breaks_off(source, undisturbed, tmp_path):
    repository = Path(shutil.copytree(source, tmp_path / "repository"))
    shutil.rmtree(repository / "1_Pooling")
    (repository / "broken").touch()
    server = FakeHub(repository)
    server.RequestHandlerClass = Broken
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-c", TWICE, str(tmp_path / "out"), str(repository / "broken")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CheckpointError|")
    assert "goes on where it broke off" in done.stdout
    found = contents(tmp_path / "out")
    shards = [name for name in undisturbed if name.endswith(".safetensors")]
    assert {name: found[name] for name in shards} == {name: undisturbed[name] for name in shards}


def test_a_neighbour_of_any_name_is_left_alone(source, tmp_path):
    for number, options in enumerate(({}, {"overwrite": True})):
        for name in ("out.replaced", "out.search"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "precious").write_text("kept")
        trawl.compress(source, RECIPE.model_copy(update={"seed": number}), tmp_path / "out", **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced", "out.search"]
        assert (tmp_path / "out.replaced" / "precious").read_text() == "kept"


@pytest.mark.parametrize("stage", ["checking", "decomposing", "writing"])
def test_an_output_that_appears_during_the_work_is_not_replaced(stage, source, tmp_path, second):
    """What was made stays, and goes where it belongs once the place is free."""
    out = tmp_path / "out"

    def meanwhile(name, *_):
        if name.startswith(stage) and not out.exists():
            out.mkdir()
            (out / "precious").write_text("kept")

    with pytest.raises(PlanError, match="exists; pass --overwrite"):
        trawl.compress(source, RECIPE, out, observer=meanwhile)
    assert (out / "precious").read_text() == "kept"
    shutil.rmtree(out)
    second(out, resume=True)


def test_only_a_checkpoint_is_overwritten(source, tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("folder/thesis.tex", "file"):
        (tmp_path / name).write_text("kept")
    for name in ("folder", "file"):
        with pytest.raises(PlanError, match=rf"{name} is no checkpoint, and is not replaced"):
            trawl.compress(source, RECIPE, tmp_path / name, overwrite=True)
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"kept"}


@pytest.mark.parametrize("name", [".", "..", "new/.."])
def test_an_output_without_a_name_is_refused(name, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match="has no name of its own"):
        trawl.compress(source, RECIPE, name, overwrite=True)
    assert list(tmp_path.iterdir()) == []
