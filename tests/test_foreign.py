"""Other people's objects: each wrapper is looked through, and each private name that we lean on is
still there."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from support.trainers import tiny_llama
from torch import nn

import fastft
from fastft.foreign import engines, models, private_names
from fastft.loss.lazy.output_head import find_heads

PACKAGE = Path(fastft.__file__).parent


@pytest.mark.parametrize("name", private_names.PRIVATE_NAMES)
def test_the_private_name_is_still_there(name):
    module_name, _, path = name.partition(":")
    library = module_name.partition(".")[0]
    if library not in ("torch", "transformers"):
        # to an older TRL nothing is answered: it has no such head
        pytest.importorskip(library, minversion="1.16" if library == "trl" else None)
    holder = module = importlib.import_module(module_name)
    for part in path.split("."):
        versions = part.split("|")
        found = next(
            (getattr(holder, version) for version in versions if hasattr(holder, version)), holder
        )
        if found is holder:  # what only instances have stands in the text of the class's module
            text = inspect.getsource(inspect.getmodule(holder) or module)
            assert any(part in text for part in versions), (
                f"{name} has gone: {private_names.PRIVATE_NAMES[name]}"
            )
        holder = found


def _names(tree):
    """Every private name that a module defines or sets on itself, and every one that it reads."""
    ours, read = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            ours.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            ours.add(node.id)
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (ours if own and isinstance(node.ctx, ast.Store) else read).add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            read |= {word.value for word in node.args[1:2] if isinstance(word, ast.Constant)}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("fastft"):
            read |= {alias.name for alias in node.names} | set((node.module or "").split("."))
    return ours, read


def test_every_foreign_private_name_of_the_package_is_in_the_list():
    ours, read = {file.stem for file in PACKAGE.rglob("*.py")}, {}
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "foreign":
            continue
        defined, names = _names(ast.parse(file.read_text()))
        ours |= defined
        for name in names:
            if name.startswith("_") and name.isidentifier() and not name.startswith("__"):
                read.setdefault(name, []).append(str(file.relative_to(PACKAGE)))
    listed = {part for name in private_names.PRIVATE_NAMES for part in re.split(r"[:.|]", name)}
    of_python = {"_signal", "_replace", "_asdict", "_fields", "_getframe", "_exit", "_"}
    unknown = {name: files for name, files in read.items() if name not in ours | listed | of_python}
    assert not unknown


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


class DeepSpeedEngine(nn.Module):
    """What the wrapper of that name looks like: the model is `module`, and unknown attributes are
    the model's."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        return (
            getattr(super().__getattr__("module"), name)
            if name != "module"
            else super().__getattr__(name)
        )


def fully_sharded(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))


def with_prompts(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )


DDP = nn.parallel.DistributedDataParallel
WRAPPERS = {
    "bare": [],
    "data_parallel": [nn.DataParallel],
    "ddp": [DDP],
    "compiled": [torch.compile],
    "fsdp1": [fully_sharded],
    "deepspeed": [DeepSpeedEngine],
    "lora": [with_lora],
    "prompt_tuning": [with_prompts],
    "ddp_of_compiled": [torch.compile, DDP],
    "compiled_ddp": [DDP, torch.compile],
    "ddp_of_lora": [with_lora, DDP],
    "compiled_ddp_of_lora": [with_lora, DDP, torch.compile],
    "deepspeed_of_compiled_lora": [with_lora, torch.compile, DeepSpeedEngine],
}


@pytest.mark.filterwarnings("ignore:.*(FSDP|NO_SHARD|device_id).*")
@pytest.mark.parametrize("wrappers", WRAPPERS.values(), ids=WRAPPERS)
def test_the_model_is_found_inside(wrappers, process_group):
    model = wrapped = tiny_llama()
    for wrap in wrappers:
        wrapped = wrap(wrapped)
    assert models.base_model(wrapped) is model
    if wrappers != [fully_sharded]:  # FSDP1 flattens the head's weight with the others
        assert find_heads(wrapped) == [model.lm_head]
    peft = with_lora in wrappers or with_prompts in wrappers
    assert type(models.unwrapped(wrapped)).__name__.startswith("Peft") if peft else True
    assert peft or models.unwrapped(wrapped) is model


@pytest.mark.parametrize(
    "wrappers", [[], [DDP], [torch.compile], [with_lora], [with_lora, DDP, torch.compile]]
)
def test_supervised_only_asks_the_model_inside_its_wrappers(wrappers, process_group):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.modeling_utils, "slice_logits_to_keep"):
        pytest.skip("supervised_only needs transformers >= 5.23")
    model = tiny_llama()
    for wrap in wrappers:
        model = wrap(model)
    fastft.PackingCollator(supervised_only=model)


def test_a_module_that_is_called_module_is_no_wrapper():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    net = Net()
    assert models.unwrapped(net) is net
    assert models.base_model(net) is net


def test_the_optimizer_inside_wrappers():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    (adamw, _) = fastft.adamw([nn.Parameter(torch.zeros(2))])
    assert engines.inner_optimizer(Wrapper(Wrapper(adamw))) is adamw
    assert engines.inner_optimizer(adamw) is adamw
