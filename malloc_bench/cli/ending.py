"""A run that is asked to end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any

_LATER = 0.05  # seconds


def end_as_by_ctrl_c(ended: list[int]) -> None:
    """Let SIGTERM (of a scheduler, or `timeout`) end a run as ctrl-C does; the exit code is then 143, as of shells.

    Either may come while Python is in what it calls itself, as beside a fork, and drops what is raised there: then the
    signal comes again.
    """
    before = getattr(sys.unraisablehook, "before", sys.unraisablehook)

    def end(number: int, frame: object) -> None:
        ended.append(number)
        raise KeyboardInterrupt

    def dropped(what: Any) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            return before(what)
        again = threading.Timer(_LATER, os.kill, (os.getpid(), ended[-1] if ended else signal.SIGINT))
        again.daemon = True
        again.start()

    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, end)
        dropped.before = before  # type: ignore[attr-defined]
        sys.unraisablehook = dropped
