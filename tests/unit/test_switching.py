"""The interpreter changes hands sooner while a process serves, and as before afterwards."""

import sys
import threading
import time

import pytest

from lockstep.utils.switching import SWITCH_S, short_switches


def test_interval_is_that_of_before_again():
    before = sys.getswitchinterval()
    with pytest.raises(RuntimeError, match="out"), short_switches():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        raise RuntimeError("out")
    assert sys.getswitchinterval() == before


def test_busy_thread_gives_the_interpreter_up_in_time():
    over = threading.Event()

    def busy() -> None:
        while not over.is_set():
            sum(range(1000))

    def naps() -> float:
        """How long a hundred of no length took: each gives the interpreter up once."""
        began_s = time.perf_counter()
        for _ in range(100):
            time.sleep(0)
        return time.perf_counter() - began_s

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        usual_s = min(naps() for _ in range(3))
        with short_switches():
            short_s = min(naps() for _ in range(3))
    finally:
        over.set()
        thread.join()
    assert short_s < usual_s
