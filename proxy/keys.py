"""Client keys: kept as SHA-256 digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence

from pydantic import SecretStr

from proxy.errors import AuthenticationError

_HASHED = "sha256:"
CREDENTIAL_HEADERS = frozenset({"authorization", "api-key"})


class KeyRing:
    """The keys that clients may present. Empty: everyone may come in. Raises `ValueError` for a malformed hash."""

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._digests = tuple(_digest(key.get_secret_value()) for key in keys)

    def check(self, headers: Mapping[str, str]) -> None:
        """`headers` has lower-case names. Raises `AuthenticationError`."""
        if not self._digests:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("api-key", "")
        if not key:
            raise AuthenticationError(
                "No API key: send it as `Authorization: Bearer KEY`", headers={"www-authenticate": "Bearer"}
            )
        presented = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        # Every digest is compared, so that the time taken says nothing about which one came close.
        matches = [hmac.compare_digest(presented, digest) for digest in self._digests]
        if not any(matches):
            raise AuthenticationError("This API key is not known here", headers={"www-authenticate": "Bearer"})

    @property
    def guards(self) -> bool:
        """Some key is needed."""
        return bool(self._digests)


def _digest(key: str) -> bytes:
    if not key.startswith(_HASHED):
        return hashlib.sha256(key.encode()).digest()
    hexadecimal = key.removeprefix(_HASHED)
    if not re.fullmatch(r"[0-9a-fA-F]{64}", hexadecimal):
        raise ValueError("server.api_keys: what follows `sha256:` must be 64 hexadecimal digits")
    return bytes.fromhex(hexadecimal)
