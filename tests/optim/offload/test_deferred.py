"""The deferred step: whoever reads a weight, by whatever way, finds it updated, once."""

import contextlib
import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from support.scheduler import Race, Scheduler
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastft.foreign import awaited
from fastft.optim.adamw import AdamW
from fastft.optim.offload import deferred, gradients, pieces
from fastft.optim.offload.deferred import Followed, PendingStep


class Adder:
    """A part whose update adds 1, and which counts what it is asked to do."""

    device = torch.device("cpu")

    def __init__(self, params):
        self.params, self.ran = params, []
        self.finished = self.settled = 0

    def run(self, places):
        self.ran += places
        for place in places:
            self.params[place].data.add_(1)
        return deferred.devices.of(self.device).current().record()

    def finish(self):
        self.finished += 1

    def settle(self):
        self.settled += 1


def begun(model, params=None, followed=None):
    """A pending step over the parameters of `model`; its part, and the values to come."""
    params = list(model.parameters()) if params is None else params
    part, after = Adder(params), [param.detach() + 1 for param in params]
    followed = followed or Followed(model)
    return PendingStep([(part, params)], followed.together()), part, after


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def compiled(function, **options):
    return torch.compile(function, backend="eager", **options)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))[0].weight


def _saved(model):
    file = io.BytesIO()
    torch.save(model[0].weight, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def _functional(model):
    """A product with unit rows, by a module that gets the weights from outside."""
    named = dict(model[0].named_parameters())
    return torch.func.functional_call(model[0], {**named, "bias": torch.zeros(5)}, torch.eye(3)).T


def _gradient(model):
    """The weight as the gradient of a product with it."""
    return torch.func.grad(lambda x: F.linear(x, model[0].weight).sum(0)[0])(torch.ones(3))


READERS = {
    "its module's forward": lambda m: m[0](torch.eye(3)).T - m[0].bias.detach()[:, None],
    "another module's forward": lambda m: F.linear(torch.eye(3), m[0].weight).T,
    "clone": lambda m: m[0].weight.clone(),
    "detach": lambda m: m[0].weight.detach(),
    "data": lambda m: m[0].weight.data,
    "numpy": lambda m: torch.from_numpy(m[0].weight.numpy(force=True).copy()),
    "tolist": lambda m: torch.tensor(m[0].weight.tolist()),
    "an item": lambda m: torch.stack([m[0].weight[i] for i in range(5)]),
    "a list of tensors": lambda m: torch.cat([m[0].weight, m[2].weight.T])[:5],
    "foreach": lambda m: torch._foreach_add([m[2].weight, m[0].weight], 0.0)[1],
    "an operator": lambda m: torch.ops.aten.mul.Tensor(m[0].weight, 1.0),
    "out=": lambda m: _without_graph(torch.add, m[0].weight, 0.0, out=torch.empty(5, 3)),
    "an autograd function": lambda m: _Same.apply(m[0].weight),
    "state_dict": lambda m: m.state_dict()["0.weight"],
    "state_dict(keep_vars=True)": lambda m: m.state_dict(keep_vars=True)["0.weight"] + 0,
    "named_parameters": lambda m: dict(m.named_parameters())["0.weight"] * 1,
    "deepcopy": lambda m: copy.deepcopy(m)[0].weight,
    "pickle": _pickled,
    "torch.save": _saved,
    "functional_call": _functional,
    "torch.func.vmap": lambda m: torch.func.vmap(lambda row: row * 1)(m[0].weight),
    "torch.compile": lambda m: compiled(lambda w: w * 1.0)(m[0].weight),
    "memory": lambda m: _of_memory(m[0].weight.data_ptr()),
}


def _without_graph(function, *args, **kwargs):
    with torch.no_grad():
        return function(*args, **kwargs)


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight * 1

    @staticmethod
    def backward(ctx, grad):
        return grad


def _of_memory(address):
    import ctypes

    return torch.tensor(list((ctypes.c_float * 15).from_address(address))).view(5, 3)


@pytest.mark.parametrize("reader", READERS)
def test_who_reads_a_weight_finds_it_updated(reader):
    model = net()
    if reader == "torch.compile":
        READERS[reader](model)  # its guards know the weight from before
    pending, part, after = begun(model)
    assert part.ran == []
    read = READERS[reader](model)
    torch.testing.assert_close(read.detach(), after[0], rtol=1e-6, atol=1e-6)
    pending.flush()
    assert sorted(part.ran) == [0, 1, 2, 3]
    assert part.finished == 1
    for param, value in zip(model.parameters(), after, strict=True):
        assert type(param) is nn.Parameter
        assert torch.equal(param, value)
        assert not any("fastft" in name for name in vars(param))


class Head(nn.Module):
    """Reads what is not its own: weights that are tied, in a list, or of a module never called."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.embed, self.uncalled = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embed.weight
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.parametrised = parametrize.register_parametrization(
            nn.Linear(4, 4), "weight", Double()
        )
        self.kept = [self.uncalled.weight]  # the same parameter, by another name

    def forward(self, ids):
        hidden = self.embed(ids)
        if self.how == "read by the parent":
            hidden = F.linear(hidden, self.uncalled.weight, self.uncalled.bias)
        if self.how == "kept in a list":
            hidden = hidden @ self.kept[0]
        if self.how == "a ParameterList":
            hidden = hidden @ self.listed[0] @ self.listed[1]
        if self.how == "an LSTM":
            hidden = self.lstm(hidden)[0]
        if self.how == "attention":
            hidden = self.attention(hidden, hidden, hidden)[0]
        if self.how == "a parametrisation":
            hidden = self.parametrised(hidden)
        if self.how == "another submodule's method":
            hidden = nn.Linear.forward(self.uncalled, hidden)
        return self.tied(hidden)


class Double(nn.Module):
    def forward(self, weight):
        return weight * 2


WAYS_OF_READING = [
    "tied",
    "read by the parent",
    "kept in a list",
    "a ParameterList",
    "an LSTM",
    "attention",
    "a parametrisation",
    "another submodule's method",
]


@pytest.mark.parametrize("around", ["plain", "evaluation", "inference_mode", "checkpoint"])
@pytest.mark.parametrize("how", WAYS_OF_READING)
def test_a_forward_computes_with_updated_weights_whatever_path_it_takes(how, around):
    torch.manual_seed(0)
    model = Head(how)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for param in reference.parameters():
            param.add_(1)

    def run(model):
        if around == "checkpoint":
            return checkpoint(model, ids, use_reentrant=False)
        with torch.inference_mode(around == "inference_mode"):
            return model(ids)

    pending, part, _ = begun(model)
    if around == "evaluation":
        model.eval(), reference.eval()
    result, expected = run(model), run(reference)
    assert torch.equal(result, expected)
    asked = len(part.ran)
    assert 0 < asked < len(part.params)  # the other weights of the model wait
    if around in ("plain", "checkpoint"):
        result.sum().backward(), expected.sum().backward()
        for param, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert (param.grad is None) == (other.grad is None)
            assert other.grad is None or torch.equal(param.grad, other.grad)
    pending.flush()
    assert sorted(part.ran) == list(range(len(part.params)))


def test_another_path_than_the_last_forwards():
    """Experts of which each batch takes others, layers that are dropped."""
    experts = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
    reference = copy.deepcopy(experts)
    followed = Followed(experts)
    x = torch.ones(1, 3)
    for path in [(0, 1), (2, 3), (3, 1), (), (0, 1, 2, 3)]:
        pending, part, _ = begun(experts, followed=followed)
        with torch.no_grad():
            for param in reference.parameters():
                param.add_(1)
        for expert in path:
            assert torch.equal(experts[expert](x), reference[expert](x))
        assert len(part.ran) == 2 * len(path)
        pending.flush()
        followed.learn(pending.asked)
        assert all(map(torch.equal, experts.parameters(), reference.parameters()))


def test_weights_are_prefetched_in_the_order_of_the_last_forward(monkeypatch):
    layers = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(4)])
    followed, x = Followed(layers), torch.ones(1, 3)
    monkeypatch.setattr(deferred.devices.Host, "separate", True)
    monkeypatch.setattr(deferred, "AHEAD", 9)  # a layer
    pending, part, _ = begun(layers, followed=followed)
    assert part.ran == [0]  # before anybody has asked
    for at in (2, 0, 3, 1):
        layers[at](x)
    pending.flush()
    followed.learn(pending.asked)
    pending, part, _ = begun(layers, followed=followed)
    assert part.ran == [2]
    layers[2](x)
    assert part.ran == [2, 0]
    layers[3](x)  # another path than the last time
    assert part.ran == [2, 0, 3, 1]
    pending.flush()
    assert sorted(part.ran) == [0, 1, 2, 3] and part.finished == 1


def test_what_is_no_parameter_that_torch_watches_is_updated_at_once():
    class Sub(nn.Parameter):
        pass

    model = nn.Module()
    model.plain, model.shared = nn.Linear(2, 2), nn.Linear(2, 2)
    model.viewed, model.sub = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model.buffer = nn.Module()
    model.buffer.register_buffer("alias", model.shared.weight.data[:1])
    model.transposed = model.viewed.weight.detach().t()  # an attribute
    model.sub.weight = Sub(torch.ones(2, 2))
    model.script = torch.jit.script(nn.Linear(2, 2))
    alone = nn.Parameter(torch.ones(3))
    params = [*model.parameters(), alone]
    pending, part, _ = begun(model, params)
    names = [name for name, _ in model.named_parameters()] + ["alone"]
    waiting = {name for name, p in zip(names, params, strict=True) if awaited.is_awaited(p)}
    assert waiting == {"plain.weight", "plain.bias", "shared.bias"}
    assert len(part.ran) == len(params) - 3
    pending.flush()
    assert part.finished == 1


def test_zero_grad_leaves_a_weight_waiting():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    model(torch.ones(2, 3)).sum().backward()
    pending, part, _ = begun(model)
    model.zero_grad()
    optimizer.zero_grad()
    weight = model[0].weight
    assert weight.grad is None
    assert isinstance(weight, nn.Parameter) and weight in set(model.parameters())
    assert part.ran == []
    pending.flush()


def test_writing_to_a_weight_comes_after_its_update():
    model = net()
    pending = begun(model)[0]
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].bias.data = torch.zeros(3)
        model.load_state_dict({**model.state_dict(), "2.weight": torch.zeros(3, 5)})
    pending.flush()
    assert not model[0].weight.any() and not model[2].weight.any() and not model[2].bias.any()


def test_another_dtype_comes_after_the_update():
    model = net()
    after = begun(model)[2]
    model.double()
    assert all(map(torch.equal, model.parameters(), (value.double() for value in after)))


def test_copies_of_the_model_ask_for_nothing_of_the_original():
    model = net()
    followed = Followed(model)
    copied = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    pending, part, _ = begun(model, followed=followed)
    copied(torch.ones(1, 3)), loaded(torch.ones(1, 3))
    assert part.ran == []
    pending.flush()


def test_selective_checkpointing_does_not_count_what_an_update_computes():
    """Its modes record every operation of a forward, and expect the same ones once more."""
    model = net()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for param in reference.parameters():
            param.add_(1)

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE

    def run(model):
        x = torch.ones(2, 3, requires_grad=True)
        contexts = lambda: create_selective_checkpoint_contexts(policy, True)  # noqa: E731
        checkpoint(model, x, use_reentrant=False, context_fn=contexts).sum().backward()
        return [param.grad for param in model.parameters()]

    part = begun(model)[1]
    assert all(map(torch.equal, run(model), run(reference)))
    assert len(part.ran) == len(part.params)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_reads_the_weights_that_the_forward_read(reentrant):
    model = net()
    reference = copy.deepcopy(model)
    for step in range(2):
        part = begun(model)[1]
        with torch.no_grad():
            for param in reference.parameters():
                param.add_(1)
        x = torch.full((2, 3), step + 1.0, requires_grad=True)
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        reference(x).sum().backward()
        for param, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(param.grad, other.grad)
        assert len(part.ran) == len(part.params)


def test_an_exception_in_a_forward_loses_no_update():
    class Breaks(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(3, 3), Breaks(), nn.Linear(3, 3))
    pending, part, after = begun(model)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 3))
    assert part.ran == [0, 1]
    assert torch.equal(model[2].weight, after[2])
    pending.flush()
    assert all(map(torch.equal, model.parameters(), after))


def test_an_update_that_raises_can_be_asked_for_again():
    model = net()
    pending, part, after = begun(model)
    run, part.run = part.run, None
    with pytest.raises(TypeError):
        model[0](torch.ones(1, 3))
    part.run = run
    pending.flush()
    assert all(map(torch.equal, model.parameters(), after))


def test_a_step_that_nobody_holds_any_more_is_not_lost():
    model = net()
    pending, part, after = begun(model)
    gone = weakref.ref(pending)
    del pending
    gc.collect()
    assert torch.equal(model[0].weight, after[0])
    model(torch.ones(1, 3))
    assert len(part.ran) == len(part.params)
    gc.collect()
    assert gone() is None and part.settled == 1


@pytest.mark.parametrize("what", ["the model", "a layer", "in its place", "before it is followed"])
def test_under_torch_compile_nothing_waits_from_then_on_and_a_warning_says_so(what):
    model, x = net(), torch.ones(1, 3)
    if what == "before it is followed":
        model.compile(backend="eager")
    followed = Followed(model)
    call = model
    if what == "the model":
        call = torch.compile(model, backend="eager")
    elif what == "a layer":
        model[0] = torch.compile(model[0], backend="eager")
    elif what == "in its place":
        model.compile(backend="eager")
    reference = net()
    for step in range(3):
        assert torch.equal(call(x), reference(x))
        if step == 0:
            with pytest.warns(UserWarning, match="torch.compile compiles the model"):
                part = begun(model, followed=followed)[1]
        else:
            part = begun(model, followed=followed)[1]
        assert sorted(part.ran) == [0, 1, 2, 3]
        with torch.no_grad():
            for param in reference.parameters():
                param.add_(1)


def test_compiling_in_the_middle_of_a_training_reads_updated_weights():
    model, x = net(), torch.ones(1, 3)
    reference, followed = net(), Followed(model)
    with torch.no_grad():
        for param in reference.parameters():
            param.add_(1)
    begun(model, followed=followed)
    assert torch.equal(torch.compile(model, backend="eager")(x), reference(x))
    with pytest.warns(UserWarning, match="torch.compile"):
        begun(model, followed=followed)


def test_hooks_go_and_nothing_stays_on_the_model():
    model = net()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    followed = Followed(model)
    assert any(module._forward_pre_hooks for module in model.modules())
    followed.remove()
    followed.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert before.keys() == {name for name, _ in model.named_modules()}


def test_without_its_hook_a_kernel_that_torch_does_not_know_reads_the_old_weight():
    """What the hook is for, and the only thing: torch itself asks for all that it is given."""

    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5, 3))
            self.address = self.weight.data_ptr()

        def forward(self):
            return _of_memory(self.address)

    for hooked in (True, False):
        model = Kernel()
        followed = Followed(model)
        if not hooked:
            followed.remove()
        pending, _, after = begun(model, followed=followed)
        assert torch.equal(model(), after[0]) is hooked
        pending.flush()


def trained(tier, accumulation=1, follows=True):
    """Weights and losses of a few steps of a tied network, whose last layer is used twice."""
    torch.manual_seed(0)
    embed, layers = nn.Embedding(11, 8), [nn.Linear(8, 8) for _ in range(3)]
    model = nn.ModuleList([embed, *layers]).bfloat16()
    optimizer = AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5, offload=tier)
    if tier == "overlap" and follows:
        optimizer.follow(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    losses = []
    for step in range(4):
        for part in range(accumulation):
            x = embed(torch.tensor([[step, 3, part, 7]]))
            for layer in layers[: 2 + step % 2]:  # the last one at every other step
                x = layer(x).tanh()
            loss = F.linear(x, embed.weight).float().logsumexp(-1).square().mean()
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        schedule.step()
        model.zero_grad()
    states = optimizer.state_dict()["state"]
    moments = [entries["exp_avg"] for entries in states.values()]
    return [p.detach().clone() for p in model.parameters()] + losses + moments


@pytest.mark.parametrize("ahead", [0, 100, 2**29])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("order", ["late", "early", 1, 2])
def test_in_whatever_order_queues_work(order, accumulation, ahead, monkeypatch):
    expected = trained(None, accumulation)
    monkeypatch.setattr(deferred, "AHEAD", ahead)
    monkeypatch.setattr(pieces, "BUFFER", 4096)
    with Scheduler(order).installed():
        results = trained("overlap", accumulation)
    assert all(map(torch.equal, results, expected))


def test_without_its_wait_a_weight_is_read_too_early():
    lines, first = inspect.getsourcelines(deferred._Group.wait)
    with (
        pytest.raises(Race, match="writes bytes"),
        Scheduler(without=("deferred.py", range(first, first + len(lines)))).installed(),
    ):
        trained("overlap")


def _halve(param):
    with torch.no_grad():
        param.mul_(0.5)


def _replace(param):
    param.data = param.data * 0.5


def _lay_otherwise(param):
    param.data = param.data.t().contiguous().t()


def _to_float32(param):
    param.data = param.data.float()


def rewritten(tier, write):
    """Weights of a training in whose middle somebody writes to all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 9, bias=False), nn.Linear(9, 5, bias=False)).bfloat16()
    optimizer = AdamW(model.parameters(), lr=1e-2, offload=tier)
    if tier == "overlap":
        optimizer.follow(model)
    for step in range(4):
        x = torch.full((3, 16), 0.1 * step + 0.1, dtype=model[0].weight.dtype)
        model(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            for param in model.parameters():
                write(param)
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.filterwarnings("ignore:2 bf16 weights were written by somebody else")
@pytest.mark.parametrize("tier", ["states", "gradients", "overlap"])
@pytest.mark.parametrize("write", [_halve, _replace, _lay_otherwise, _to_float32])
def test_weights_written_between_two_steps_train_on_as_without_offload(write, tier):
    assert all(map(torch.equal, rewritten(tier, write), rewritten(None, write)))


class Shift(nn.Module):
    """No graph keeps its weights, so that one from before a step gives gradients after it."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x + self.bias


def passed_on(tier, zeroed):
    """The weight after a backward pass of the same graph before and behind a step."""
    model = Shift()
    optimizer = AdamW(model.parameters(), lr=0.1, max_grad_norm=9.0, offload=tier)
    if tier == "overlap":
        optimizer.follow(model)
    for step in range(3):
        result = model(torch.full((2, 3), step + 1.0)).square().sum()
        result.backward(retain_graph=True)
        optimizer.step()
        if zeroed:
            model.zero_grad()
        (3 * result).backward()
        optimizer.step()
        model.zero_grad()
    return model.bias.detach().clone()


@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize("where", ["on a CPU", "late", "early"])
def test_a_gradient_that_comes_before_the_update_waits_for_its_place(where, zeroed):
    expected = passed_on(None, zeroed)
    with contextlib.nullcontext() if where == "on a CPU" else Scheduler(where).installed():
        result = passed_on("overlap", zeroed)
    assert torch.equal(result, expected)


def test_without_waiting_for_its_place_it_would_be_lost(monkeypatch):
    expected = passed_on(None, False)
    monkeypatch.setattr(gradients.Slot, "make_room", lambda self: None)
    assert not torch.equal(passed_on("overlap", False), expected)
