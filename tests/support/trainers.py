"""A Llama that is quick to make, the arguments of a Trainer that says and saves nothing, and the
curve that it logs."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments


def llama_config(vocab_size=97, **changes):
    """The configuration of a Llama of one layer, with `changes`."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaConfig(vocab_size=vocab_size, **{**sizes, **heads, **changes})


def tiny_llama(vocab_size=97, *, seed=0, kind=LlamaForCausalLM, **config):
    """A Llama of one layer in training mode, whose random weights are the same for the same seed.

    `kind` is the class, `config` what differs in its configuration.
    """
    torch.manual_seed(seed)
    return kind(llama_config(vocab_size, **config)).train()


def quiet_arguments(folder, kind=TrainingArguments, **changes):
    """Arguments of a Trainer on the CPU that logs every step, reports nothing and saves nothing.

    `kind` is the class of the arguments, `changes` go over whatever is here.
    """
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return kind(**{"output_dir": str(folder), "logging_steps": 1, **quiet, **changes})


class Curve(TrainerCallback):
    """Keeps the losses of training and the gradients' norms, one of each a logged step."""

    def __init__(self):
        self.losses, self.norms = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            if logs.get("grad_norm") is not None:
                self.norms.append(float(logs["grad_norm"]))


def logged(trainer, *names):
    """The values that a trainer has logged under these names ("loss" by default), in order."""
    return [
        entry[name]
        for entry in trainer.state.log_history
        for name in names or ("loss",)
        if name in entry
    ]
