"""Ctrl-C, also while Python runs code whose exceptions it only prints."""

import signal
from types import FrameType
from typing import Any

#: Functions out of which no exception comes: Python prints it and goes on. The first is jax's, and
#: is called by the garbage collector, so Ctrl-C often falls into it.
_SWALLOWING = {"_xla_gc_callback", "__del__"}
#: The seconds after which it is tried again.
_AGAIN = 0.05


def heed_interruptions() -> None:
    """Lets Ctrl-C end this process wherever it is, unless it was started to ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    signal.signal(signal.SIGINT, interrupt)
    if _has_timer():
        signal.signal(signal.SIGALRM, interrupt)


def interrupt(number: int, frame: FrameType | None) -> Any:
    """The handler: raises KeyboardInterrupt, at once or as soon as it is not swallowed."""
    if _has_timer() and _is_swallowed(frame):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        return
    raise KeyboardInterrupt


def _has_timer() -> bool:
    # Windows has none.
    return hasattr(signal, "setitimer")


def _is_swallowed(frame: FrameType | None) -> bool:
    """Whether an exception in this frame would not come out of all that called it."""
    while frame is not None:
        if frame.f_code.co_name in _SWALLOWING:
            return True
        frame = frame.f_back
    return False
