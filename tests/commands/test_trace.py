import math
import os

from fastft.commands.trace import Micro, Step, Trace


def test_a_trace_is_the_same_after_saving_and_loading(tmp_path):
    step = Step(1.5, [Micro(1.0, tokens=3), Micro(0.5, tokens=4)], moved=[math.pi, math.inf])
    trace = Trace("stock", parameters=["a", "b"], steps=[step, Step(1.25, [Micro(1.25)])])
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace
    assert os.listdir(tmp_path) == ["trace.json"]
    assert (step.tokens, step.micro_losses) == (7, [1.0, 0.5])
