"""plug(packing=...): the batches of the Trainer's own collator without their padding, and the same
losses."""

from __future__ import annotations

import datasets
import peft
import pytest
import torch
import transformers
from support import plugged
from support.plugged import TASKS, V, examples, stock_and_plugged, tokenizer, trainer_of
from support.trainers import logged
from transformers import Trainer

import fastft
from fastft.integrations.plug.collator import PackedBatches
from fastft.integrations.plug.plug import Plugged
from fastft.integrations.probe import check_packing, verdicts

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}


QUICK = ("causal, the end token is the padding token", "masked", "classes", "answers")


@pytest.mark.parametrize(
    "task", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in TASKS]
)
def test_the_same_batches_have_the_same_losses(tmp_path, task):
    stock, ours, plug, _ = stock_and_plugged(
        tmp_path, task, plugs={"packing": "collate"}, **EVALUATING
    )
    line = plug.lines["packing"]
    share = "12 %" if "multiple" in task else "no"
    assert line.startswith(f"the same batches, {share} padding") and "probe exact" in line, line
    assert [*map(len, ours)] == [plugged.STEPS, plugged.STEPS, 1]
    for expected, actual in zip(stock, ours, strict=True):
        assert actual == pytest.approx(expected, rel=2e-5)


def trained_rows(trainer):
    """The shape of each batch that the model is trained on."""
    shapes = []

    def note(module, args, kwargs):
        if module.training and torch.is_grad_enabled():
            shapes.append(tuple(kwargs["input_ids"].shape))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    return shapes


@pytest.mark.parametrize("task", ["causal", "classes"])
def test_a_pack_is_a_batch_and_every_text_is_in_one(tmp_path, task):
    trainer = trainer_of(tmp_path, task, max_steps=-1, num_train_epochs=1)
    plug = fastft.plug(trainer, packing=40)
    shapes = trained_rows(trainer)
    sizes = [len(example["input_ids"]) for example in trainer.train_dataset]
    assert all(rows == 1 and tokens <= 40 for rows, tokens in shapes)
    assert sum(tokens for _, tokens in shapes) == sum(sizes) and len(shapes) == 3
    line = plug.lines["packing"]
    assert line.startswith("40 tokens, one pack a batch (about 5.33 examples, not 4), no padding")
    assert "attention fastft, probe exact" in line
    assert trainer.args.per_device_train_batch_size == 4


def test_packs_have_the_mean_loss_of_their_texts(tmp_path):
    """At a learning rate of 0 an epoch's packs have the losses that the texts have alone."""
    trainer = trainer_of(
        tmp_path, max_steps=-1, num_train_epochs=1, learning_rate=0.0, lr_scheduler_type="constant"
    )
    model = trainer.model.eval()
    sums, counts = 0.0, 0
    with torch.no_grad():
        for example in trainer.train_dataset:
            ids = torch.tensor([example["input_ids"]])
            sums += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            counts += ids.shape[1] - 1
    fastft.plug(trainer, packing=1000)
    trainer.train()
    assert logged(trainer) == pytest.approx([sums / counts], rel=1e-5)


def test_a_data_set_of_datasets_is_packed_without_its_other_columns(tmp_path):
    rows = [{**example, "source": "web", "score": 0.5} for example in examples()]
    trainer = trainer_of(
        tmp_path,
        max_steps=-1,
        num_train_epochs=1,
        options={"train_dataset": datasets.Dataset.from_list(rows)},
    )
    fastft.plug(trainer, packing=40)
    assert len(trained_rows(trainer)) == 3


@pytest.mark.slow
def test_accumulation_workers_and_length_grouping_of_packs(tmp_path):
    trainer = trainer_of(
        tmp_path,
        max_steps=-1,
        num_train_epochs=2,
        gradient_accumulation_steps=2,
        dataloader_num_workers=1,
        train_sampling_strategy="group_by_length",
    )
    plug = fastft.plug(trainer, packing=40)
    assert len(trained_rows(trainer)) == 6 and trainer.state.global_step == 4
    assert "in random order, not by length" in plug.lines["packing"]
    assert trainer.args.train_sampling_strategy == "group_by_length"


