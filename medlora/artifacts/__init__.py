"""What is in the folders of bases and adapters, from configs and headers alone: no torch."""
