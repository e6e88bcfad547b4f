"""Live progress of Django tasks in the browser, over server-sent events."""
