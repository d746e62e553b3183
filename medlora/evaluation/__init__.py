"""What is asked, what was answered, how good it is: plain values, no model."""
