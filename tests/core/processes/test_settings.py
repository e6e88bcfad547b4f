"""Tests that a worker process has the settings of its parent."""

from pathlib import Path

import django
import pytest

from tests.support.site import Site

needs_mailers = pytest.mark.skipif(django.VERSION < (6, 1), reason="MAILERS is new in Django 6.1")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("MEDIA_ROOT", "", "/somewhere/else"),
        (
            "EMAIL_BACKEND",
            "django.core.mail.backends.smtp.EmailBackend",
            "django.core.mail.backends.locmem.EmailBackend",
        ),
    ],
)
def test_setting_overridden_after_a_worker_has_started(
    tmp_path: Path, name: str, before: str, after: str
) -> None:
    """A task sees the setting that is in force when it is enqueued; equal settings keep workers."""
    values = Site(tmp_path).program(
        f"""
import warnings
from django.test import override_settings
# Django 6.1 warns this program, which overrides the setting; its workers get no such filter.
warnings.filterwarnings("ignore", "The EMAIL_BACKEND setting is deprecated")
read = "[__import__('os').getpid(), settings._wrapped.{name}]"
report(run(evaluate, read))
with override_settings({name}={after!r}):
    report(run(evaluate, read))
report(run(evaluate, read))
with override_settings({name}={after!r}):
    pass
report(run(evaluate, read))
"""
    )
    assert [value for _, value in values] == [before, after, before, before]
    assert values[0][0] != values[1][0] != values[2][0] == values[3][0]


def test_setting_assigned_by_setup_test_environment(tmp_path: Path) -> None:
    """Django's test runner assigns EMAIL_BACKEND without a signal; no worker may send real mail."""
    values = Site(tmp_path).program(
        """
from django.test.utils import setup_test_environment, teardown_test_environment
read = "settings._wrapped.EMAIL_BACKEND.split('.')[-2]"
report(run(evaluate, read))
setup_test_environment()
report(run(evaluate, read))
teardown_test_environment()
report(run(evaluate, read))
"""
    )
    assert values == ["smtp", "locmem", "smtp"]


@needs_mailers
def test_mailers_under_setup_test_environment(tmp_path: Path) -> None:
    """Workers get MAILERS, and reading EMAIL_* neither warns nor raises on their way."""
    mailers = 'MAILERS = {"default": {"BACKEND": "django.core.mail.backends.smtp.EmailBackend"}}'
    values = Site(tmp_path, mailers).program(
        """
from django.test.utils import setup_test_environment, teardown_test_environment
read = "settings.MAILERS['default']['BACKEND'].split('.')[-2]"
report(run(evaluate, read))
setup_test_environment()
report(run(evaluate, read))
teardown_test_environment()
report(run(evaluate, read))
settings.MAILERS["default"]["BACKEND"] = "django.core.mail.backends.dummy.EmailBackend"
report(run(evaluate, read))
"""
    )
    assert values == ["smtp", "locmem", "smtp", "dummy"]


def test_database_added_after_the_settings_were_loaded(tmp_path: Path) -> None:
    """Workers have databases that ready() adds, and those that the program adds later."""
    site = Site(tmp_path)
    site.write(
        "site_app/apps.py",
        """
from django.apps import AppConfig
from django.conf import settings

class App(AppConfig):
    name = "site_app"
    def ready(self):
        default = settings.DATABASES["default"]
        settings.DATABASES["tenant_a"] = {**default, "NAME": "tenant_a.sqlite3"}
""",
    )
    values = site.program(
        """
read = "[str(connections[alias].settings_dict['NAME']) for alias in connections][1:]"
report(run(evaluate, read))
tenant_a = settings.DATABASES["tenant_a"]
settings.DATABASES["tenant_b"] = {**tenant_a, "NAME": "tenant_b.sqlite3"}
report(run(evaluate, read))
del settings.DATABASES["tenant_b"]
report(run(evaluate, read))
"""
    )
    a, b = "tenant_a.sqlite3", "tenant_b.sqlite3"
    assert values == [[a], [a, b], [a]]


def test_items_of_databases_that_cannot_be_pickled(tmp_path: Path) -> None:
    """Workers use the lambda and the SSLContext of the settings module, and the parent's HOST."""
    pytest.importorskip("psycopg", reason="psycopg has no wheel for this Python")
    values = Site(
        tmp_path,
        """
import ssl
DATABASES["other"] = {
    "ENGINE": "django.db.backends.postgresql",
    "NAME": "other",
    "HOST": "configured",
    "OPTIONS": {"ssl": ssl.create_default_context(), "password": lambda: "secret"},
}
""",
    ).program(
        """
settings.DATABASES["other"]["HOST"] = "replaced"
read = "(lambda other: [other['HOST'], type(other['OPTIONS']['ssl']).__name__, "
read += "other['OPTIONS']['password']()])(connections['other'].settings_dict)"
report(run(evaluate, read))
"""
    )
    assert values == [["replaced", "SSLContext", "secret"]]


