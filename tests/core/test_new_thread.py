"""Every thread of this package starts in an empty context."""

import ast
import subprocess
import sys
from contextvars import ContextVar, copy_context

import pytest

from django_tasks_local.new_thread import new_thread
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT

variable: ContextVar[str] = ContextVar("variable")


def contexts_of_a_new_thread() -> tuple[int, int]:
    """Set a variable, start a thread; return the sizes of this context and of the thread's."""
    variable.set("a value of the starting thread")
    sizes: list[int] = []
    thread = new_thread("test-context", lambda: sizes.append(len(copy_context())))
    thread.start()
    thread.join(LIMIT)
    return len(copy_context()), sizes[0]


def test_a_new_thread_has_an_empty_context() -> None:
    """A new thread does not see the context variables of the thread that starts it."""
    own, of_thread = contexts_of_a_new_thread()
    assert own
    assert not of_thread


@pytest.mark.skipif(
    sys.version_info < (3, 14), reason="before Python 3.14 no thread inherits a context"
)
def test_a_new_thread_has_an_empty_context_where_threads_inherit() -> None:
    """The options of Python 3.14 that let threads inherit contexts do not apply to new_thread()."""
    options = ("-X", "thread_inherit_context=1", "-X", "context_aware_warnings=1", "-W", "error")
    run = subprocess.run(
        (sys.executable, *options, "-m", __name__),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    own, inherited = run.stdout.split()
    assert int(own)
    assert inherited == "0", run.stderr


@pytest.mark.parametrize("package", ["django_tasks_local", "django_tasks_local_sse"])
def test_only_new_thread_creates_threads(package: str) -> None:
    """No other module of the packages calls threading.Thread(), whose thread may inherit."""
    callers = {
        path.name
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("threading.Thread", "Thread")
    }
    assert callers <= {"new_thread.py"}


if __name__ == "__main__":
    print(*contexts_of_a_new_thread())  # noqa: T201 - read by the test that starts this process
