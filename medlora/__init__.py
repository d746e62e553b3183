"""medlora: turn a general LLM into a Korean medical one with LoRA, on as many GPUs as you have."""

import logging

__version__ = "0.1.0"

# Set before anything imports bitsandbytes. It says at every int8 product that it computes in float16, and on newer CPUs
# that it lacks a kernel package that needs the hub.
for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)
