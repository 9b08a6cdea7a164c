"""What `python -m fastft compare` records of a training while it goes on."""
