"""`pumice serve`: Ollama's and OpenAI's APIs, and a page for people. Nothing here loads PyTorch before a model is
asked."""
