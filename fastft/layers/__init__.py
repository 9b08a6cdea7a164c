"""What layers of models compute, apart from loss and attention."""
