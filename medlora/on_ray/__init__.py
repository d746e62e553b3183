"""The only place that imports ray: connecting, a phase as a Ray Train run, evaluation on Ray Data."""
