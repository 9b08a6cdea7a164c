from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.trainers import tiny_llama

import fastft
from fastft.optim.adamw import AdamW

transformers = pytest.importorskip("transformers")


class Tiny(torch.nn.Module):
    """Tied weights, a frozen part, one fp32 parameter, and buffers of both kinds."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(13, 8)
        self.middle = torch.nn.Linear(8, 8)
        self.frozen = torch.nn.Linear(8, 8).requires_grad_(False)
        self.head = torch.nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(7))
        self.to(torch.bfloat16).to(dtype)
        self.gain = torch.nn.Parameter(torch.ones(()))

    def loss(self, tokens):
        hidden_states = self.embed(tokens)
        hidden_states = self.frozen(self.middle(hidden_states).tanh())
        logits = self.head(hidden_states) * self.gain
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def gradients_of(model, tokens):
    model.loss(tokens).backward()
    return [param.grad for param in model.parameters() if param.requires_grad]


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 13, (4, 6), generator=generator) for _ in range(count)]


def trainable(model):
    return [param for param in model.parameters() if param.requires_grad]


def train(model, optimizer, steps):
    for tokens in steps:
        optimizer.zero_grad()
        model.loss(tokens).backward()
        optimizer.step()


def trained(steps=5):
    model = Tiny()
    optimizer = AdamW(trainable(model), lr=1e-3)
    train(model, optimizer, batches(steps))
    return model, optimizer


def weights_in(folder):
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def test_the_file_holds_what_fp32_training_would_have(tmp_path):
    model, wide = Tiny(), Tiny(torch.float32)
    ours, fp32 = AdamW(trainable(model), lr=1e-3), AdamW(trainable(wide), lr=1e-3)
    for tokens in batches(20):
        for param, twin, grad in zip(
            trainable(model), trainable(wide), gradients_of(model, tokens), strict=True
        ):
            param.grad, twin.grad = grad, grad.float()
        for optimizer in (ours, fp32):
            optimizer.step()
            optimizer.zero_grad()
    fastft.save_fp32(model, ours, tmp_path)
    # which is tied
    expected = {name: value for name, value in wide.state_dict().items() if name != "head.weight"}
    assert_same_bits(weights_in(tmp_path), expected)


@pytest.mark.parametrize("order", ["states first", "weights first", "states without remainders"])
@pytest.mark.parametrize("max_shard_size", ["5GB", 300])
def test_continuing_equals_never_having_stopped(order, max_shard_size, tmp_path):
    model, optimizer = trained()
    fastft.save_fp32(model, optimizer, tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == 300)
    saved = copy.deepcopy(optimizer.state_dict())
    again = Tiny()
    resumed = AdamW(trainable(again), lr=1e-3)
    if order == "weights first":
        fastft.load_fp32(again, resumed, tmp_path)
    if order == "states without remainders":
        for state in saved["state"].values():
            state.pop("remainder", None)
    resumed.load_state_dict(saved)
    if order != "weights first":
        fastft.load_fp32(again, resumed, tmp_path)
    train(model, optimizer, batches(9)[5:])
    train(again, resumed, batches(9)[5:])
    assert_same_bits(again.state_dict(), model.state_dict())
    for mine, whole in zip(resumed.state.values(), optimizer.state.values(), strict=True):
        assert_same_bits(mine, whole)


def test_a_fresh_optimizer_takes_the_remainders(tmp_path):
    model, optimizer = trained()
    fastft.save_fp32(model, optimizer, tmp_path / "new" / "folder")
    again = Tiny()
    resumed = AdamW(trainable(again))
    fastft.load_fp32(again, resumed, tmp_path / "new" / "folder")
    assert_same_bits(again.state_dict(), model.state_dict())
    for mine, whole in zip(trainable(again), trainable(model), strict=True):
        if mine.dtype == torch.bfloat16:
            assert torch.equal(
                resumed.state[mine]["remainder"], optimizer.state[whole]["remainder"]
            )
            assert resumed.state[mine]["step"] == 0 and not resumed.state[mine]["exp_avg"].any()
    train(again, resumed, batches(1))


@pytest.mark.parametrize("rounding", ["kahan", "stochastic", "nearest"])
def test_other_roundings(rounding, tmp_path):
    model = Tiny()
    optimizer = AdamW(trainable(model)[1:], rounding=rounding)  # the first one is fp32
    train(model, optimizer, batches(3))
    fastft.save_fp32(model, optimizer, tmp_path)
    saved = weights_in(tmp_path)
    for name, param in model.named_parameters():
        kept = optimizer.state[param].get("kahan") if param in optimizer.state else None
        assert torch.equal(
            saved[name], param.float() if kept is None else param.float() + kept.float()
        )
    again = Tiny()
    resumed = AdamW(trainable(again)[1:], rounding=rounding)
    fastft.load_fp32(again, resumed, tmp_path)
    # where a compensation of half a last place may change sides; the sum is the same
    if rounding != "kahan":
        assert_same_bits(again.state_dict(), model.state_dict())
    fastft.save_fp32(again, resumed, tmp_path / "again")
    assert_same_bits(weights_in(tmp_path / "again"), saved)


def test_an_fp32_model_takes_the_masters(tmp_path):
    model, optimizer = trained()
    fastft.save_fp32(model, optimizer, tmp_path)
    wide = Tiny(torch.float32)
    fastft.load_fp32(wide, AdamW(trainable(wide)), tmp_path)
    saved = weights_in(tmp_path)
    assert_same_bits(
        {name: value for name, value in wide.state_dict().items() if name in saved}, saved
    )
    assert not torch.equal(wide.embed.weight, model.embed.weight)


@pytest.mark.parametrize("rounding", ["exact", "kahan", "stochastic"])
def test_weights_that_are_no_numbers_come_back_to_the_bit(rounding, tmp_path):
    """Signs and payloads of NaN, which rounding to bf16 has one of."""
    high = torch.tensor([0x7F80, -0x80, 0x7FC0, 0x7F81, -0x7F, -0x3F], dtype=torch.int16)
    if rounding == "kahan":
        quiet = high.view(torch.bfloat16).isnan().short() * 0x40  # as its sum makes them
        high = high | quiet
    for dtype in (torch.bfloat16, torch.float32):
        model = torch.nn.Linear(6, 2, bias=False).to(dtype)
        optimizer = AdamW(model.parameters(), rounding=rounding)
        model.weight.detach()[0] = high.view(torch.bfloat16)
        fastft.save_fp32(model, optimizer, tmp_path)
        again = torch.nn.Linear(6, 2, bias=False).to(dtype)
        resumed = AdamW(again.parameters(), rounding=rounding)
        fastft.load_fp32(again, resumed, tmp_path)
        assert torch.equal(bits_of(again.weight), bits_of(model.weight))
        fastft.save_fp32(again, resumed, tmp_path / "again")
        assert torch.equal(
            *(bits_of(weights_in(of)["weight"]) for of in (tmp_path, tmp_path / "again"))
        )


@pytest.mark.parametrize("rounding", ["exact", "kahan"])
def test_an_inf_written_to_one_weight_is_saved_as_inf(rounding, tmp_path):
    """Where nobody has noticed the write: low bits of before lie beside it."""
    torch.manual_seed(0)
    model = torch.nn.Linear(73, 70, bias=False, dtype=torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=1e-3, rounding=rounding)
    for _ in range(2):
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
    model.weight.detach()[10, :9] = -torch.inf  # of which no sample is taken
    fastft.save_fp32(model, optimizer, tmp_path)
    saved = weights_in(tmp_path)["weight"]
    assert saved.isneginf().sum() == 9 and not saved.isnan().any()


def bits_of(tensor):
    return tensor.detach().view(torch.int16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_fp32_nan_that_bf16_has_not_stays_nan(dtype, tmp_path):
    wide, narrow = (torch.nn.Linear(2, 1, bias=False).to(of) for of in (torch.float32, dtype))
    optimizer = AdamW(wide.parameters())
    wide.weight.detach().view(torch.int32)[0] = torch.tensor([0x7F800001, 0x7FFFFFFF])
    fastft.save_fp32(wide, optimizer, tmp_path)
    fastft.load_fp32(narrow, AdamW(narrow.parameters()), tmp_path)
    assert narrow.weight.isnan().all()


def test_shards_are_small_and_replaced(tmp_path):
    model, optimizer = trained()
    (tmp_path / "notes.txt").write_text("kept")
    fastft.save_fp32(model, optimizer, tmp_path, max_shard_size=300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        file.name for file in tmp_path.glob("*.safetensors")
    }
    sizes = [
        sum(t.nbytes for t in load_file(file).values()) for file in tmp_path.glob("*.safetensors")
    ]
    assert len(sizes) > 1 and sum(sizes) == index["metadata"]["total_size"]
    assert sum(size > 300 for size in sizes) == 1  # the embedding alone is larger
    fastft.save_fp32(model, optimizer, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "notes.txt"]


@pytest.mark.parametrize("tie", [True, False])
def test_from_pretrained_reads_it(tie, tmp_path):
    model = tiny_llama(32, tie_word_embeddings=tie).bfloat16()
    optimizer, _ = fastft.adamw(model, lr=1e-3)
    tokens = torch.arange(24).view(2, 12)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    names = weights_in(tmp_path).keys()
    # through the wrapper, over the bf16 file
    fastft.save_fp32(torch.compile(model), optimizer, tmp_path)
    saved = weights_in(tmp_path)
    assert saved.keys() == names and {value.dtype for value in saved.values()} == {torch.float32}
    wide = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_bits(
        {name: value for name, value in wide.state_dict().items() if name in saved}, saved
    )
    narrow = {name: value.bfloat16() for name, value in saved.items()}
    ties = {name: (value.view(torch.int32) & 0xFFFF) == 0x8000 for name, value in saved.items()}
    for name, value in model.state_dict().items():
        if name in saved:
            assert torch.equal(value[~ties[name]], narrow[name][~ties[name]])


def test_through_accelerates_wrapper(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, optimizer = trained()
    fastft.save_fp32(model, optimizer, tmp_path / "plain")
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    fastft.save_fp32(model, prepared, tmp_path / "wrapped")
    assert_same_bits(weights_in(tmp_path / "wrapped"), weights_in(tmp_path / "plain"))
    fastft.load_fp32(model, prepared, tmp_path / "plain")


def test_bad_input(tmp_path):
    model, optimizer = trained(1)
    with pytest.raises(TypeError, match=r"fastft's AdamW.*got SGD"):
        fastft.save_fp32(model, torch.optim.SGD(trainable(model)), tmp_path)
    for call in (fastft.save_fp32, fastft.load_fp32):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got NoneType"):
            call(None, optimizer, tmp_path)
        with pytest.raises(TypeError, match=r"fastft's AdamW.*got NoneType"):
            call(model, None, tmp_path)
    for size in ("x", 0, -1, "0GB", "-1GB", "5", 1.5, True, None):
        with pytest.raises(ValueError, match=r"max_shard_size must be an integer in .* bytes, or"):
            fastft.save_fp32(model, optimizer, tmp_path / "not made", max_shard_size=size)
    assert not (tmp_path / "not made").exists()
    with pytest.raises(ValueError, match="no parameter of model"):
        fastft.save_fp32(Tiny(), optimizer, tmp_path)
    with pytest.raises(ValueError, match="no parameter of model"):
        fastft.load_fp32(Tiny(), optimizer, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        fastft.load_fp32(model, optimizer, tmp_path)
    fastft.save_fp32(model, optimizer, tmp_path)
    before, good = copy.deepcopy(model.state_dict()), load_file(tmp_path / "model.safetensors")
    bad = {
        r"missing \['gain'\], unknown \[\]": {
            name: value for name, value in good.items() if name != "gain"
        },
        r"missing \[\], unknown \['extra'\]": {**good, "extra": torch.ones(1)},
        r"middle.bias has shape \(9,\).*\(8,\) in the model": {
            **good,
            "middle.bias": torch.ones(9),
        },
    }
    for sentence, tensors in bad.items():
        save_file(
            {name: torch.zeros_like(value) for name, value in tensors.items()},
            tmp_path / "model.safetensors",
        )
        with pytest.raises(ValueError, match=sentence):
            fastft.load_fp32(model, optimizer, tmp_path)
    assert_same_bits(model.state_dict(), before)
