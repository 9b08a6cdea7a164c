"""Packing plans, packed datasets and the collator."""
