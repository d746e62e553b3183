"""Log-likelihoods of what a question may be answered with: its letters, or the texts of its options."""
