"""The networks: one definition for training, plain generation and the engine."""
