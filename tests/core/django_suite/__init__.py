"""
Django's own tests of django.tasks, run against both backends of this package.

    test_django_suite.py    starts one run per backend and compares it with EXCLUDED
    download.py             Django's sdist -> tests/tasks in a cache folder
    run.py                  the run: subclasses Django's test cases, prints JSON
    adapters.py             backends that take the place of ImmediateBackend and DummyBackend
    gate.py                 the task that keeps a worker busy
    settings.py             Django's settings in the run and in its worker processes
"""
