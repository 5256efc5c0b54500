"""How many tokens a request will still produce, read off the model's own hidden states."""
