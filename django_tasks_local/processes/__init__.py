"""Run tasks in worker processes: send each task to a worker, and receive its outcome."""
