"""What an export needs on the Hugging Face hub: its model card, and the upload."""
