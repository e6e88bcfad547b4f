"""
nginx as a proxy in front of a server, with buffering and gzip as Linux packages configure them.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trustme

from tests.support.paths import ROOT
from tests.support.programs import require
from tests.support.servers import free_port, is_listening
from tests.support.waiting import LIMIT, wait_until

CONFIGURATION = """
{user}
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{}}
http {{
  log_format short "$status $request_uri";
  access_log {directory}/access.log short;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  types {{ text/css css; text/javascript js; }}
  gzip on;
  gzip_proxied any;
  gzip_types text/event-stream;
  proxy_set_header Host $http_host;
  proxy_set_header X-Forwarded-Proto $scheme;
  server {{
    listen 127.0.0.1:{port};
    listen 127.0.0.1:{tls_port} ssl http2;
    ssl_certificate {directory}/certificate.pem;
    ssl_certificate_key {directory}/key.pem;
    if (-f {directory}/unavailable) {{ return 503; }}
    location / {{ proxy_pass http://127.0.0.1:{upstream}; }}
    location /app/static/ {{ alias {static}/; }}
    location /app/ {{ proxy_pass http://127.0.0.1:{upstream}/; }}
  }}
}}
"""


class Nginx:
    """An nginx process that forwards `/` and `/app/` to the local port `upstream`."""

    def __init__(self, directory: Path, upstream: int) -> None:
        self._directory = directory
        self.port, self.tls_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.tls_url = f"https://127.0.0.1:{self.tls_port}"
        path = f"{os.environ['PATH']}:/usr/sbin"  # Debian installs nginx there.
        self._program = require(shutil.which("nginx", path=path), "nginx")
        self._process: subprocess.Popen[bytes] | None = None
        certificate = trustme.CA().issue_cert("127.0.0.1")
        certificate.private_key_pem.write_to_path(directory / "key.pem")
        certificate.cert_chain_pems[0].write_to_path(directory / "certificate.pem")
        configuration = CONFIGURATION.format(
            directory=directory,
            port=self.port,
            tls_port=self.tls_port,
            upstream=upstream,
            static=ROOT / "static",
            # As root, nginx would switch to a user that cannot read `directory`.
            user="user root;" if os.geteuid() == 0 else "",
        )
        (directory / "nginx.conf").write_text(configuration)

    @property
    def answers(self) -> list[int]:
        """Return the HTTP statuses of all completed requests for event streams."""
        lines = (self._directory / "access.log").read_text().splitlines()
        return [int(line.partition(" ")[0]) for line in lines if "/tasks/events/" in line]

    @property
    def unavailable(self) -> bool:
        """
        Return whether nginx answers every request with status 503; tests may set this property.
        """
        return self._flag.exists()

    @unavailable.setter
    def unavailable(self, value: bool) -> None:
        self._flag.touch() if value else self._flag.unlink()

    @property
    def _flag(self) -> Path:
        return self._directory / "unavailable"

    def start(self) -> None:
        command = [self._program, "-p", self._directory, "-c", self._directory / "nginx.conf"]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(lambda: is_listening(self.port), "nginx does not start")

    def stop(self) -> None:
        """Stop nginx and wait until it has ended; nginx closes every connection."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(LIMIT)


@contextmanager
def nginx(directory: Path, upstream: int) -> Iterator[Nginx]:
    """
    Run nginx with its files in `directory` as a proxy for the port `upstream`; stop it afterwards.
    """
    directory.mkdir()
    proxy = Nginx(directory, upstream)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