def test_packs_follow_the_training_set_that_the_trainer_has_at_train(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=-1, num_train_epochs=1)
    fastft.plug(trainer, packing=40)
    trainer.train_dataset = examples()[:4]
    assert len(trained_rows(trainer)) == 1


def test_examples_a_second_are_those_in_packs(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=-1, num_train_epochs=1)
    plug = fastft.plug(trainer, packing=40)
    of_packs = trainer.get_train_dataloader()
    assert trainer.num_examples(of_packs) == 16 and len(of_packs) == 3
    plug.restore()
    assert trainer.num_examples(trainer.get_train_dataloader()) == 16


def test_packed_batches_follow_the_collator_that_the_trainer_has_at_train(tmp_path):
    def trained(plug):
        trainer = trainer_of(tmp_path)
        done = fastft.plug(trainer, packing="collate") if plug else None
        trainer.data_collator = TASKS["causal, the end token is the padding token"][2](None)
        trainer.train()
        return logged(trainer), done

    (stock, _), (ours, plug) = trained(False), trained(True)
    assert ours == pytest.approx(stock, rel=2e-5)
    assert plug.lines["packing"].startswith("the same batches")


def test_a_collator_that_cannot_be_packed_since_is_left_alone(tmp_path):
    trainer = trainer_of(tmp_path)
    plug = fastft.plug(trainer, packing="collate")
    packable = trainer.data_collator
    trainer.data_collator = with_labels_at_padding
    assert all(rows == 4 for rows, _ in trained_rows(trainer))
    assert "its batches have labels at padding" in plug.lines["packing"]
    trainer.data_collator = packable
    assert all(rows == 1 for rows, _ in trained_rows(trainer)[-plugged.STEPS :])


def test_evaluations_outside_of_training_and_predictions_keep_the_users_batches(tmp_path):
    trainer = trainer_of(tmp_path, "causal", per_device_eval_batch_size=3)
    expected = trainer.predict(examples()[:6])
    losses = trainer.evaluate()["eval_loss"]
    fastft.plug(trainer, packing="collate")
    found = trainer.predict(examples()[:6])
    assert found.predictions.shape == expected.predictions.shape
    assert found.predictions == pytest.approx(expected.predictions, rel=1e-4, abs=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses, rel=1e-5)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_metrics_get_a_row_for_each_example(tmp_path):
    options = {"compute_metrics": accuracy}
    values = {}
    for packing in (None, "collate", 40):
        trainer = trainer_of(tmp_path, options=options, learning_rate=0.0, **EVALUATING)
        fastft.plug(trainer, packing=packing)
        trainer.train()
        values[packing] = logged(trainer, "eval_accuracy", "eval_loss")
    assert values["collate"] == pytest.approx(values[None]) and len(values[None]) == 2
    assert values[40] == pytest.approx(values[None])


def test_a_seq2seq_trainer_generates_as_ever(tmp_path):
    trainer = trainer_of(
        tmp_path,
        "answers",
        kind=transformers.Seq2SeqTrainer,
        arguments=transformers.Seq2SeqTrainingArguments,
        options={"compute_metrics": lambda prediction: {"rows": len(prediction.predictions)}},
        predict_with_generate=True,
        generation_max_length=5,
        **EVALUATING,
    )
    fastft.plug(trainer, packing="collate")
    trainer.train()
    assert logged(trainer, "eval_rows") == [6]


class OwnRows(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, inputs, **kwargs)


def with_no_labels(model):
    padding = transformers.DataCollatorWithPadding(tokenizer())
    return lambda rows: padding([{"input_ids": row["input_ids"]} for row in rows])


def with_labels_at_padding(rows):
    batch = transformers.DataCollatorWithPadding(tokenizer())(rows)
    return {**batch, "labels": batch["input_ids"].clone()}


