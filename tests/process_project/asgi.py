"""For uvicorn, Daphne and gunicorn with uvicorn's worker."""

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.process_project.settings")
application = get_asgi_application()
