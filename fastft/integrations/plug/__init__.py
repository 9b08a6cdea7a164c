"""`fastft.plug`: what fits a Trainer, piece by piece."""
