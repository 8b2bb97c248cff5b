"""The web server's way in: pages and REST through Django, live events through websockets."""

import os
from pathlib import Path

import django
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from channels.sessions import CookieMiddleware
from django.conf import settings
from django.core.asgi import get_asgi_application

from jobs.light import absent, unopened

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")
# ninja wants one signal out of Django's test tools, which are larger than itself; the admin's library looks for PostgreSQL.
with absent(*settings.BONSAI_UNUSED_DRIVERS), unopened("django.test", Path(django.__file__).parent / "test"):
    pages = get_asgi_application()  # sets Django up, so everything below may import models

from jobs.limits import BodyLimit
from jobs.routing import websocket_urlpatterns

application = ProtocolTypeRouter(
    {
        "http": BodyLimit(pages),  # type: ignore[arg-type]  # Django spells the same protocol with dict
        "websocket": AllowedHostsOriginValidator(CookieMiddleware(URLRouter(websocket_urlpatterns))),
    }
)
