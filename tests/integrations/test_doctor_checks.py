"""Each check of a model, a training and its batches has a subject that makes it speak, and none
speaks of what is as it should be."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
import transformers
from support.plugged import tokenizer
from support.trainers import llama_config, logged, quiet_arguments, tiny_llama
from transformers import Trainer
from transformers.training_args import ParallelMode

import fastft
from fastft.integrations.doctor import batches, model, training
from fastft.integrations.doctor.batches import BATCHES, Sample, sample
from fastft.integrations.doctor.finding import examined
from fastft.integrations.doctor.model import MODEL_ALONE, Subject, described
from fastft.integrations.doctor.training import TRAINING


def subject(kind, config):
    with torch.device("meta"):
        return Subject(kind(config), gpu=False)


def llama(**changes):
    return subject(transformers.LlamaForCausalLM, llama_config(pad_token_id=0, **changes))


MAMBA = {"vocab_size": 97, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}


def mamba():
    return subject(transformers.MambaForCausalLM, transformers.MambaConfig(**MAMBA))


def mixtral():
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(vocab_size=32, hidden_size=32, head_dim=8, **sizes)
    return subject(transformers.MixtralForCausalLM, config)


MODELS = {  # of each check, a model that makes it speak, and its severity
    "missing_kernels": (mamba, "note"),
    "eager_attention": (lambda: llama(attn_implementation="eager"), "slow"),
    "no_flash_attention": (lambda: replace(llama(), gpu=True), "note"),
    "router_without_balance": (mixtral, "note"),
    "weights_of_16_bits": (lambda: llama(dtype=torch.bfloat16), "note"),
    "pad_token_is_end_token": (lambda: llama(eos_token_id=[0, 2]), "note"),
}


@pytest.mark.parametrize("check", MODEL_ALONE, ids=lambda check: check.__name__)
def test_a_model_that_makes_a_check_speak_and_one_that_does_not(check):
    build, severity = MODELS[check.__name__]
    assert check(build()).severity == severity
    assert check(llama()) is None


def test_missing_kernels_are_slow_where_there_is_a_gpu():
    found = model.missing_kernels(replace(mamba(), gpu=True))
    assert found.severity == "slow"
    assert "mamba-ssm" in found.what and "causal-conv1d" in found.remedy


def test_kernels_that_are_installed_and_broken_are_named_with_the_error(tmp_path, monkeypatch):
    (tmp_path / "mamba_ssm.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    (tmp_path / "causal_conv1d.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        what = model.missing_kernels(mamba()).what
    finally:
        sys.modules.pop("causal_conv1d", None)
    assert "undefined symbol" in what and "causal-conv1d" not in what


@pytest.mark.parametrize("form", ["folder", "file", "class"])
def test_a_model_is_described_without_its_weights(form, tmp_path):
    config = llama_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    forms = {"folder": str(tmp_path), "file": str(tmp_path / "config.json"), "class": "GPT2Model"}
    assert next(described(forms[form]).model.parameters()).is_meta


class Words:
    """What a check asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0


class Endless:
    """An evaluation set of many examples, none of which is read."""

    def __len__(self):
        return 10**7

    def __getitem__(self, index):
        raise AssertionError


def batch(rows, padding=0):
    """Causal rows that end in `padding` tokens 0, whose labels are ignored."""
    ids = torch.tensor([[*row, *[0] * padding] for row in rows])
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def ignoring(*columns):
    """The good batch, but for columns of ignored labels."""
    given = batch(TEXT)
    given["labels"][:, columns] = -100
    return given


TEXT = [[1, 5, 6, 7, 8, 2], [1, 5, 9, 7, 3, 2]]
PACK = {
    "input_ids": torch.arange(5, 13)[None],
    "labels": torch.arange(5, 13)[None],
    "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1]]),
}


@pytest.fixture
def taken(tmp_path):
    """Makes a sample that nothing is wrong with, but for what is given."""

    def make(given=None, net=None, seconds=0.0, steps=None, inputs=None, **arguments):
        arguments = quiet_arguments(tmp_path, **arguments)
        trainer = Trainer(net or tiny_llama(), arguments, **inputs or {})
        trainer.processing_class = Words()
        packing = trainer.data_collator
        packing = packing if isinstance(packing, fastft.PackingCollator) else None
        return Sample(trainer, [given or batch(TEXT)], seconds, steps, packing)

    return make


def bart():
    sizes = {f"{side}_{size}": 1 for side in ("encoder", "decoder") for size in ("layers",)}
    heads = {f"{side}_attention_heads": 1 for side in ("encoder", "decoder")}
    widths = {f"{side}_ffn_dim": 8 for side in ("encoder", "decoder")}
    config = transformers.BartConfig(vocab_size=97, d_model=8, **sizes, **heads, **widths)
    return transformers.BartForConditionalGeneration(config)


