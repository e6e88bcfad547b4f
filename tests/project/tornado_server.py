"""Serve the tests' project with tornado's WSGI container: `tornado_server.py PORT`."""

import asyncio
import sys

from tornado.httpserver import HTTPServer
from tornado.wsgi import WSGIContainer

from tests.project.wsgi import application


async def main() -> None:
    """Serve without end. The container calls the application in the event loop's thread."""
    HTTPServer(WSGIContainer(application)).listen(int(sys.argv[1]), "127.0.0.1")
    await asyncio.Event().wait()


asyncio.run(main())