def test_override_that_cannot_be_pickled_is_refused(tmp_path: Path) -> None:
    """A worker would use the value of the settings module, so enqueue() names the setting."""
    values = Site(tmp_path, 'CACHES = {"default": {"KEY_FUNCTION": lambda key: key}}').program(
        """
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings
report(run(evaluate, "settings.CACHES['default']['KEY_FUNCTION'](1)"))
caches = {"default": {"KEY_FUNCTION": lambda key: key + 1}}
for override in ({"CACHES": caches}, {"ODD": lambda: 1}):
    with override_settings(**override):
        try:
            evaluate.enqueue("1")
        except ImproperlyConfigured as error:
            report(str(error))
"""
    )
    assert values[0] == 1
    assert values[1].startswith(
        "CACHES['default']['KEY_FUNCTION'] cannot be sent to a worker process"
    )
    assert values[2].startswith("ODD cannot be sent to a worker process")


def test_item_added_in_place_that_cannot_be_pickled(tmp_path: Path) -> None:
    """
    A worker that lacks an item of its parent reports its path instead of running tasks.

    The parent has put the object into the dictionary of its settings module, so only a worker can
    notice that the settings module does not contain it.
    """
    values = Site(tmp_path).program(
        """
import logging, ssl
logging.disable()
options = settings.DATABASES["default"].setdefault("OPTIONS", {})
options["ssl"] = ssl.create_default_context()
report(run(evaluate, "1"))
"""
    )
    assert "DATABASES['default']['OPTIONS']['ssl'] cannot be sent to a worker process" in values[0]


def test_lazy_setting_is_not_evaluated(tmp_path: Path) -> None:
    """Neither enqueue() nor the start of a worker evaluates a SimpleLazyObject."""
    values = Site(
        tmp_path,
        """
from django.utils.functional import SimpleLazyObject
EVALUATED = []
LAZY = SimpleLazyObject(lambda: EVALUATED.append(1) or "value")
IN_A_LIST = [LAZY]
""",
    ).program(
        """
import site_settings
report(run(evaluate, "[__import__('site_settings').EVALUATED.copy(), str(settings.LAZY)]"))
report(site_settings.EVALUATED)
"""
    )
    assert values == [[[], "value"], []]


def test_settings_that_each_import_computes(tmp_path: Path) -> None:
    """A random SECRET_KEY, which each import makes anew, is the parent's in a worker."""
    key = "from django.core.management.utils import get_random_secret_key\n"
    key += "SECRET_KEY = get_random_secret_key()"
    values = Site(tmp_path, key).program(
        'report([settings.SECRET_KEY, run(evaluate, "settings.SECRET_KEY")])'
    )
    assert values[0][0] == values[0][1]


def test_setting_deleted_or_reset_to_its_default(tmp_path: Path) -> None:
    """A worker has neither a setting that the parent has deleted nor another DEBUG."""
    # With DEBUG, Django would write the record of the end of the task, which another thread makes.
    text = 'DEBUG = True\nLOGGING_CONFIG = None\nSERVICE = "real"'
    values = Site(tmp_path, text).program(
        """
from django.test import override_settings
with override_settings(DEBUG=False, SERVICE="none"):
    del settings.SERVICE
    report(run(evaluate, "[settings.DEBUG, hasattr(settings, 'SERVICE')]"))
"""
    )
    assert values == [[False, False]]


CLASS_SETTINGS = """
import sys
from types import ModuleType

class Importer:
    def find_spec(self, name, path=None, target=None):
        if name != "class_settings":
            return None
        from importlib.machinery import ModuleSpec
        return ModuleSpec(name, self)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        import site_settings
        vars(module).update({k: v for k, v in vars(site_settings).items() if k.isupper()})
        module.SERVICE = "from the importer"

def install():
    sys.meta_path.insert(0, Importer())
"""


def test_worker_setup_is_called_before_the_settings_are_imported(tmp_path: Path) -> None:
    """WORKER_SETUP installs an importer of settings, as django-configurations has one."""
    site = Site(
        tmp_path, 'TASKS["default"]["OPTIONS"]["WORKER_SETUP"] = "class_importer.install"\n'
    )
    site.write("class_importer.py", CLASS_SETTINGS)
    set_up = 'os.environ["DJANGO_SETTINGS_MODULE"] = "class_settings"; '
    set_up += "import class_importer; class_importer.install(); django.setup()"
    values = site.program('report(run(evaluate, "settings.SERVICE"))', set_up=set_up)
    assert values == ["from the importer"]


def test_django_configurations(tmp_path: Path) -> None:
    """Workers import the class of settings that DJANGO_CONFIGURATION names."""
    site = Site(
        tmp_path,
        """
from configurations import Configuration
TASKS["default"]["OPTIONS"]["WORKER_SETUP"] = "configurations.importer.install"

class Production(Configuration):
    SECRET_KEY = SECRET_KEY
    USE_TZ = True
    INSTALLED_APPS = INSTALLED_APPS
    DATABASES = DATABASES
    TASKS = TASKS
    SERVICE = "production"
""",
    )
    set_up = 'os.environ["DJANGO_CONFIGURATION"] = "Production"; '
    set_up += "import configurations; configurations.setup()"
    values = site.program(
        """
from django.test import override_settings
read = "[settings.SERVICE, settings.CONFIGURATION]"
report(run(evaluate, read))
with override_settings(SERVICE="test"):
    report(run(evaluate, read))
""",
        set_up=set_up,
        # Its importer has a deprecated method and defines deprecated settings of Django 6.1.
        warnings="ignore",
    )
    name = "site_settings.Production"
    assert values == [["production", name], ["test", name]]
