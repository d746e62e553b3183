"""Faster forward and backward passes; they import nothing of medlora."""

import logging

# The torch packages all import this one first, and PEFT imports bitsandbytes. It reports at every int8 product that it
# computes in float16, and on newer CPUs that it lacks a kernel package that needs the hub. Neither can be acted on.
for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)
