"""
Signed tokens: each names one task, one user and one purpose.

A token is `<id>.<alias>.<user>.<time>.<signature>`. Its id and alias are percent-encoded, so that a
client can read them; its user is a keyed digest, empty in a bearer token, which works for every
client that has it. Each purpose has its own salt, so no token can replace one of another purpose.
"""

from __future__ import annotations

import base64
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote

from django.conf import settings
from django.core.signing import BadSignature, Signer, b62_decode, b62_encode
from django.utils.crypto import salted_hmac

if TYPE_CHECKING:
    from django_tasks_local.aliases import TaskKey

MAX_TOKEN_LENGTH = 1000  # characters; longer than any id and alias
USER_DIGEST_BYTES = 12  # The key keeps users from computing digests, so a short one is enough


class Purpose(StrEnum):
    """The purpose of a token, which is also the salt of its signature."""

    WATCH = "django_tasks_local_sse.watch"
    CANCEL = "django_tasks_local_sse.cancel"
    # Cancels a task without a CSRF token and for any client, as for programs and mails.
    CANCEL_BEARER = "django_tasks_local_sse.cancel-bearer"


class Token(NamedTuple):
    """The content of a token with a valid signature."""

    alias: str
    id: str
    user: str  # a digest of user_digests(), or empty in a bearer token
    made_at: int  # seconds since the epoch

    @property
    def age(self) -> float:
        """The age of the token in seconds; below 0 if a clock was set back."""
        return time.time() - self.made_at


def make_token(purpose: Purpose, alias: str, id: str, user: str = "") -> str:
    """Return a new token; `user` is a digest of user_digests(), or empty for a bearer token."""
    parts = _quote(id), _quote(alias), user, b62_encode(int(time.time()))
    return _signer(purpose).sign(".".join(parts))


def read_token(purpose: Purpose, text: str) -> Token | None:
    """Return the content of a token of any age, or None if it was not made for this purpose."""
    if len(text) > MAX_TOKEN_LENGTH:
        return None
    try:
        id, alias, user, made_at = _signer(purpose).unsign(text).split(".")
    except (BadSignature, UnicodeEncodeError):
        # UnicodeEncodeError: Django decodes a request with the charset of its Content-Type header,
        # and some charsets, such as unicode_escape, yield surrogates.
        return None
    return Token(unquote(alias), unquote(id), user, b62_decode(made_at))


def claimed_key(text: str) -> TaskKey:
    """Return the alias and the id that a token names, whether or not its signature is valid."""
    id, alias, *_ = (*text[:MAX_TOKEN_LENGTH].split(".", 2), "")
    return unquote(alias), unquote(id)


def user_digests(user: Any) -> tuple[str, ...]:
    """
    Return the digests of a user: that of new tokens, then those by SECRET_KEY_FALLBACKS.

    `user` is None for an anonymous visitor, whose only digest is empty. Two models of users may
    both have a primary key 1, so the digest contains the model too.
    """
    if user is None:
        return ("",)
    options = getattr(user, "_meta", None)
    if options is None:  # an object that a middleware made, such as the user of a JSON Web Token
        model = f"{user.__class__.__module__}.{user.__class__.__qualname__}"
    else:
        model = options.label_lower
    keys = (settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS)
    return tuple(_digest(f"{model}:{user.pk}", key) for key in keys)


def _digest(value: str, key: str | bytes) -> str:
    mac = salted_hmac("django_tasks_local_sse.user", value, secret=key, algorithm="sha256")
    return base64.urlsafe_b64encode(mac.digest()[:USER_DIGEST_BYTES]).decode()


def _signer(purpose: Purpose) -> Signer:
    return Signer(sep=".", salt=purpose)


def _quote(part: str) -> str:
    return quote(part, safe="").replace(".", "%2E")
