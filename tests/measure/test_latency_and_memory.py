"""Timing and memory with the real clock and process; no assertion depends on this machine's speed."""

import gc
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlquant.errors import InputError
from rlquant.measure import (
    MachineState,
    available_bytes,
    measure_allocation,
    measure_latency,
    peak_rss_bytes,
    pinned,
    rss_bytes,
    single_thread,
    watched,
)


def test_every_observation_is_used_in_turn_and_every_call_counted():
    seen = []
    latency = measure_latency(seen.append, np.arange(3), calls=7, warmup=2, simulated=False)
    assert seen == [0, 1, 0, 1, 2, 0, 1, 2, 0]
    assert (latency.calls, latency.simulated) == (7, False)


def test_latency_is_in_microseconds_and_includes_the_whole_call():
    latency = measure_latency(lambda _: time.sleep(0.002), [0], calls=5, warmup=0, simulated=True)
    assert latency.p50 >= 2000  # sleep never returns early
    assert latency.p50 <= latency.p90 <= latency.p99 <= latency.p999 <= latency.max


def test_garbage_collection_is_off_only_while_the_clock_runs():
    states = []
    measure_latency(lambda _: states.append(gc.isenabled()), [0], calls=3, warmup=1, simulated=True)
    assert states == [False] * 4
    assert gc.isenabled()


def test_garbage_collection_is_restored_after_an_error():
    def fail(_):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        measure_latency(fail, [0], simulated=True)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("observations", "options"),
    [([], {}), (np.empty((0, 4)), {}), ([0], {"calls": 0}), ([0], {"warmup": -1})],
)
def test_bad_input_is_named(observations, options):
    with pytest.raises(InputError, match="latency needs"):
        measure_latency(abs, observations, simulated=True, **options)


def test_single_thread_restores_the_thread_count_even_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = []

        def record_and_fail():
            threads.append(torch.get_num_threads())
            raise KeyError

        with pytest.raises(KeyError), single_thread():
            record_and_fail()
        assert threads == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_peak_memory_counts_bytes_of_this_process():
    """A fresh process that fills 200 MB peaks about 200 MB higher than one that fills none."""
    program = (
        "import numpy, sys; from rlquant.measure.memory import peak_rss_bytes; "
        "numpy.ones(int(sys.argv[1]), dtype=numpy.uint8).sum(); print(peak_rss_bytes())"
    )
    peaks = [
        int(subprocess.run([sys.executable, "-c", program, size], capture_output=True, check=True).stdout)
        for size in ("1", "200000000")
    ]
    assert 195e6 < peaks[1] - peaks[0] < 260e6


def test_memory_readings_are_plausible():
    assert 10e6 < peak_rss_bytes() < 1e12
    assert 1e6 < available_bytes() < 1e14


def test_a_call_that_allocates_is_told_from_one_that_does_not():
    action, kept = np.zeros(3, np.float32), []

    def lean(_):
        return np.empty(3, np.float32)

    def wasteful(_):
        return np.ones(50_000, np.uint8)[:3].astype(np.float32)

    def hoarding(_):
        kept.append(object())
        return action

    assert measure_allocation(lean, [0], calls=100).only_action
    spent = measure_allocation(wasteful, [0, 1], calls=100)
    assert 50_000 <= spent.bytes_per_call < 60_000
    assert not spent.only_action
    assert spent.blocks_kept < 50 <= 100 <= measure_allocation(hoarding, [0], calls=100).blocks_kept


def test_memory_that_is_never_given_back_shows_in_the_growth():
    gc.collect()  # what earlier tests left would be given back meanwhile
    kept = []

    def leaking(_):
        kept.append(np.ones(40_000_000, np.uint8))  # too large for memory that the process holds already
        return 0

    growth = measure_allocation(leaking, [0], calls=3).rss_growth
    assert growth is None or 110e6 < growth < 200e6
    assert rss_bytes() is None or 10e6 < rss_bytes() <= peak_rss_bytes()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a thread")
def test_a_pinned_thread_is_let_go_even_after_an_error():
    before = os.sched_getaffinity(0)
    seen = []

    def record_and_fail():
        seen.append(os.sched_getaffinity(0))
        raise KeyError

    with pytest.raises(KeyError), pinned() as core:
        record_and_fail()
    assert seen == [{core}]
    assert core in before
    assert os.sched_getaffinity(0) == before
    with pinned(False) as nowhere:
        assert (nowhere, os.sched_getaffinity(0)) == (None, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what others do")
def test_what_other_processes_do_meanwhile_is_seen():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        with watched() as machine:
            time.sleep(1)
        other.kill()
    assert machine.others > 0.2
    assert any("the machine was busy" in remark for remark in machine.remarks())
    assert machine.load[0] >= 0
    assert machine.core is None


def test_a_quiet_machine_needs_no_remark():
    quiet = MachineState(cores=4, core=3, load=(0.2, 0.3), governor="performance", others=0.05, stolen=0.0)
    assert quiet.remarks() == []
    (saving,) = replace(quiet, governor="powersave").remarks()
    assert "powersave" in saving
    (loaded,) = replace(quiet, others=None, load=(3.0, 3.0)).remarks()  # where only the load is known
    assert "a load of 3.0 on 4 cores" in loaded
