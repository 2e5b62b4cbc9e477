"""`pumice serve`: Ollama's and OpenAI's APIs, and a page for people. PyTorch is loaded when a model is."""
