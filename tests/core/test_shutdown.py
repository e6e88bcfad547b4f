"""
Signal handlers and the exit of scripts; tests/servers/test_exit.py covers the exit of servers.
"""

import signal
import subprocess
import sys

import pytest

from tests.support.exit_scripts import ENDED_BY, run_script
from tests.support.paths import ROOT
from tests.support.systems import needs_fork


def test_warning_of_missing_handler() -> None:
    """A pool that is created in a thread cannot install the handler for SIGTERM."""
    body = """
signal.signal(signal.SIGTERM, {handler})
for alias in ("default", "other"):
    enqueue = tasks.noop.using(backend=alias).enqueue
    thread = threading.Thread(target=enqueue)
    thread.start()
    thread.join()
"""
    log = run_script(body.format(handler="signal.SIG_DFL")).stderr
    assert log.count("Add 'django_tasks_local' to INSTALLED_APPS") == 1
    assert run_script(body.format(handler="lambda *args: None")).stderr == ""


def test_signal_is_sent_to_main_thread() -> None:
    """Another thread never takes the signal, not even while the main thread blocks it."""
    done = run_script("""
signal.signal(signal.SIGTERM, lambda number, frame: say("handled"))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
def send():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal_handlers.send_to_this_process(signal.SIGTERM)
thread = threading.Thread(target=send)
thread.start()
thread.join()
say(signal.SIGTERM in signal.sigpending())
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
""")
    assert (done.stdout, done.stderr) == ("True\nhandled\n", "")


def test_app_installs_handlers() -> None:
    """The optional app installs the handlers in the thread of django.setup()."""
    code = """
import signal, django
from django.conf import settings
settings.configure(INSTALLED_APPS=["django_tasks_local"])
django.setup()
print(type(signal.getsignal(signal.SIGTERM)).__module__)
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "django_tasks_local.signal_handlers\n"


def test_handlers_of_others_stay_in_the_chain() -> None:
    """
    Installing the handlers again keeps a handler that wraps them: SIGTERM calls it exactly once.
    """
    done = run_script("""
tasks.noop.enqueue()
before = signal.getsignal(signal.SIGTERM)
def wrapper(number, frame):
    say("wrapper")
    before(number, frame)
signal.signal(signal.SIGTERM, wrapper)
signal_handlers.install_signal_handlers()
signal_handlers.install_signal_handlers()
signal.raise_signal(signal.SIGTERM)
linger()
""")
    assert done.returncode == ENDED_BY[signal.SIGTERM], done.stderr
    assert done.stdout == "wrapper\n"


@pytest.mark.parametrize("number", ENDED_BY)
def test_script_ends_by_the_signal(number: signal.Signals) -> None:
    done = run_script(f"""
tasks.noop.enqueue()
signal.raise_signal({number:d})
linger()
""")
    assert done.returncode == ENDED_BY[number], done.stderr
    assert "RecursionError" not in done.stderr


@pytest.mark.parametrize("first", ["main()", "asyncio.run(amain())"])
def test_tasks_run_after_caught_ctrl_c(first: str) -> None:
    """
    A script that catches KeyboardInterrupt can still run tasks, also after it used asyncio.run().
    """
    done = run_script(f"""
import asyncio
def main():
    tasks.noop.enqueue()
async def amain():
    main()
{first}
try:
    signal.raise_signal(signal.SIGINT)
    linger()
except KeyboardInterrupt:
    say("caught")
from django_tasks_local.hub import hub
with hub.subscribe(tasks.noop.enqueue().id) as subscription:
    say([event.status for event in subscription][-1])
""")
    assert done.stdout == "caught\nSUCCESSFUL\n", done.stderr


@needs_fork
def test_forked_child_dies_of_sigterm() -> None:
    """
    SIGTERM kills a forked child even before it runs Python code, as multiprocessing.Pool requires.
    """
    done = run_script(
        """
tasks.noop.enqueue()
import warnings
warnings.simplefilter("ignore")  # Python warns of fork() in a process with threads.
pid = os.fork()
if pid == 0:
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
    os._exit(3)
assert held == [set(signal_handlers.SIGNALS)]
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
assert isinstance(signal.getsignal(signal.SIGTERM), signal_handlers._Handler)
# Or a handler that raises could keep them blocked.
assert isinstance(signal_handlers._unblock_signals.func, type(len))
say(os.waitpid(pid, 0)[1])
""",
        # `before` hooks run in reverse order of registration, so this hook runs last before the
        # fork.
        before="""
