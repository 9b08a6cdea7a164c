"""The checks of `python -m fastft doctor`: of a machine, a model, a training and its batches."""
