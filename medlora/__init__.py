"""medlora: turn a general LLM into a Korean medical one with LoRA, on as many GPUs as you have."""

__version__ = "0.2.0"
