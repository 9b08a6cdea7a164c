"""TRL's trainers, unchanged, with the fused loss: the losses and metrics of plain logits, which are
never there."""

from __future__ import annotations

import datasets
import pytest
import torch
import transformers
from support.plugged import V, llama, tokenizer
from support.trainers import quiet_arguments
from support.watch import Watch

import fastft
from fastft.loss import head_sweep

trl = pytest.importorskip("trl", minversion="1.16")
from support.trl_trainers import (  # noqa: E402
    MEMBERS,
    SIZES,
    STEPS,
    TEXTS,
    compare,
    lora,
    policy,
    train,
    trainer_of,
    with_plain_heads,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL


def way(name, word="exact", **columns):
    return pytest.mark.way(f"{name} (TRL)", **{"loss": word, **columns})


def trainers(folder, name, rows=None, options=lambda folder: {}, model=policy, **changes):
    """Two trainers alike: one for plain logits, one for ours."""
    for _ in range(2):
        given = {"model": model(folder), "options": options(folder)}
        yield trainer_of(folder, name, rows=rows, **given, **changes)


def with_evaluation(name):
    rows = datasets.Dataset.from_list(MEMBERS[name][0][:4])
    changes = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    return {"options": lambda folder: {"eval_dataset": rows}, **changes}


# passes of the policy and of references in three steps; which of them have an evaluation
FUSED = {"SFT": 3, "DPO": 6, "KTO": 12, "GRPO": 6, "RLOO": 9}
EVALUATED = ("SFT", "DPO", "KTO")


@pytest.mark.parametrize("name", [pytest.param(name, marks=way(name)) for name in FUSED])
def test_losses_and_metrics_of_training_and_evaluation(tmp_path, name):
    changes = with_evaluation(name) if name in EVALUATED else {}
    callback, curve = compare(*trainers(tmp_path, name, **changes))
    assert callback.report.fused == FUSED[name] and not callback.report.skipped
    assert not callback.report.materialised and not callback.evaluation.materialised
    assert bool(callback.evaluation.fused) == (name in EVALUATED)
    assert sum("loss" in entry for entry in curve) == STEPS
    assert any(abs(entry["grad_norm"]) > 1e-2 for entry in curve if "loss" in entry)


# tokens of a batch that have labels, at least
TOKENS = {"SFT": 4 * 12, "DPO": 8 * 13, "KTO": 4 * 12, "GRPO": 4 * 6, "RLOO": 4 * 6}


@pytest.mark.parametrize("name", TOKENS)
def test_logits_are_never_there(tmp_path, monkeypatch, name):
    """Neither of the policy nor of the reference, in training, generation and evaluation."""
    monkeypatch.setitem(head_sweep._LIMITS, "cpu", (0, 4, 4, 0))
    changes = with_evaluation(name) if name in EVALUATED else {}
    largest, logits = [], TOKENS[name] * V
    for trainer in trainers(tmp_path, name, **changes, max_steps=2):
        if largest:
            trainer.add_callback(fastft.FusedLossCallback())
        with Watch() as watch:
            train(trainer if largest else with_plain_heads(trainer))
        largest.append(watch.elements)
    assert largest[0] >= logits and largest[1] < logits


def a_copy_of_the_head(folder):
    peft = pytest.importorskip("peft")
    return {"peft_config": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])}


