"""What the labels of a packed batch are: a class for each task."""
