"""Signals that ask a run to end: machines that are taken away send SIGTERM, people press Ctrl-C."""

import signal


class Preemption:
    """SIGTERM and SIGINT ask for the end; a second one ends the process at once."""

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal: signal.Signals | None = None  # Which came.

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._ask) for number in self._SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _) -> None:
        self.signal = signal.Signals(number)
        for each in self._SIGNALS:
            signal.signal(each, signal.SIG_DFL)
