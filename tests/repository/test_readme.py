"""Tests that the code blocks of the documentation run and that the README names each option."""

import os
import re
import subprocess
import sys
from pathlib import Path

import django_tasks_local
from django_tasks_local.conf import ProcessOptions
from django_tasks_local_sse.conf import FIELDS
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text()
HTTP = (ROOT / "docs" / "http.md").read_text()
DATABASES = (ROOT / "docs" / "databases.md").read_text()


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the code blocks of a Markdown text as pairs of language and code."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# Settings that the code blocks need and that the README does not show.
REST_OF_SETTINGS = """
from pathlib import Path
BASE_DIR = Path(__file__).parent
SECRET_KEY = "only for this test"
ALLOWED_HOSTS = ["testserver"]
ROOT_URLCONF = "urls"
STATIC_URL = "static/"
TEMPLATES = [{
    "BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True,
    "OPTIONS": {"context_processors": ["django.template.context_processors.request"]},
}]
"""
MODELS = """
from django.db import models


class Report(models.Model):
    owner = models.CharField(null=True)
    result_id = models.CharField(primary_key=True)
"""

DRIVER = """
import re
import django


def main():
    django.setup()
    from django.core.management import call_command
    from django.test import Client
    call_command("check", fail_level="WARNING")
    call_command("migrate", run_syncdb=True, verbosity=0)

    page = Client().get("/report/").content.decode()
    url = re.search(r'<task-progress src="([^"]+)"', page)[1].replace("&amp;", "&")
    assert "/static/django_tasks_local_sse/task-progress.js" in page

    from reports.cancelling import stop
    from reports.current import my_task
    from reports.progress import every_way
    from reports.watching import wait_for

    result = my_task.enqueue()
    assert wait_for(result).status == "SUCCESSFUL"
    result.refresh()
    assert result.return_value == result.id
    assert stop(result) is False

    from reports.again import run_again
    again = run_again(result)
    assert again.return_value == again.id != result.id

    from reports.computing import render_pages
    result = render_pages.enqueue(3)
    last = wait_for(result)
    assert (last.status, last.progress.percent) == ("SUCCESSFUL", 100.0)

    result = every_way.enqueue(["a", "b", "c"])
    last = wait_for(result)
    progress = last.progress
    assert last.status == "SUCCESSFUL"
    assert (progress.current, progress.total, progress.message) == (3, 3, "Row c")
    assert progress.data == {"stage": "upload"}

    from reports.threads import convert_all
    last = wait_for(convert_all.enqueue(3))
    progress = last.progress
    assert last.status == "SUCCESSFUL"
    assert (progress.current, progress.total) == (3, 3)
    assert progress.message in ("Page 0", "Page 1", "Page 2")

    import threading
    from http.server import HTTPServer, SimpleHTTPRequestHandler
    from reports.clients import fetch
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for _ in range(2):
            fetched = fetch.enqueue([f"http://127.0.0.1:{server.server_port}/"] * 2)
            wait_for(fetched)
            fetched.refresh()
            assert fetched.return_value == [200, 200]
        server.shutdown()

    from django_tasks_local.hub import hub
    hub.release(hub.find(result.id))
    assert wait_for(result, timeout=0.01) is None

    # In an async view, with a user that requires a query.
    import asyncio
    from types import SimpleNamespace
    from django.test import RequestFactory
    from django.utils.functional import SimpleLazyObject
    from reports import async_views
    from reports.models import Report
    request = RequestFactory().get("/")
    request.user = SimpleLazyObject(
        lambda: SimpleNamespace(is_authenticated=not Report.objects.exists(), pk=1)
    )
    assert b"<task-progress" in asyncio.run(async_views.report(request)).content

    # The channel manager of docs/deployment.md.
    assert Client().get(url).status_code == 403
    from django.test import override_settings
    from reports.channels import ChannelManager
    report = Report.objects.create(owner="ada", result_id=re.search(r"task=([^.]+)", url)[1])
    may = {user: ChannelManager().can_read_channel(user, f"task-{report.pk}")
           for user in ("ada", "bob", None)}
    assert may == {"ada": True, "bob": False, None: False}

    # The transaction of docs/databases.md.
    from reports.orders import save
    from django_tasks_local.testing import collect_progress, wait_until_idle
    from reports.tasks import build_report
    with collect_progress(build_report) as events:
        save(Report(owner="bob", result_id="1"))
        wait_until_idle()
    assert events[-1].progress.message == "Page 20"

    body = ""
    default = "django_eventstream.channelmanager.DefaultChannelManager"
    with override_settings(EVENTSTREAM_CHANNELMANAGER_CLASS=default):
        while "event: finished" not in body:
            body = b"".join(Client().get(url).streaming_content).decode()
    assert '"message":"Page 20"' in body

    # The receivers of docs/deployment.md.
    import reports.tracing
    from reports.tasks import build_report

    # The view of docs/http.md.
    import json
    from reports import api
    with override_settings(EVENTSTREAM_CHANNELMANAGER_CLASS=default):
        links = json.loads(api.start(RequestFactory().post("/")).content)
        [payload] = Client().get(links["status_url"]).json()["tasks"]
        assert (payload["id"], payload["name"]) == (links["id"], "build_report")
        client = Client(enforce_csrf_checks=True)
        response = client.post(links["cancel_url"], {"task": links["cancel_token"]})
        assert "cancelled" in response.json()

    call_command("test", "reports", verbosity=0)


if __name__ == "__main__":  # worker processes import this file
    main()
"""


