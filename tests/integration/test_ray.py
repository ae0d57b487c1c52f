"""Work spread over Ray: the same results as in one process, whatever dies or joins."""

import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing, contextmanager, suppress
from dataclasses import replace

import psutil
import pytest
import torch

import trawl
from tests.integration.test_compress import weights_hash
from tests.integration.test_eval import make_tokenizer, sentence
from trawl.cluster import Cluster
from trawl.errors import CheckpointError, PlanError
from trawl.sweeps.pools import Job, LocalPool, score_all
from trawl.sweeps.scorer import Scorer
from trawl.sweeps.setup import Setup
from trawl.sweeps.space import Intervention, Space

ray = pytest.importorskip("ray", reason="the extra trawl-llm[ray] is not installed")

pytestmark = pytest.mark.slow

RANKS = (2, 3)
RECIPE = trawl.Recipe(rank=3, group_layers=1, n_iter_max=100, tol=0)  # long enough to be killed in its middle


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Let this process compute with as many threads as the workers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _not_nice():
    """Let Ray's workers have their share beside other tests; at niceness 15, which Ray gives them, it is hardly any."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="module")
def machines():
    """A cluster of one machine with two CPUs, which others may join; this process is connected to it."""
    from ray.cluster_utils import Cluster as Machines

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's, of its own coming changes
        found = Machines(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def model(zoo, tmp_path_factory):
    """A tiny model with a tokenizer, and beside it a text."""
    folder = tmp_path_factory.mktemp("ray") / "model"
    shutil.copytree(zoo("llama"), folder)
    make_tokenizer(bos=True).save_pretrained(folder)
    (folder.parent / "text.txt").write_text("".join(f"{sentence(i, 20)}.\n" for i in range(200)))
    return folder


def spec(model):
    return f"ppl:{model.parent / 'text.txt'}"


def title(process):
    """Return what a worker says that it does, such as ray::ScoringWorker.score."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@contextmanager
def killing(work):
    """Kill one worker as soon as it is in the middle of some work; yield the list of the killed."""
    killed, over = [], threading.Event()

    def kill():
        found, looked = [], 0.0
        while not killed and not over.wait(0.004):
            if time.monotonic() - looked > 0.5:  # looking through all processes is slow, and takes from their time
                found = [one for one in psutil.Process().children(recursive=True) if title(one).startswith("ray::")]
                looked = time.monotonic()
            for process in found:
                if title(process).startswith(f"ray::{work}"):
                    process.kill()
                    killed.append(process.pid)
                    return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield killed
    over.set()
    thread.join()


def test_a_study_with_a_worker_killed_mid_trial_has_the_results_of_one_process(machines, model, tmp_path):
    found = {}
    for name, address in (("alone", None), ("spread", "auto")):
        with killing("ScoringWorker.score") as killed:
            found[name] = trawl.sweep(
                model,
                spec(model),
                tmp_path / name,
                ranks=RANKS,
                methods=("cp", "svd"),
                objectives=("log_loss",),
                patience=None,
                device="cpu",
                ray=address,
            )
        assert len(killed) == (address is not None)
    alone, spread = (found[name].results for name in ("alone", "spread"))
    assert len(alone["trials"]) == 3 * 2 * len(RANKS)
    keys = ("state", "base", "best", "best_of_layer", "composition", "front")
    assert {key: spread[key] for key in keys} == {key: alone[key] for key in keys}
    ours, theirs = ([without_seconds(trial) for trial in one["trials"]] for one in (spread, alone))
    assert ours == theirs


def without_seconds(trial):
    return {key: value for key, value in trial.items() if key != "seconds"}


def test_a_machine_that_joins_gets_work_and_a_mistake_in_a_worker_is_one_line(machines, model, tmp_path):
    from trawl.sweeps.ray_pool import RayPool

    setup = Setup(str(model), Space(RANKS), (spec(model),), objectives=("log_loss",), device="cpu")
    jobs = [Job(layer, (Intervention("cp", "fc", str(layer), 1, 2),)) for layer in range(3)]
    expected = score_all(LocalPool(Scorer(setup, tmp_path / "alone")), jobs)
    pool = RayPool.start(setup, tmp_path / "spread", "auto")
    assert pool.slots == 3  # two at work, one that waits for whoever is done first
    for job in jobs:
        pool.submit(job)
    first = pool.next()
    assert not pool._idle  # whoever was done has its next job before the asker has dealt with the outcome
    assert {job.key for job, _ in (first, pool.next(), pool.next())} == {0, 1, 2}
    joined = machines.add_node(num_cpus=1)
    try:
        last = time.monotonic() + 240  # on a busy machine
        while len(pool._idle) < 3:
            assert time.monotonic() < last, "no worker on the machine that joined"
            score_all(pool, jobs[:1])
            time.sleep(0.5)  # which leaves the one that starts the processor
        outcomes = score_all(pool, jobs)
        assert {key: one.scores for key, one in outcomes.items()} == {key: one.scores for key, one in expected.items()}
        absent = Intervention("cp", "fc", "7", 1, 2)
        with pytest.raises(PlanError, match="7 is outside it") as caught:
            score_all(pool, [Job(9, (absent,))])
        assert "\n" not in str(caught.value)
    finally:
        pool.close()
        machines.remove_node(joined)


