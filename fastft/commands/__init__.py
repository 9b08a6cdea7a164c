"""What `python -m fastft` can do, a room for each command."""
