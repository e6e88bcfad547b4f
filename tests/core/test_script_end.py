"""The end of a script and its signals: which of its tasks run to completion, and which are lost."""

import sys
import threading

import pytest

from tests.support.exit_scripts import ENDED_BY, run_script

# The first task of this backend with one worker runs until the main program has ended, so that the
# tasks after it wait at that point.
TASKS = """
import asyncio
from concurrent.futures import ThreadPoolExecutor
from asgiref.sync import sync_to_async
from django.tasks import task

@task(backend="other")
def until_exit():
    while not shutdown._exit.exiting:
        time.sleep(0.001)

@task(backend="other")
def sync():
    say("sync")

@task(backend="other")
async def coroutine():
    await sync_to_async(say)("coroutine")
    await asyncio.to_thread(say, "to_thread")

@task(backend="other")
def loop():
    asyncio.run(coroutine.func())

@task(backend="other")
def executor():
    with ThreadPoolExecutor() as threads:
        threads.submit(say, "executor").result()

@task(backend="other")
def follow_up():
    sync.enqueue()

until_exit.enqueue()
"""
# Python 3.12 starts no thread after the main thread has ended.
STARTS_THREADS = sys.version_info >= (3, 13)


def test_python_has_the_hook_that_executors_use() -> None:
    assert hasattr(threading, "_register_atexit")


def test_waiting_tasks_run_at_end_of_script() -> None:
    """All waiting tasks run when a script ends, also one that another task enqueues then."""
    kinds = ["follow_up", "sync"]
    if STARTS_THREADS:
        kinds += ["coroutine", "loop", "executor"]
    done = run_script(TASKS + "\n".join(f"{kind}.enqueue()" for kind in kinds))
    assert (done.returncode, done.stderr) == (0, "")
    expected = ["sync", "sync"]
    if STARTS_THREADS:
        expected += ["coroutine", "to_thread", "coroutine", "to_thread", "executor"]
    assert sorted(done.stdout.split()) == sorted(expected)


@pytest.mark.parametrize("kind", ["sync", "coroutine", "loop", "executor"])
def test_running_task_finishes_at_end_of_script(kind: str) -> None:
    """A task that runs at the end of a script may use executors and event loops afterwards."""
    if kind != "sync" and not STARTS_THREADS:
        pytest.skip("Python 3.12 starts no thread after the main thread has ended.")
    done = run_script(
        TASKS
        + f"""
@task
def slow():
    say("running")
    started.set()
    until_exit.func()
    work = {kind}.func
    work() if {kind!r} != "coroutine" else asyncio.run(work())
    say("end")

started = threading.Event()
slow.enqueue()
started.wait(20)
"""
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[-1] == "end"


@pytest.mark.parametrize(
    "end",
    [
        "sys.exit(1)",
        "raise OSError('the main program fails')",
        "raise KeyboardInterrupt",
        "signal.signal(signal.SIGTERM, lambda *args: None)",
        "from django.core.signals import request_started; request_started.send(None)",
        (
            "from django.urls import set_urlconf; set_urlconf('urls'); "
            "from django.tasks import task_backends; del task_backends['other']; sync.enqueue()"
        ),
        (
            "from django.test.utils import setup_test_environment, teardown_test_environment; "
            "setup_test_environment(); sync.enqueue(); teardown_test_environment()"
        ),
        (
            "os.environ['RUN_MAIN'] = 'true'; from django.tasks import task_backends; "
            "del task_backends['other']; sync.enqueue()"
        ),
    ],
)
def test_waiting_tasks_are_lost(end: str) -> None:
    """
    After a failure, in a process that serves or tests, and if another handler has replaced ours,
    waiting tasks do not run at exit.
    """
    # The first task never ends, so that no other one can start between the end and the drain.
    blocked = TASKS.replace("while not shutdown._exit.exiting", "while True")
    done = run_script(f"{blocked}\nsync.enqueue()\n{end}")
    assert done.stdout == ""
    assert "these tasks are lost" in done.stderr
    assert ".sync)" in done.stderr


@pytest.mark.parametrize("number", ENDED_BY)
def test_signal_during_final_tasks(number: int) -> None:
    """A signal that arrives while the final tasks run lets the running one finish, and no other."""
    done = run_script(
        TASKS
        + f"""
from django.tasks import task_backends

@task(backend="other")
def send_signal():
    signal_handlers.send_to_this_process({number:d})
    while task_backends["other"].statistics().waiting:
        time.sleep(0.001)
    say("finished")
send_signal.enqueue()
sync.enqueue()
"""
    )
    assert done.stdout == "finished\n", done.stderr
    assert "Traceback" not in done.stderr
    assert ".sync)" in done.stderr


SERVE = """
from django.core.signals import request_started
request_started.send(None)
from django.tasks import task
from django.tasks.signals import task_finished
"""


def test_second_sigterm_has_no_effect() -> None:
    """A running task may finish if SIGTERM is sent twice, as `uv run` does under systemd."""
    done = run_script(
        SERVE
        + """
@task
def work():
    started.set()
    twice.wait(20)
    say("finished")

started, twice = threading.Event(), threading.Event()
work.enqueue()
started.wait(20)
signal.raise_signal(signal.SIGTERM)
signal.raise_signal(signal.SIGTERM)
twice.set()
linger()
""",
        timeout=20,
    )
    assert done.stdout == "finished\n", done.stderr
    assert "Waiting up to 20 s for 1 task(s): " in done.stderr
    assert done.returncode == ENDED_BY[15]


def test_second_ctrl_c_ends_the_wait() -> None:
    """A second Ctrl-C reports the running task as lost, long before SHUTDOWN_TIMEOUT."""
    done = run_script(
        SERVE
        + """
signal.signal(signal.SIGINT, lambda *args: os._exit(7))  # a server's handler
@task
def work():
    started.set()
    linger()

started = threading.Event()
work.enqueue()
started.wait(20)
signal.raise_signal(signal.SIGINT)
signal.raise_signal(signal.SIGINT)
linger()
""",
        timeout=1000,
    )
    assert done.returncode == 7, done.stderr
    assert ".work)" in done.stderr


def test_receiver_that_blocks_does_not_delay_the_report() -> None:
    """Lost tasks are logged, and the process ends, although a receiver never returns."""
    done = run_script(
        SERVE
        + """
def receive(**kwargs):
    threading.Event().wait()
task_finished.connect(receive)

@task(backend="other")
def work():
    started.set()
    linger()

started = threading.Event()
results = [work.enqueue() for _ in range(10)]
started.wait(20)
signal.raise_signal(signal.SIGTERM)
linger()
"""
    )
    assert done.returncode == ENDED_BY[15], done.stderr
    assert done.stderr.count(".work)") == 10 + 1  # the running one is also in the line "Waiting"


def test_own_handler_of_a_scheduler_is_called_first() -> None:
    """A command with its own handler, which serves nothing, may enqueue until it ends by itself."""
    done = run_script("""
signal.signal(signal.SIGTERM, lambda number, frame: say("told to end"))
tasks.noop.enqueue()
signal.raise_signal(signal.SIGTERM)
result = tasks.noop.enqueue()
from django_tasks_local.hub import hub
with hub.subscribe(result.id) as subscription:
    say([event.status for event in subscription][-1])
""")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "told to end\nSUCCESSFUL\n"
