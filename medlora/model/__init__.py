"""The base model and its adapters."""

import medlora.kernels  # noqa: F401  # first: it quietens bitsandbytes, which PEFT imports
