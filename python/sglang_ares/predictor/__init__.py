"""``python -m sglang_ares.predictor``: the tools of the length predictor."""
