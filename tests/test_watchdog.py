import collections
import time

from radialnet import watchdog
from radialnet.watchdog import MemoryWatch, Watchdog


def test_a_standstill_is_told_once_and_a_pause_is_none(monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "LEAST_SECONDS", 0.5)

    def a_place_to_be_found_in():
        time.sleep(2.5)

    with Watchdog(2.0) as watched:
        for step in range(1, 8):
            watched.begins(step)
        with watched.paused():
            time.sleep(2.5)
        assert capfd.readouterr().err == "", "an evaluation"
        watched.begins(8)
        a_place_to_be_found_in()
        text = capfd.readouterr().err
        assert text.count("no progress since step 8 began") == 1 and "a_place_to_be_found_in" in text
        watched.begins(9)
        a_place_to_be_found_in()
        assert capfd.readouterr().err.count("no progress since step 9 began") == 1
    with Watchdog(0.0) as watched:
        for step in range(1, 8):
            watched.begins(step)
        time.sleep(2.5)
    assert capfd.readouterr().err == "", "switched off"


def test_memory_that_doubles_is_told_each_time(monkeypatch):
    gigabytes = []

    class Process:
        def memory_info(self):
            return collections.namedtuple("Info", "rss")(gigabytes[-1] * 1e9)

    monkeypatch.setattr(watchdog.psutil, "Process", Process)
    watch, told = MemoryWatch(), []
    for gigabyte in [0.5, *[1.0] * 9, 1.9, 2.1, 2.2, 4.1, 4.3, 4.0, 9.0]:
        gigabytes.append(gigabyte)
        now, text = watch.look()
        assert now == gigabyte
        told.append(text and text.split(":")[1].split()[0])
    assert [text for text in told if text] == ["2.1", "4.3", "9.0"]