LEFT_ALONE = {
    "no training set": ({"train_dataset": None}, "the Trainer has no train_dataset"),
    "a collator without labels": ({"data_collator": with_no_labels(None)}, "have no labels"),
    "labels at padding": ({"data_collator": with_labels_at_padding}, "have labels at padding"),
    "packed already": ({"train_dataset": fastft.pack(examples(), 40)}, "is packed already"),
    "our own collator": ({"data_collator": fastft.PackingCollator()}, "packs already"),
    "left padding": (
        {
            "data_collator": transformers.DataCollatorForLanguageModeling(
                tokenizer(side="left"), mlm=False
            )
        },
        "padding_side = 'right'",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_cannot_be_packed_is_left_alone_with_a_word(tmp_path, case):
    options, word = LEFT_ALONE[case]
    plug = fastft.plug(trainer_of(tmp_path, options=options), packing="collate")
    assert plug.lines["packing"].startswith("left alone: ") and word in plug.lines["packing"]


def gpt2():
    torch.manual_seed(3)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=V, **sizes, **drops, **tokens)
    return transformers.GPT2LMHeadModel(config)


def test_where_stock_divides_by_first_labels_the_batches_stay_padded(tmp_path, monkeypatch):
    """Trainer knows the classes called ForCausalLM as models that shift their labels; the loss of
    GPT2LMHeadModel is divided by a label more for each text."""
    monkeypatch.setitem(TASKS, "gpt2", (gpt2, *TASKS["causal"][1:]))
    stock, ours, plug, _ = stock_and_plugged(tmp_path, "gpt2", plugs={"packing": "collate"})
    assert "the first token of each text" in plug.lines["packing"]
    for expected, actual in zip(stock, ours, strict=True):
        assert actual == pytest.approx(expected, rel=2e-5)


def test_a_module_of_ones_own_keeps_its_batches_with_a_word(tmp_path):
    trainer = Trainer(torch.nn.Linear(2, 1), trainer_of(tmp_path).args, train_dataset=examples())
    line = fastft.plug(trainer, packing="collate").lines["packing"]
    assert line.startswith("left alone: Linear has no task of PackingCollator's")


def test_packs_with_left_padding_say_what_they_leave_out(tmp_path):
    collator = transformers.DataCollatorForLanguageModeling(tokenizer(side="left"), mlm=False)
    trainer = trainer_of(tmp_path, options={"data_collator": collator})
    line = fastft.plug(trainer, packing=40).lines["packing"]
    assert "no first token predicted from padding left of it" in line


def test_a_model_that_leaks_keeps_its_padded_batches(tmp_path):
    """A recurrence has no place for boundaries; the training is stock's, with a word."""
    config = transformers.MambaConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0
    )

    def trained(plug):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path)
        trainer.model = trainer.model_wrapped = transformers.MambaForCausalLM(config)
        done = fastft.plug(trainer, packing="collate") if plug else None
        trainer.train()
        return logged(trainer), done

    (stock, _), (ours, plug) = trained(False), trained(True)
    assert ours == pytest.approx(stock, rel=2e-5)
    assert plug.lines["packing"].startswith("left alone: MambaForCausalLM does not keep packed")


def test_noise_that_depends_on_the_length_of_rows_is_left_to_padded_ones(tmp_path):
    trainer = trainer_of(tmp_path, neftune_noise_alpha=5.0)
    assert "NEFTune" in fastft.plug(trainer, packing="collate").lines["packing"]


@pytest.mark.parametrize("kind", ["a module's", "attention's"])
def test_dropout_is_told_of(tmp_path, kind):
    trainer = trainer_of(tmp_path)
    if kind == "attention's":
        trainer.model.config.attention_dropout = 0.1
    else:
        trainer.model.dropout = torch.nn.Dropout(0.1)
    line = fastft.plug(trainer, packing="collate").lines["packing"]
    assert "dropout draws other masks than on padded rows" in line


def test_a_loss_of_ones_own_is_told_that_rows_are_packed(tmp_path):
    line = fastft.plug(trainer_of(tmp_path, kind=OwnRows), packing="collate").lines["packing"]
    assert "OwnRows's own loss gets rows of several examples" in line


