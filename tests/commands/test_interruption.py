"""Ctrl-C is not lost where Python swallows exceptions."""

import os
import signal
from types import SimpleNamespace

import pytest

from sqjax.commands import cli
from sqjax.commands.interruption import interrupt

needs_timer = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has none")


def frame(*names):
    """A frame of the first function, which the second called, and so on."""
    found = None
    for name in reversed(names):
        found = SimpleNamespace(f_code=SimpleNamespace(co_name=name), f_back=found)
    return found


def test_it_is_raised_at_once():
    for found in (None, frame("step", "main")):
        with pytest.raises(KeyboardInterrupt):
            interrupt(signal.SIGINT, found)


@needs_timer
@pytest.mark.parametrize("name", ["_xla_gc_callback", "__del__"])
def test_where_it_would_be_swallowed_it_is_tried_again(monkeypatch, name):
    asked = []
    monkeypatch.setattr(signal, "setitimer", lambda *given: asked.append(given))
    interrupt(signal.SIGINT, frame("collect", name, "main"))
    assert asked == [(signal.ITIMER_REAL, 0.05)]


@needs_timer
def test_a_process_is_interrupted_in_the_midst_of_a_destructor(monkeypatch):
    """With the real signals: one Ctrl-C inside `__del__` ends `script` with 130."""

    class Swallowing:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def main():
        Swallowing()
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 130
        return 0

    ends = []
    monkeypatch.setattr(cli, "main", main)
    monkeypatch.setattr(os, "_exit", ends.append)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        cli.script()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ends == [130]
