"""What a GPU does faster: adapters prepared once a stage, and decoding as one captured step over static lanes."""
