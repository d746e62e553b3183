"""What happens to worker processes: a task beside the driver, workers that leave, fail or stall."""
