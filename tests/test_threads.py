"""Threads are as many as were granted or chosen, and ``each`` uses one per core."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from fedhubert_lib import threads


def test_a_chosen_number_of_threads_holds(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert threads.count() == 3
    monkeypatch.setattr(os, "environ", os.environ.copy())
    threads.configure()
    assert os.environ["OMP_NUM_THREADS"] == "3,1"


def test_the_import_configures_libraries_and_children():
    """Before torch is loaded, which reads it once."""
    code = "import fedhubert_lib, os, torch; print(os.environ['GOMP_SPINCOUNT'], torch.get_num_threads())"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | {"SLURM_CPUS_PER_TASK": "1"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["1000", "1"]
    after = code.replace("import fedhubert_lib, os, torch", "import torch, fedhubert_lib, os")
    child = subprocess.run([sys.executable, "-c", after], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.split()[1] == "1", "torch was first: as the notebooks import it"


def test_each_works_on_all_cores_with_a_thread_on_each(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    together = threading.Barrier(3, timeout=300)
    before = torch.get_num_threads(), [pool["num_threads"] for pool in threadpool_info()]

    def work(item):
        together.wait()  # passes only where three are at work at once
        np.ones((200, 200)) @ np.ones((200, 200))
        return item, torch.get_num_threads(), {pool["num_threads"] for pool in threadpool_info()}

    assert list(threads.each(work, range(6))) == [(item, 1, {1}) for item in range(6)]
    assert (torch.get_num_threads(), [pool["num_threads"] for pool in threadpool_info()]) == before


@pytest.mark.parametrize(("free", "most"), [(350, 3), (1_000, 8), (50, 1)])
def test_each_takes_no_more_threads_than_fit_into_memory(monkeypatch, free, most):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(threads, "free_memory", lambda device: free)
    made = []
    monkeypatch.setattr(
        threads, "ThreadPoolExecutor", lambda n, **more: made.append(n) or ThreadPoolExecutor(n, **more)
    )
    assert list(threads.each(lambda item: item, range(20), memory=100)) == list(range(20))
    assert made == [most]


def test_each_ends_at_the_first_error():
    done = []

    def work(item):
        if item == 1:
            raise ValueError("here")
        done.append(item)

    with pytest.raises(ValueError, match="here"):
        list(threads.each(work, range(10_000)))
    assert len(done) < 10_000


def test_limited_gives_back_what_was():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads.limited(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    with threads.limited(0):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
