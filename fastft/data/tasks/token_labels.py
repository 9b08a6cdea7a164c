"""Labels of tokens that the examples have, or that are the tokens themselves."""

from __future__ import annotations

from fastft.data.tasks.task import Task


class TokenClassification(Task):
    """A label for each token, if the examples have any."""


class CausalLM(Task):
    """The token after each one, which the model shifts: that before an example's first one is none
    of its own."""

    sources = ("labels", "input_ids")
    ignored = 1
