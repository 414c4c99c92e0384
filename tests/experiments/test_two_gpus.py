"""Two GPUs against one: what is started, and how it is judged."""

from __future__ import annotations

import pytest

from experiments.models import two_gpus as script


def test_two_gpus_is_judged_strictly(tmp_path):
    assert script.compared([1.0, 2.0], [1.0, 2.00001])["passed"]
    assert not script.compared([1.0, 2.0], [1.0, 2.0001])["passed"]
    with pytest.raises(ValueError, match="logged 2 losses, two 1"):
        script.compared([1.0, 2.0], [1.0])
    good = [{"o": 1e-7, "dq": 1e-6}, {"o": 1e-7, "state": 2e-6}]
    assert script.judged({"float32": good, "float64": [{"o": 1e-14}]})["passed"]
    assert not script.judged({"float32": good, "float64": [{"o": 1e-7}]})["passed"]
    assert not script.judged({"float32": [{"o": float("nan")}], "float64": [{"o": 0.0}]})["passed"]
    words = script.commands(tmp_path, "stdlib", "cuda", smoke=False)
    assert words["ddp"][-2:] == ["--parallel", "ddp"] and words["one"][:3] == ["-m", "dn_lib", "train"]
    assert words["one"][3:-1] == words["fsdp"][len(script.TORCHRUN) + 3 : -3]
