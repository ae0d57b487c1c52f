"""Hub ids, against a hub of our own on the loopback address."""

import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves one repository, org/tiny, the way the hub does: file listing, metadata by HEAD, ranges by GET."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.served: Counter[str] = Counter()


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/tiny"):
            files = sorted(file.name for file in self.server.folder.iterdir())
            if "/tree/" in path:
                entries = [
                    {"type": "file", "path": f, "size": (self.server.folder / f).stat().st_size, "oid": "0" * 40}
                    for f in files
                ]
                return self.send(json.dumps(entries).encode(), {"Content-Type": "application/json"}, body=body)
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.send(json.dumps(info).encode(), {"Content-Type": "application/json"}, body=body)
        file = self.server.folder / Path(path).name
        if not path.startswith("/org/tiny/resolve/") or not file.is_file():
            known = path.startswith(("/org/tiny/", "/api/models/org/tiny"))
            code = "EntryNotFound" if known else "RepoNotFound"
            return self.send(b"", {"X-Error-Code": code}, body=body, status=404)
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status = 200
        if requested := self.headers.get("Range"):
            first, _, last = requested.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
            data, status = data[int(first) : stop], 206
        if body:
            self.server.served[file.name] += len(data)
        return self.send(data, headers, body=body, status=status)

    def send(self, data: bytes, headers: dict[str, str], *, body: bool, status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(zoo, tmp_path):
    folder = shutil.copytree(zoo("llama", 3), tmp_path / "repository")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    (folder / "tokenizer.json").write_text("{}")
    server = FakeHub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def trawl(hub, tmp_path):
    """Run the command line in a process of its own, since huggingface_hub reads its environment on import."""

    def run(*args: object, offline: bool = False) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": "/usr/bin:/bin",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",  # as the tests themselves
        }
        command = [sys.executable, "-c", "import trawl_cli; trawl_cli.main()", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    return run


@pytest.mark.slow
def test_a_hub_id_is_planned_from_headers_then_downloaded_and_then_works_offline(hub, trawl, tmp_path):
    sizes = {file.name: file.stat().st_size for file in hub.folder.iterdir()}
    done = trawl("plan", "org/tiny", "--rank", 4, "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    shards = [name for name in sizes if name.endswith(".safetensors")]
    headers = {name: int.from_bytes((hub.folder / name).read_bytes()[:8], "little") + 8 for name in shards}
    assert planned["output_bytes"] == sum(sizes[name] for name in shards)
    cached = [path.name for path in (tmp_path / "hf").rglob("*.safetensors")]
    assert cached == []
    assert max(headers.values()) < 100_000  # the hub client reads the first 100 kB of each shard, tiny shards whole

    done = trawl("compress", "org/tiny", "--rank", 4, "--layers", "1")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "tiny-cp-r4"
    record = json.loads((out / "trawl.json").read_text())
    assert record["source"] == {"model": "org/tiny", "revision": COMMIT}
    assert "base_model: org/tiny" in (out / "README.md").read_text()
    assert {path.name for path in out.iterdir()} == set(sizes) - {"pytorch_model.bin"} | {"trawl.json", "README.md"}
    assert hub.served["pytorch_model.bin"] == 0

    done = trawl("compress", "org/tiny", "--rank", 3, "--layers", "1", offline=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_hub_id_that_is_not_there_and_a_hub_that_is_not_reachable(hub, trawl):
    done = trawl("plan", "org/absent", "--rank", 4)
    assert done.returncode == 2
    assert "no such folder, and no such model on the hub: org/absent" in done.stderr
    done = trawl("plan", "org/tiny", "--rank", 4, offline=True)
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr
    hub.shutdown()
    hub.server_close()
    done = trawl("compress", "org/tiny", "--rank", 4)
    assert done.returncode == 2
    assert "the hub cannot be reached" in done.stderr
    assert done.stderr.strip().count("\n") == 0
