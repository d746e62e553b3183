"""What a command would do, before it does it: a starting config, and the plan of a run; without torch, Ray or a model."""
