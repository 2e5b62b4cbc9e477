"""The networks, written once: training, plain generation and the engine all run these modules."""
