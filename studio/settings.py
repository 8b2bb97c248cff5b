"""Settings. Everything that a machine may decide differently comes from the environment; docs/operators.md lists the names."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import environ

from jobs.light import absent

env = environ.Env()
REDIS_URL = env.str("REDIS_URL", default="")
DATABASE_URL = env.str("DATABASE_URL", default="")

# Libraries load the driver of every store that they know: 17 MB in each process, for stores that this installation does not use.
BONSAI_UNUSED_DRIVERS = [driver for driver, used in (("redis", REDIS_URL), ("psycopg", DATABASE_URL)) if not used]
with absent(*BONSAI_UNUSED_DRIVERS):
    from jobs.serializer import JsonSerializer

BASE_DIR = Path(__file__).resolve().parent.parent


def _private_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def _secret_key(path: Path) -> str:
    """The key of this installation, made once and readable by its owner only. Two processes that start together agree on one."""
    if not path.exists():
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(64))
        try:
            os.link(beside, path)
        except FileExistsError:
            pass
        finally:
            beside.unlink()
    return path.read_text(encoding="ascii").strip()


BONSAI_HOME = _private_folder(Path(env.str("BONSAI_HOME", default=str(BASE_DIR / "var"))).expanduser().resolve())
SECRET_KEY = env.str("BONSAI_SECRET_KEY", default="") or _secret_key(BONSAI_HOME / "secret_key")
DEBUG = env.bool("BONSAI_DEBUG", default=False)

BONSAI_HOST = env.str("BONSAI_HOST", default="127.0.0.1")
BONSAI_PORT = env.int("BONSAI_PORT", default=8000)
BONSAI_ENGINE_SOCKET = env.str("BONSAI_ENGINE_SOCKET", default="")
BONSAI_GRACE_SECONDS = env.float("BONSAI_GRACE_SECONDS", default=30.0)
BONSAI_LEASE_SECONDS = env.float("BONSAI_LEASE_SECONDS", default=30.0)
BONSAI_MAX_WAITING_JOBS = env.int("BONSAI_MAX_WAITING_JOBS", default=200)
BONSAI_KEEP_EVENTS = env.int("BONSAI_KEEP_EVENTS", default=200_000)
BONSAI_FORWARD = env.list("BONSAI_FORWARD", default=[])  # trackers that are sent the curves of runs

# The loopback names always work; a server adds its own. A foreign name is how DNS rebinding would come in.
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]", *env.list("BONSAI_ALLOWED_HOSTS", default=[])]
CSRF_TRUSTED_ORIGINS = env.list("BONSAI_ORIGINS", default=[])
BONSAI_HTTPS = env.bool("BONSAI_HTTPS", default=False)
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = BONSAI_HTTPS
SECURE_HSTS_SECONDS = 31_536_000 if BONSAI_HTTPS else 0
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if BONSAI_HTTPS else None
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Lax"
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
CONTENT_SECURITY_POLICY = {
    "default-src": "'self'",
    "script-src": "'self'",
    "style-src": "'self' 'unsafe-inline'",  # charts set their styles from scripts
    "img-src": "'self' data: blob:",
    "font-src": "'self'",
    "connect-src": "'self'",
    "object-src": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
    "frame-ancestors": "'none'",
}
# The admin's library evaluates the expressions in its own templates; nothing that a person typed is ever one of them.
ADMIN_CONTENT_SECURITY_POLICY = CONTENT_SECURITY_POLICY | {"script-src": "'self' 'unsafe-eval'"}

INSTALLED_APPS = [
    "unfold",
    "unfold.contrib.filters",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.humanize",
    "channels",
    "django_htmx",
    "huey.contrib.djhuey",
    "ninja",
    "jobs",
    "studio.pages",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "studio.middleware.SecurityHeaders",
    "studio.middleware.CompressPages",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "studio.middleware.DatabaseAway",
]

ROOT_URLCONF = "studio.urls"
ASGI_APPLICATION = "studio.asgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "studio.pages.context.frame",
            ],
        },
    },
]

_SQLITE: dict[str, Any] = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": BONSAI_HOME / "db.sqlite3",
    "OPTIONS": {
        # A transaction that reads and then writes takes the write lock at once; otherwise it can fail in the middle.
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA temp_store=MEMORY;",
    },
    # A file, because the tests use several threads; its own for each process, because several people may test at once.
    "TEST": {"NAME": Path(tempfile.gettempdir()) / f"bonsai-test-{os.getpid()}.sqlite3"},
}
DATABASES = {"default": env.db_url("DATABASE_URL") if DATABASE_URL else _SQLITE}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# `immediate` is set by hand: huey's default follows DEBUG and would train inside a web request.
# A short, constant wait between looks is only the net; jobs.wake rings the bell.
HUEY: dict[str, Any] = {
    "name": "bonsai",
    "immediate": False,
    "results": False,
    "serializer": JsonSerializer(),
    "consumer": {"worker_type": "thread", "initial_delay": 0.5, "backoff": 1.15, "max_delay": 2.0},
}
if REDIS_URL:
    HUEY |= {"huey_class": "huey.RedisHuey", "url": REDIS_URL}
else:
    HUEY |= {"huey_class": "huey.SqliteHuey", "filename": str(BONSAI_HOME / "huey.sqlite3"), "timeout": 20}

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "studio.passwords.CommonPasswordValidator"},
]
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "/"
LOGOUT_REDIRECT_URL = "/"

LANGUAGE_CODE = "en-us"
TIME_ZONE = env.str("BONSAI_TIME_ZONE", default="UTC")
USE_TZ = True
USE_I18N = False

STATIC_URL = "/static/"
STATICFILES_DIRS = [BASE_DIR / "static"]
STATICFILES_FINDERS = [
    "django.contrib.staticfiles.finders.FileSystemFinder",
    "django.contrib.staticfiles.finders.AppDirectoriesFinder",
    "studio.finders.PlotlyFinder",
]
WHITENOISE_USE_FINDERS = True  # nothing to collect: files are served from where they lie
WHITENOISE_AUTOREFRESH = DEBUG
WHITENOISE_ALLOW_ALL_ORIGINS = False
WHITENOISE_MAX_AGE = 0 if DEBUG else 600

UNFOLD = {
    "SITE_TITLE": "Bonsai Studio",
    "SITE_HEADER": "Bonsai Studio",
    "SITE_URL": "/",
    "SHOW_HISTORY": True,
}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)-7s %(name)s: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": env.str("BONSAI_LOG_LEVEL", default="INFO")},
    "loggers": {"huey": {"level": "WARNING"}, "django.channels.server": {"level": "WARNING"}},
}
