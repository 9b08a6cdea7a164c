"""What several test files need: problems with their oracles, and machines that run or read GPU code
without a GPU."""
