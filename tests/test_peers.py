"""Times taken in turns, and turns on a slow machine left out."""

import time

from qdeploy.peers import CALLS_PER_TURN, alternate


def test_contestants_take_turns():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = alternate(runs, rounds=3)
    turn = CALLS_PER_TURN + 1
    assert order == (["a"] * turn + ["b"] * turn) * 3
    assert all(timing.calls == 3 * CALLS_PER_TURN for timing in timings.values())


def test_slow_turns_do_not_count():
    speeds = iter([1.0, 0.5, 0.95, 0.89])  # a, b, a, b
    timings = alternate({"a": lambda: None, "b": lambda: time.sleep(0.001)}, rounds=2, speed=lambda: next(speeds))
    assert timings["a"].calls == 2 * CALLS_PER_TURN
    assert timings["b"].calls == 2 * CALLS_PER_TURN  # none was fast enough: then all count
    assert timings["b"].minimum >= 1.0 > timings["a"].median
    speeds = iter([1.0, 0.5, 0.6, 0.95])
    timings = alternate({"a": lambda: None, "b": lambda: None}, rounds=2, speed=lambda: next(speeds))
    assert (timings["a"].calls, timings["b"].calls) == (CALLS_PER_TURN, CALLS_PER_TURN)