def test_the_seeds_of_a_collator_are_not_used_up(tmp_path):
    """Looking at batches draws nothing, neither from torch nor from the collator's generator."""
    collator = transformers.DataCollatorForLanguageModeling(tokenizer(), seed=3)
    trainer = trainer_of(tmp_path, "masked", options={"data_collator": collator})
    collator(examples()[:2])
    own, torchs = collator.generator.get_state(), torch.get_rng_state()
    fastft.plug(trainer, packing="collate")
    assert torch.equal(collator.generator.get_state(), own)
    assert torch.equal(torch.get_rng_state(), torchs)
    assert trainer.accelerator._dataloaders == []


REFUSED = {
    "0": ({"packing": 0}, {}, "packing must be a number of tokens above 0, 'collate' or None"),
    "True": ({"packing": True}, {}, "packing must be"),
    "a word": ({"packing": "pack"}, {}, "packing must be"),
    "too few": ({"packing": 5}, {}, "is less than the longest example has.*overlong"),
    "auto_find_batch_size": (
        {"packing": 40},
        {"auto_find_batch_size": True},
        "auto_find_batch_size cannot make",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_packing_that_cannot_be_is_refused_at_once(tmp_path, case):
    plugs, changes, message = REFUSED[case]
    trainer = trainer_of(tmp_path, **changes)
    before = dict(vars(trainer))
    with pytest.raises(ValueError, match=message):
        fastft.plug(trainer, **plugs)
    assert vars(trainer) == before and Plugged.of(trainer) is None


@pytest.mark.way("DataParallel", packing="refused")
def test_data_parallel_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"DataParallel cuts.*torchrun"):
        fastft.plug(trainer, packing=40)


def test_a_stream_that_is_dispatched_is_refused_and_another_packed(tmp_path):
    stream = datasets.Dataset.from_list(examples()).to_iterable_dataset()
    trainer = trainer_of(tmp_path, options={"train_dataset": stream})
    with pytest.raises(ValueError, match="dispatch_batches"):
        fastft.plug(trainer, packing=40)
    own = {"accelerator_config": {"dispatch_batches": False}}
    trainer = trainer_of(tmp_path, options={"train_dataset": stream}, **own)
    fastft.plug(trainer, packing=40)
    assert all(tokens <= 40 for _, tokens in trained_rows(trainer))


def test_a_packed_batch_says_which_collator_made_it():
    collator = PackedBatches(with_labels_at_padding, "causal_lm")
    with pytest.raises(ValueError, match=r"labels at padding.*leave packing out of fastft\.plug"):
        collator(examples()[:3])


class OwnLoader(Trainer):
    def get_train_dataloader(self):
        collate = TASKS["causal"][2](self.model)
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=4, collate_fn=collate)


@pytest.mark.parametrize("packing", ["collate", 40])
def test_a_loader_of_ones_own_is_left_alone_with_a_word(tmp_path, packing):
    trainer = trainer_of(tmp_path, kind=OwnLoader)
    plug = fastft.plug(trainer, packing=packing)
    assert all(rows == 4 for rows, _ in trained_rows(trainer))
    assert "OwnLoader's get_train_dataloader takes no other" in plug.lines["packing"]


def test_prompt_tuning_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    trainer.model = trainer.model_wrapped = peft.get_peft_model(trainer.model, config)
    with pytest.raises(ValueError, match="prompt tuning puts virtual tokens before each row"):
        fastft.plug(trainer, packing="collate")


class Forgetful(dict):
    def __contains__(self, key):
        return False


def test_weights_that_are_sharded_in_training_are_asked_before(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    plug = fastft.plug(trainer, packing="collate")

    def reason(model):
        return "its parameters are sharded" if trainer.accelerator._models else None

    monkeypatch.setattr(check_packing, "reason_not_to_run", reason)
    monkeypatch.setattr(verdicts, "_verdicts", Forgetful())
    trainer.train()
    assert plug.lines["packing"].endswith("attention fastft, probe exact")
