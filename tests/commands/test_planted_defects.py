"""Every defect that is planted on the fast side is reported, by the name of what differs; and
without one, trainings of the same kind are called equal."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.planted_defects import DEFECTS
from support.recorded_trainings import recorded

from fastft.commands.verdict import judge
from fastft.commands.yardstick import Runs


def lora(model):
    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    """Judges a fast training against its references, which are made once for the same settings."""
    folder = tmp_path_factory.mktemp("trainings")

    @functools.cache
    def reference(variant, settings):
        return recorded(folder, variant, **dict(settings))

    def judged(defect=None, packing=None, **settings):
        fast = recorded(folder, "fast", packing=packing, defect=defect, **settings)
        made = functools.partial(reference, settings=tuple(settings.items()))
        fp32 = made("fp32") if settings.get("dtype") == torch.bfloat16 else None
        return judge(Runs([made("stock")], [fast], made("noise"), fp32))

    return judged


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_reported_by_name(compare, name):
    defect = DEFECTS[name]
    verdict = compare(defect.breaks, **defect.settings)
    assert not verdict.equal
    assert verdict.cause.what == defect.named, verdict.findings


QUICK = {
    "packed batches": {"packing": "collate"},
    "dropout": {"dropout": 0.2},
    "LoRA": {"adapt": lora, "packing": "collate"},
    "bf16 weights": {"dtype": torch.bfloat16, "packing": "collate"},
}
OTHERS = {
    "plain": {},
    "one batch a step": {"gradient_accumulation_steps": 1},
    "accumulation over three batches": {"gradient_accumulation_steps": 3},
    "clipping": {"max_grad_norm": 0.1, "packing": "collate"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "autocast": {"bf16": True, "packing": "collate"},
}


@pytest.mark.parametrize(
    "settings",
    [
        *(pytest.param(settings, id=name) for name, settings in QUICK.items()),
        *(pytest.param(o, id=name, marks=pytest.mark.slow) for name, o in OTHERS.items()),
    ],
)
def test_the_same_training_is_equal(compare, settings):
    verdict = compare(**settings)
    assert verdict.equal, verdict.findings
