"""The miniature base model: its tokenizer, network, lessons and pre-training."""
