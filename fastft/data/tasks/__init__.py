"""The tasks that a collator knows: a class for each, which makes its labels."""
