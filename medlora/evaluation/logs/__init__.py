"""Answers in files, ours and other tools': read, paired question by question, and written for lm-evaluation-harness."""