def learnt_padding():
    given = batch(TEXT, padding=3)
    return {**given, "labels": given["input_ids"].clone()}


def evaluated(**changes):
    inputs = {"compute_metrics": lambda prediction: {}, "eval_dataset": Endless(), **changes}
    return {"inputs": inputs, "eval_strategy": "epoch"}


OF_BATCHES = {  # of each check, samples that make it speak, with the severity
    "labels_all_ignored": [
        (lambda: {"given": ignoring(0, 1, 2, 3, 4, 5)}, "wrong"),
        (lambda: {"given": {**batch(TEXT), "labels": torch.tensor([[5] * 6, [-100] * 6])}}, "slow"),
    ],
    "end_token_not_learnt": [(lambda: {"given": ignoring(5)}, "wrong")],
    "padding_is_learnt": [
        (lambda: {"given": learnt_padding()}, "wrong"),
        (
            lambda: {"given": {**batch(TEXT), "labels": torch.zeros(2, 9).long()}, "net": bart()},
            "wrong",
        ),
    ],
    "two_begin_tokens": [(lambda: {"given": batch([[1, *row] for row in TEXT])}, "wrong")],
    "longer_than_the_model_knows": [(lambda: {"given": batch([[1] + [5] * 128])}, "note")],
    "packs_leak": [
        (
            lambda: {
                "given": PACK,
                "net": transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA)),
            },
            "wrong",
        ),
    ],
    "packs_with_a_square_mask": [(lambda: {"given": PACK}, "slow")],
    "padding_share": [(lambda: {"given": batch(TEXT, padding=2)}, "slow")],
    "batches_come_slowly": [(lambda: {"seconds": 0.4}, "slow")],
    "evaluation_holds_all_logits": [(evaluated, "slow")],
}
QUIET = {  # samples that no check of batches speaks of
    "a text": {},
    "padding of a tenth": {"given": batch([row * 3 for row in TEXT], padding=2)},
    "the end token learnt where others are not": {"given": ignoring(1, 2, 3)},
    "one label of padding a row": {
        "given": {**batch(TEXT, padding=1), "labels": torch.tensor([[5] * 7] * 2)}
    },
    "workers": {"seconds": 0.4, "dataloader_num_workers": 2},
    "metrics of a few numbers": evaluated(preprocess_logits_for_metrics=lambda logits, labels: 0),
    "packs in our attention": {
        "given": PACK,
        "inputs": {
            "callbacks": [fastft.PackingCallback()],
            "data_collator": fastft.PackingCollator(),
        },
    },
}


@pytest.mark.parametrize(
    "check, build, severity",
    [
        pytest.param(check, *case, id=check.__name__)
        for check in BATCHES
        for case in OF_BATCHES[check.__name__]
    ],
)
def test_batches_that_make_a_check_speak(check, build, severity, taken):
    assert check(taken(**build())).severity == severity


@pytest.mark.parametrize("case", QUIET)
def test_batches_of_which_nothing_is_said(case, taken):
    assert examined(BATCHES, taken(**QUIET[case])) == []


def test_a_share_of_padding_is_counted(taken):
    said = batches.padding_share(taken(batch(TEXT, padding=2)))
    assert "25% of the tokens are padding (of 16 in 1 batch)" in said.what
    assert "1.3 times" in said.why


def test_the_sample_is_of_the_trainers_own_loader(tmp_path):
    trainer = Trainer(
        tiny_llama(),
        quiet_arguments(tmp_path, per_device_train_batch_size=2),
        train_dataset=[{"input_ids": [5, 6], "labels": [5, 6]}] * 40,
    )
    seen = sample(trainer)
    assert len(seen.batches) == batches.MOST_BATCHES
    assert seen.steps == 60  # three epochs
    assert all(each["input_ids"].shape == (2, 2) for each in seen.batches)


def test_packs_of_a_plugged_trainer_are_kept_apart(tmp_path):
    trainer = Trainer(
        tiny_llama(),
        quiet_arguments(tmp_path),
        train_dataset=[{"input_ids": row, "labels": row} for row in TEXT * 8],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer()),
    )
    fastft.plug(trainer, packing=32)
    seen = sample(trainer)
    assert seen.packing is not None
    assert batches.packs_with_a_square_mask(seen) is batches.packs_leak(seen) is None


def bert():
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(config)


def with_plain_adamw():
    net = tiny_llama()
    return {
        "net": net,
        "inputs": {"optimizers": (torch.optim.AdamW(net.lm_head.parameters()), None)},
    }


