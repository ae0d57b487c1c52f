"""Work spread over Ray: the same results as in one process, whatever dies or joins."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

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

RANKS = (2, 3, 4)
RECIPE = trawl.Recipe(rank=3, roles="all", group_layers=1)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Let this process and the workers compute with the same number of threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one machine with two CPUs, for all tests that do not start their own."""
    from ray.cluster_utils import Cluster as Machines

    with quietly():
        machines = Machines(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        ray.init(address=machines.address, log_to_driver=False, logging_level="ERROR")
    yield machines
    ray.shutdown()
    machines.shutdown()


@contextmanager
def quietly():
    """Ray warns of its own coming changes while it starts."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def model(zoo, tmp_path_factory):
    """A tiny model with a tokenizer, and questions for it."""
    import shutil

    folder = tmp_path_factory.mktemp("ray") / "model"
    shutil.copytree(zoo("llama"), folder)
    make_tokenizer(bos=True).save_pretrained(folder)
    (folder.parent / "text.txt").write_text("".join(sentence(i, 20) + ".\n" for i in range(200)))
    return folder


@pytest.fixture
def setup(model):
    return Setup(
        str(model),
        Space(RANKS, methods=("cp", "svd")),
        (f"ppl:{model.parent / 'text.txt'}",),
        objectives=("log_loss",),
        device="cpu",
    )


def jobs():
    tried = [
        Intervention(method, "fc", str(layer), 1, rank) for layer in range(3) for method in ("cp", "svd") for rank in RANKS
    ]
    return [Job(-1, ()), *(Job(number, (item,)) for number, item in enumerate(tried))]


def comparable(outcomes):
    return {key: (one.scores, one.stacks, one.kept) for key, one in outcomes.items()}


@pytest.fixture
def expected(setup, tmp_path):
    pool = LocalPool(Scorer(setup, tmp_path / "local"))
    return comparable(score_all(pool, jobs()))


def title(process):
    """Return what a Ray worker says that it does, such as ray::ScoringWorker.score."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@contextmanager
def killing(work):
    """Kill one worker as soon as it is in the middle of some work; yield the list of those killed."""
    killed, over = [], threading.Event()

    def kill():
        while not over.is_set() and not killed:
            for process in psutil.Process().children(recursive=True):
                if title(process).startswith(f"ray::{work}"):
                    process.kill()
                    killed.append(process.pid)
                    return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield killed
    over.set()
    thread.join()


def test_workers_score_as_one_process_does_though_one_is_killed(cluster, setup, expected, tmp_path):
    from trawl.sweeps.ray_pool import RayPool

    pool = RayPool.start(setup, tmp_path / "ray", "auto")
    assert pool.slots == 2
    with killing("ScoringWorker.score") as killed:
        outcomes = score_all(pool, jobs())
    pool.close()
    assert killed
    assert comparable(outcomes) == expected
