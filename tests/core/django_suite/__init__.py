"""
Django's own tests of django.tasks, run against both backends of this package.

    test_django_suite.py    runs run.py once per backend; only the tests in EXCLUDED may fail
    download.py             downloads Django's sdist and unpacks tests/tasks into a cache folder
    run.py                  subclasses Django's test cases, runs them and prints the outcome as JSON
    adapters.py             defines backends that replace ImmediateBackend and DummyBackend
    gate.py                 defines the task that keeps a worker busy
    settings.py             defines Django's settings for run.py and for its worker processes
"""
