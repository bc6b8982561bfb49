"""The comparison with diffusers, without diffusers: what it does with the times and results of two sides."""

import json
import queue
import statistics
import threading

import numpy as np
import pytest
from scripts import script

SIDES = {"ours": 1.0, "theirs": 1.01}  # what they compute


class Threads:
    """In place of processes, which could not be given sides that are no one's."""

    class Process(threading.Thread):
        exitcode = 0

    @staticmethod
    def Pipe():
        there, back = queue.Queue(), queue.Queue()
        return End(there, back), End(back, there)


class End:
    def __init__(self, out, into):
        self.send, self.recv, self.close = out.put, into.get, lambda: None


@pytest.fixture
def benchmark(monkeypatch):
    module = script("experiments/benchmark_vs_diffusers.py")

    def side(which):
        calls = dict.fromkeys(("product", *module.PARTS), lambda: np.full(4, SIDES[which]))
        facts = {"device": "a TPU v5 lite", "dit_operations": 10**12} if which == "ours" else {}
        made = module.Side(calls, lambda result: None, np.asarray, lambda: 2**30, 0.5, {which: "1.2"}, facts)
        return lambda folder, setting: made

    for which in SIDES:
        monkeypatch.setattr(module, which, side(which))
    monkeypatch.setattr(module, "make_folder", lambda folder, setting: None)
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda method: Threads)
    return module


def test_the_numbers_are_those_of_the_table(benchmark, capsys):
    saved = []
    benchmark.compare(benchmark.SETTINGS["gpu"], ("dit", "whole"), 3, lambda results: saved.append(json.dumps(results)))
    table, results = capsys.readouterr().out.splitlines(), json.loads(saved[-1])
    assert len(saved) == 3 + 1 and list(json.loads(saved[0])["parts"]) == ["product"]  # what there is after each row
    assert list(results["parts"]) == ["product", "dit", "whole"]
    for line, part in zip(table[1:], results["parts"].values(), strict=False):
        for which in SIDES:
            assert len(part["times"][which]) == 3 and part[which] == statistics.median(part["times"][which]) > 0
        assert part["ratio"] == part["theirs"] / part["ours"]
        assert part["apart"] == pytest.approx(0.01 / 1.01)
        assert line.startswith(part["name"]) and line.endswith("9.9e-03")
    assert results["versions"] == dict.fromkeys(SIDES, "1.2")
    assert results["load_seconds"] == dict.fromkeys(SIDES, 0.5)
    assert results["peak_bytes"] == dict.fromkeys(SIDES, 2**30)
    assert results["device"] == "a TPU v5 lite" and results["dit_operations"] == 10**12
    assert results["setting"]["layers"] == 30
    assert table[-1] == "peak memory: 1.00 GiB and 1.00 GiB" and "MFU" in table[-3]


@pytest.mark.parametrize(
    "options,message",
    [(["--json", "none/rows.json"], "there is no folder for --json none/rows.json"), ([], "this needs diffusers")],
)
def test_mistakes_are_one_line(benchmark, options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "NEEDED", ("torch_that_is_not_there",))
    assert benchmark.main(["--quick", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmark: error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_call_at_least_is_timed(benchmark, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--repeats", "0"])
    assert ended.value.code == 2 and "--repeats" in capsys.readouterr().err