def of_training(taken, **facts):
    """A sample whose arguments say what they cannot say on this machine."""
    seen = taken()
    given = vars(seen.trainer.args) | {"device": torch.device("cpu"), "n_gpu": 1} | facts
    seen.trainer.args = types.SimpleNamespace(**given)
    return seen


def offloaded(taken):
    config = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    plugin = types.SimpleNamespace(deepspeed_config=config)
    return of_training(taken, deepspeed_plugin=plugin, adam_beta2=0.95)


def on_a_gpu(taken):
    return of_training(taken, device=torch.device("cuda"))


TRAININGS = {
    "updates_that_round_to_nothing": (
        lambda taken: taken(net=tiny_llama().bfloat16(), learning_rate=1e-5),
        "wrong",
    ),
    "weights_of_fp16": (lambda taken: taken(net=tiny_llama().half()), "wrong"),
    "parameters_without_an_optimizer": (lambda taken: taken(**with_plain_adamw()), "wrong"),
    "accumulation_not_divided": (
        lambda taken: taken(net=bert(), gradient_accumulation_steps=2),
        "wrong",
    ),
    "clipping_that_clips_nothing": (lambda taken: taken(optim="galore_adamw_layerwise"), "wrong"),
    "betas_that_deepspeed_drops": (offloaded, "wrong"),
    "warmup_that_never_ends": (lambda taken: taken(steps=100, warmup_steps=500), "wrong"),
    "one_process_for_several_gpus": (
        lambda taken: of_training(taken, n_gpu=2, parallel_mode=ParallelMode.NOT_DISTRIBUTED),
        "slow",
    ),
    "processes_that_train_alone": (lambda taken: taken(), "wrong"),
    "fp32_products_without_tf32": (on_a_gpu, "slow"),
    "half_precision_emulated": (lambda taken: taken(bf16=True), "slow"),
    "debugging_left_on": (lambda taken: taken(debug="underflow_overflow"), "slow"),
}


@pytest.mark.parametrize("check", TRAINING, ids=lambda check: check.__name__)
def test_a_training_that_makes_a_check_speak(check, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    emulated = check is training.half_precision_emulated
    monkeypatch.setattr(training, "is_emulated", lambda dtype, device: emulated)
    build, severity = TRAININGS[check.__name__]
    seen = build(taken)
    if check is training.processes_that_train_alone:
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert check(seen).severity == severity


def half_that_keeps_low_bits():
    net = tiny_llama().bfloat16()
    return {"net": net, "inputs": {"optimizers": fastft.adamw(net, lr=1e-5)}}


def adapted_half():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_llama().half(), LoraConfig(target_modules=["q_proj"]))


FAULTLESS = {
    "fp32": lambda: {},
    "bf16 by fastft": half_that_keeps_low_bits,
    "bf16 by fastft, made by Trainer": lambda: {
        "net": tiny_llama().bfloat16(),
        "inputs": {"optimizer_cls_and_kwargs": fastft.adamw_spec()},
    },
    "bf16 at a rate that moves it": lambda: {"net": tiny_llama().bfloat16(), "learning_rate": 0.1},
    "an adapter in fp32 on fp16": lambda: {"net": adapted_half()},
    "accumulation that the model divides": lambda: {"gradient_accumulation_steps": 2},
    "no accumulation": lambda: {"net": bert()},
    "a warmup of half the steps": lambda: {"steps": 100, "warmup_steps": 50},
    "a schedule that has no warmup": lambda: {
        "steps": 100,
        "warmup_steps": 500,
        "lr_scheduler_type": "constant",
    },
    "a warmup of a data set without length": lambda: {"warmup_steps": 500},
}


@pytest.mark.parametrize("case", FAULTLESS)
def test_a_training_of_which_nothing_is_said(case, taken, monkeypatch):
    monkeypatch.setattr(training, "is_emulated", lambda dtype, device: False)
    assert examined(TRAINING, taken(**FAULTLESS[case]())) == []


def test_what_is_said_of_accumulation_is_so(tmp_path):
    """The same examples, in one batch and in two halves: stock Trainer's gradient is twice too
    large."""
    rows = [[5, 6, 7, 8], [9, 10, 11, 12]]
    data = [{"input_ids": row, "labels": row} for row in rows]
    norms = []
    for steps in (1, 2):
        arguments = quiet_arguments(
            tmp_path,
            per_device_train_batch_size=2 // steps,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=1e9,
        )
        trainer = Trainer(bert(), arguments, train_dataset=data)
        trainer.train()
        norms += logged(trainer, "grad_norm")
    assert norms[1] / norms[0] == pytest.approx(2, rel=1e-3)
