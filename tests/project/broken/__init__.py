"""An app that cannot be set up in a worker process."""
