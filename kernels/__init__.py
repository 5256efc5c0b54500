"""GPU kernels of SGLang-ARES, installed as ``sglang_ares_kernels``."""
