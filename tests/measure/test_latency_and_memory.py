"""Timing and memory with the real clock and process; no assertion depends on this machine's speed."""

import gc
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from rlquant.errors import InputError
from rlquant.measure import available_bytes, measure_latency, peak_rss_bytes, single_thread


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
