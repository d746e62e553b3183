"""Commands for after a run: talk to a stage."""
