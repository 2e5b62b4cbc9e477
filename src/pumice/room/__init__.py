"""What a model takes in memory, what the machine has, and whether the one fits into the other. No weights are read."""