def trained_before(folder):
    """A model with adapters: TRL keeps a copy of them, "ref", for the reference."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(policy(folder), lora(folder)["peft_config"])


def given_reference(folder):
    return {"ref_model": llama(**SIZES, num_key_value_heads=2, seed=5)}


def own_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="mean")


def mixtral(folder):
    config = transformers.MixtralConfig(
        vocab_size=V, **SIZES, num_key_value_heads=2, num_hidden_layers=1, num_local_experts=4
    )
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "mixtral")
    return transformers.MixtralForCausalLM.from_pretrained(folder / "mixtral")


def softcapped(folder):
    sizes = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 1, "head_dim": 8}
    config = transformers.Gemma2Config(
        vocab_size=V, **sizes, final_logit_softcapping=0.2, pad_token_id=0, initializer_range=0.2
    )
    torch.manual_seed(0)
    transformers.Gemma2ForCausalLM(config).save_pretrained(folder / "gemma2")
    return transformers.Gemma2ForCausalLM.from_pretrained(folder / "gemma2")


VARIANTS = {
    **{
        f"DPO, {kind}": ("DPO", {"loss_type": [kind]})
        for kind in ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "apo_down")
    },
    "DPO, two losses": ("DPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "DPO, robust": ("DPO", {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "DPO, weighed by how peaked tokens are": ("DPO", {"use_weighting": True}),
    "DPO, another divergence": ("DPO", {"f_divergence_type": "js_divergence"}),
    "DPO, tails of another weight": ("DPO", {"ld_alpha": 0.5}),
    "DPO, another reference": ("DPO", {"options": given_reference}),
    "DPO, a reference before training": (
        "DPO",
        {"precompute_ref_log_probs": True, "options": given_reference},
    ),
    "DPO, a reference that follows": (
        "DPO",
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    ),
    "DPO, adapters": ("DPO", {"options": lora}),
    "DPO, adapters and a copy of the head": ("DPO", {"options": a_copy_of_the_head}),
    "DPO, adapters trained before": ("DPO", {"model": trained_before}),
    "DPO, accumulation, checkpointing": (
        "DPO",
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ),
    "DPO, experts": ("DPO", {"model": mixtral, "router_aux_loss_coef": 0.1}),
    "DPO, softcap": ("DPO", {"model": softcapped}),
    "KTO, unpaired": ("KTO", {"loss_type": "apo_zero_unpaired"}),
    "KTO, a reference before training": ("KTO", {"precompute_ref_log_probs": True}),
    "KTO, adapters": ("KTO", {"options": lora}),
    **{
        f"GRPO, {kind}": ("GRPO", {"loss_type": kind})
        for kind in ("grpo", "bnpo", "dr_grpo", "cispo")
    },
    "GRPO, tokens of high entropy": ("GRPO", {"top_entropy_quantile": 0.5}),
    "GRPO, two iterations": ("GRPO", {"num_iterations": 2, "max_steps": 4}),
    "GRPO, sequences": ("GRPO", {"importance_sampling_level": "sequence"}),
    "GRPO, a head in fp32": ("GRPO", {"cast_lm_head_to_fp32": True}),
    "GRPO, adapters": ("GRPO", {"options": lora}),
    "GRPO, softcap": ("GRPO", {"model": softcapped}),
    "RLOO, two iterations": ("RLOO", {"num_iterations": 2, "max_steps": 4}),
    "RLOO, adapters": ("RLOO", {"options": lora}),
    "SFT, all tokens": ("SFT", {"rows": [{"text": text} for text in TEXTS]}),
    "SFT, dft": ("SFT", {"loss_type": "dft"}),
    "SFT, label smoothing": ("SFT", {"label_smoothing_factor": 0.1}),
    "SFT, a loss of one's own": ("SFT", {"options": lambda _: {"compute_loss_func": own_loss}}),
    "SFT, packing": (
        "SFT",
        {"rows": [{"text": text} for text in TEXTS], "packing": True, "max_length": 16},
    ),
    "SFT, adapters": ("SFT", {"options": lora}),
    "SFT, experts": ("SFT", {"model": mixtral, "router_aux_loss_coef": 0.1}),
}


def variants():
    rows = {
        "SFT, label smoothing": "SFT (TRL), label smoothing",
        "SFT, adapters": "SFT (TRL), PEFT",
    }
    for name in VARIANTS:
        marks = [pytest.mark.way(rows[name], loss="exact")] if name in rows else []
        yield pytest.param(name, marks=marks)


# advantages that cancel out: stock's own norm is 1e-6 from that in float64, and so is ours
ROUNDING = {"RLOO, adapters": 2e-6}


@pytest.mark.slow
@pytest.mark.parametrize("name", variants())
def test_every_setting_that_changes_the_loss(tmp_path, name):
    kind, changes = VARIANTS[name]
    callback, _ = compare(*trainers(tmp_path, kind, **changes), rel=ROUNDING.get(name, 1e-6))
    assert callback.report.fused and not callback.report.skipped
    assert not callback.report.materialised


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_in_bf16(tmp_path, name):
    changes = {"bf16": True, "max_steps": 2}
    if name == "DPO":  # from which policies differ: no accuracy hangs on a rounding
        changes["options"] = given_reference
    callback, _ = compare(*trainers(tmp_path, name, **changes), rel=5e-2, abs=5e-2)
    assert callback.report.fused == 4 and not callback.report.materialised


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "KTO", "SFT"])
def test_plug_and_evaluate_after_a_training(tmp_path, name):
    stock, ours = trainers(tmp_path, name, max_steps=1, **with_evaluation(name))
    expected = train(with_plain_heads(stock)), stock.evaluate()
    plug, theirs = fastft.plug(ours, optimizer=False), vars(ours.model)["forward"]
    actual = train(ours), ours.evaluate()
    assert actual[0][0] == pytest.approx(expected[0][0], rel=1e-6, abs=1e-6)
    wanted = {key: value for key, value in expected[1].items() if "_per_s" not in key}
    wanted.pop("eval_runtime")
    assert {key: actual[1][key] for key in wanted} == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert plug.lines["loss"] == "fused at lm_head" and plug.evaluation.fused
    assert vars(ours.model)["forward"] is theirs


def test_after_an_exception_the_next_training_is_right(tmp_path, caplog):
    """Trainer calls no callback then; auto_find_batch_size begins anew in the same way."""
    stock, ours = trainers(tmp_path, "DPO", max_steps=1)
    expected = train(with_plain_heads(stock))
    theirs, callback = vars(ours.model)["forward"], fastft.FusedLossCallback()
    ours.add_callback(callback)

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            raise KeyboardInterrupt

    ours.add_callback(Stop)
    with pytest.raises(KeyboardInterrupt):
        train(ours)
    assert vars(ours.model)["forward"] is not theirs
    ours.remove_callback(Stop)
    curve = train(ours)
    assert curve[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert callback.report.fused == 2 and vars(ours.model)["forward"] is theirs


@way("Reward", "no vocabulary")
def test_a_reward_model_has_no_vocabulary_and_no_warning(tmp_path, caplog):
    config = llama(**SIZES, num_key_value_heads=2, num_labels=1).config
    model, callback = (
        transformers.LlamaForSequenceClassification(config),
        fastft.FusedLossCallback(),
    )
    trainer = trainer_of(tmp_path, "Reward", model=model, max_steps=1)
    trainer.add_callback(callback)
    train(trainer)
    assert callback.report.skipped == [
        "LlamaForSequenceClassification has no output head over a vocabulary, so that there is "
        "nothing to fuse"
    ]
    assert not [record for record in caplog.records if "fastft" in record.getMessage()]


@way("distillation", "stock")
def test_a_distillation_is_left_as_it_is(tmp_path, caplog):
    """It reads the weights of both heads itself."""
    usual = {"max_steps": 1, "per_device_train_batch_size": 2, "max_completion_length": 6}
    found = []
    for callbacks in ([], [fastft.FusedLossCallback()]):
        arguments = {**usual, "optim": "sgd", "learning_rate": 0.05, "bf16": False}
        trainer = trl.DistillationTrainer(
            model=policy(tmp_path),
            teacher_model=llama(**SIZES, num_key_value_heads=2, seed=3),
            args=quiet_arguments(tmp_path, trl.DistillationConfig, **arguments),
            train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in TEXTS]),
            processing_class=tokenizer(),
            callbacks=callbacks,
        )
        found.append(train(trainer))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    said = [record.getMessage() for record in caplog.records]
    (outcome,) = [line for line in said if "fastft: no loss was fused" in line]
    assert "DistillationTrainer reads the weights of both models' heads itself" in outcome
