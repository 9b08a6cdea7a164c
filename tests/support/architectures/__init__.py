"""Every language model of transformers, made small: stock loss and gradients against fused ones.

`shrink` makes a config small, `overrides` says what it cannot guess, `models` builds a case and its
batch, `outcome` compares, `gathered` hears of the outcomes, `table` makes the page of `make sweep`.
`tests/integrations/test_architectures.py` runs it.
"""
