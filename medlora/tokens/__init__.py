"""Records -> token ids -> training rows, on arrays and Arrow files."""
