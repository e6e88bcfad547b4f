"""The pool of worker processes: how a task reaches one, and how its outcome returns."""