def test_a_model_that_workers_cannot_open_is_their_error_not_a_hang(machines, model, tmp_path, monkeypatch):
    from trawl.sweeps.ray_pool import RayPool

    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # all of the machine: one worker
    setup = Setup(str(model), Space(RANKS), (spec(model),), objectives=("log_loss",), device="cpu")
    pool = RayPool.start(replace(setup, model=str(tmp_path / "absent")), tmp_path, "auto")
    pool.submit(Job(0, ()))
    with closing(pool), pytest.raises(CheckpointError, match="no such folder"):
        pool.next()


def test_compressing_on_ray_gives_the_same_bytes_though_a_worker_is_killed(machines, model, tmp_path):
    stages = []
    with killing("_seal_one") as killed:
        report = trawl.compress(
            model, RECIPE, tmp_path / "spread", ray="auto", observer=lambda *told: stages.append(told)
        )
    assert killed
    alone = trawl.compress(model, RECIPE, tmp_path / "alone")
    assert weights_hash(tmp_path / "spread") == weights_hash(tmp_path / "alone")
    assert [stack.relative_error for stack in report.stacks] == [stack.relative_error for stack in alone.stacks]
    assert all(stack.seconds > 0 for stack in report.stacks)
    count = len(report.stacks)
    assert ("decomposing stacks", count, count) in stages


def test_the_command_starts_workers_of_its_own(model, tmp_path):
    out = tmp_path / "out"
    arguments = ["compress", str(model), "--rank", "2", "--roles", "fc", "--group-layers", "1", "-o", str(out)]
    command = [sys.executable, "-c", "import trawl_cli; trawl_cli.main()", *arguments, "--ray", "local"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ray" not in (done.stdout + done.stderr).lower().replace(str(tmp_path).lower(), "")
    trawl.compress(model, trawl.Recipe(rank=2, roles="fc", group_layers=1), tmp_path / "alone")
    assert weights_hash(out) == weights_hash(tmp_path / "alone")


@pytest.fixture
def disconnected(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def test_an_address_without_a_cluster_is_refused_at_once(disconnected, model, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening
        port = closed.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(PlanError, match=f"no Ray cluster at 127.0.0.1:{port}: Connection refused"):
            trawl.compress(model, RECIPE, tmp_path / "out", ray=f"127.0.0.1:{port}")
    assert time.monotonic() - began < 10
    assert not list(tmp_path.iterdir())
    with pytest.raises(PlanError, match="expected local, auto or HOST:PORT"):
        Cluster.connect("nowhere")


def test_something_else_at_the_address_is_refused(disconnected):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            link, _ = server.accept()
            link.recv(100)
            link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            link.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(PlanError, match="what listens there is not Ray"):
            Cluster.connect(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()


def test_a_gpu_that_no_machine_has_is_refused(machines):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(PlanError, match="on no machine of the Ray cluster"):
        Cluster.connect("auto", "cuda")


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlanError, match=r"pip install 'trawl-llm\[ray\]'"):
        Cluster.connect("local")


def test_workers_weigh_the_error_by_the_same_moments(machines, model, tmp_path):
    recipe, text = trawl.Recipe(method="svd", rank=3, layers="1"), model.parent / "text.txt"
    for name, address in (("alone", None), ("spread", "auto")):
        found = trawl.compress(model, recipe, tmp_path / name, calibrate=text, calibration_tokens=512, ray=address)
        assert all(stack.weighted_error is not None for stack in found.stacks)
    assert weights_hash(tmp_path / "alone") == weights_hash(tmp_path / "spread")


def test_a_budget_measured_on_ray_finds_the_same_though_a_worker_is_killed(machines, model, tmp_path):
    recipe = trawl.Recipe(keep=0.7)
    text = {"calibrate": model.parent / "text.txt", "calibration_tokens": 512}
    alone = trawl.find_recipe(model, recipe, tmp_path / "alone", **text)
    with killing("_measure_blocks") as killed:
        spread = trawl.find_recipe(model, recipe, tmp_path / "spread", ray="auto", **text)
    assert killed
    assert spread.recipe == alone.recipe
    assert spread.real == alone.real
    measured = {path.name for path in (tmp_path / "alone").glob("damage-*")}
    assert measured == {path.name for path in (tmp_path / "spread").glob("damage-*")}