held = []
blocked = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ())
os.register_at_fork(before=lambda: held.append(blocked()))
""",
    )
    assert done.stdout == f"{signal.SIGTERM:d}\n", done.stderr


def test_new_pool_is_refused_after_drain() -> None:
    done = run_script("""
tasks.noop.enqueue()
shutdown.drain()
from django_tasks_local import ShuttingDown
for alias in ("default", "other"):
    try:
        tasks.noop.using(backend=alias).enqueue()
    except ShuttingDown as error:
        say(error)
""")
    assert done.stdout.count("is shutting down; task tests.project.tasks.noop was not") == 2
    assert done.returncode == 0, done.stderr


def test_drain_refuses_tasks_in_all_pools_at_once() -> None:
    """
    While a drain fails the waiting tasks of one pool, no other pool accepts a task that is lost.
    """
    done = run_script("""
import tempfile
from django.tasks.signals import task_finished
from django_tasks_local import ShuttingDown
gate = tempfile.mktemp()
tasks.gates[gate] = tasks.Gate(gate)
def enqueue(task_result, **kwargs):
    for alias in ("default", "other"):
        try:
            tasks.noop.using(backend=alias).enqueue()
        except ShuttingDown:
            say("refused")
for alias in ("default", "other"):
    for _ in range(11):
        tasks.gated.using(backend=alias).enqueue(gate)
task_finished.connect(enqueue)
shutdown.drain()
os._exit(0)
""")
    # Two threads of the notifier may write at the same time, so a line may have two words.
    assert set(done.stdout.replace("refused", "refused ").split()) == {"refused"}, done.stderr
    assert "noop" not in done.stderr


def test_exit_names_lost_tasks() -> None:
    done = run_script("""
import tempfile
gate = tempfile.mktemp()
tasks.gates[gate] = tasks.Gate(gate)
results = [tasks.gated.enqueue(gate) for _ in range(11)]
say(results[-1].id)
sys.exit(3)
""")
    assert done.returncode == 3, done.stderr
    lost = "\n".join(line for line in done.stderr.splitlines() if "are lost" in line)
    assert f"{done.stdout.strip()} (tests.project.tasks.gated)" in lost
    assert lost.count("tests.project.tasks.gated") == 11


def test_coroutine_may_finish_at_exit() -> None:
    """
    A coroutine that has used threads can finish at exit, when the interpreter starts no new
    threads.
    """
    done = run_script("""
import asyncio
from asgiref.sync import sync_to_async
from django.tasks import task
from django.tasks.signals import task_finished

def receive(task_result, **kwargs):
    say(task_result.errors[0].traceback if task_result.errors else task_result.status)
task_finished.connect(receive)

used = threading.Event()
@task(backend="other")
async def last_words():
    await asyncio.gather(sync_to_async(int)(), asyncio.to_thread(int))
    used.set()
    while not shutdown._exit.exiting:
        await asyncio.sleep(0.001)

last_words.enqueue()
used.wait(20)
""")
    assert (done.returncode, done.stdout) == (0, "SUCCESSFUL\n"), done.stderr


@needs_fork
def test_child_forked_by_task_runs_no_tasks() -> None:
    """
    A child that a task forks has a copy of the queue and of its worker thread, but runs no queued
    task.
    """
    done = run_script("""
import warnings
from django.tasks import task
from django_tasks_local.hub import hub

@task(backend="other")
def forks(gate):
    warnings.simplefilter("ignore")  # Python warns of fork() in a process with threads.
    tasks.wait_for(gate)
    return os.fork()

@task(backend="other")
def speak():
    say(os.getpid())

import tempfile
gate = tempfile.mktemp()
tasks.gates[gate] = tasks.Gate(gate)
first = forks.enqueue(gate)
results = [first, *(speak.enqueue() for _ in range(3))]
tasks.gates[gate].set()
with hub.subscribe(*(result.id for result in results)) as subscription:
    list(subscription)
first.refresh()
assert os.waitpid(first.return_value, 0)[1] == 0
""")
    assert (done.returncode, done.stderr) == (0, "")
    pids = done.stdout.split()
    assert len(pids) == 3
    assert len(set(pids)) == 1


def test_drain_continues_after_failed_pool() -> None:
    done = run_script("""
from django_tasks_local import pools
from django_tasks_local.hub import hub
tasks.noop.enqueue()
tasks.noop.using(backend="other").enqueue()
first, second = pools._pools.values()
def fail():
    raise OSError("no memory")
first.refuse = fail
shutdown.drain()
say(f"{hub.ended} {second.closed}")
""")
    assert done.stdout == "True True\n"
    assert "no memory" in done.stderr