def test_code_blocks(tmp_path: Path) -> None:
    files: dict[str, str] = {"settings.py": REST_OF_SETTINGS}
    for language, block in [
        *blocks(README),
        *blocks(DEPLOYMENT),
        *blocks(HTTP),
        *blocks(DATABASES),
    ]:
        if language in {"python", "html"}:
            name = re.match(r"(?:# |<!-- )(\S+)", block)
            assert name is not None, f"the first line of a code block names no file: {block}"
            files[name[1]] = files.get(name[1], "") + block
    files["reports/__init__.py"] = ""
    files["reports/models.py"] = MODELS
    files["driver.py"] = DRIVER
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    environ = os.environ | {"DJANGO_SETTINGS_MODULE": "settings", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "driver.py"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_commands() -> None:
    """The README shows these commands, and `.ci/run` runs those that need a clone."""
    commands = [block.strip() for language, block in blocks(README) if language == "bash"]
    assert commands == [
        "pip install uv && uv run example.py",
        'pip install "django-tasks-local[sse]"',
        "uv run pytest",
    ]
    gate = (ROOT / ".ci" / "run").read_text()
    assert "uv run example.py" in gate
    assert "uv run pytest" in gate


def test_languages_of_blocks() -> None:
    assert {language for language, _ in blocks(README)} == {"bash", "html", "python"}
    assert {language for language, _ in blocks(DEPLOYMENT)} == {"nginx", "python"}
    assert {language for language, _ in blocks(HTTP)} == {"json", "python"}
    assert {language for language, _ in blocks(DATABASES)} == {"python"}


def test_options_are_documented() -> None:
    for option in ProcessOptions.__dataclass_fields__:
        assert f"| `{option.upper()}` |" in README
    for key in FIELDS:
        assert f'"{key}": ' in README


def test_checks_are_documented() -> None:
    sources = ("django_tasks_local/checks.py", "django_tasks_local_sse/checks.py")
    source = "".join(
        (ROOT / path).read_text() for path in (*sources, "django_tasks_local_sse/conf.py")
    )
    ids = set(re.findall(r"django_tasks_local\w*\.[EW]\d+", source))
    assert ids == set(re.findall(r"^\| `(\S+\.[EW]\d+)`", DEPLOYMENT, re.MULTILINE))


def test_public_names_are_documented() -> None:
    for name in django_tasks_local.__all__:
        assert name in README
