"""Signals that ask a run to end: machines that are taken away send SIGTERM, people press Ctrl-C."""

import signal

import jax

from radialnet.processes import max_over_processes


class Preemption:
    """SIGTERM and SIGINT, to any of the processes, ask for the end; a second one ends its process at once."""

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self._came: signal.Signals | None = None
        self._largest: jax.Array | None = None  # Over all processes, as of the question before.

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._ask) for number in self._SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> signal.Signals | None:
        """The signal that asks for the end, if one came; the same answer in all processes, which must all ask.

        With several processes the answer is that of the question before, so that nobody waits for it: one step late.
        """
        if jax.process_count() == 1:
            return self._came
        before, self._largest = self._largest, max_over_processes(self._came or 0)
        number = 0 if before is None else int(before)
        return signal.Signals(number) if number else None

    def _ask(self, number: int, _) -> None:
        self._came = signal.Signals(number)
        for each in self._SIGNALS:
            signal.signal(each, signal.SIG_DFL)
