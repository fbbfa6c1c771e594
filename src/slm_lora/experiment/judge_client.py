"""HTTP client of an OpenAI-style chat completions API."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from slm_lora.config.judge import JudgeSection
from slm_lora.errors import StorageError, UsageError

ATTEMPTS = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 300.0


def key_of(section: JudgeSection) -> str | None:
    """The key in the environment; None where none is used.

    Raises:
        UsageError: the variable is not set.
    """
    if section.api_key_env is None:
        return None
    key = os.environ.get(section.api_key_env, "").strip()
    if not key:
        raise UsageError(f"judge.api_key_env: {section.api_key_env} is not set in the environment")
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"judge.api_key_env: {section.api_key_env} holds no valid key")
    return key


class JudgeClient:
    """Connection to a judge; usable from several threads, closed by ``with``.

    Redirects are not followed: texts and key go to the named address only.
    """

    def __init__(self, section: JudgeSection) -> None:
        try:
            import httpx
        except ImportError:
            raise UsageError(
                "judge: httpx is not installed: pip install 'slm-lora[judge]'"
            ) from None
        self._errors: Any = httpx.RequestError
        self._key = key_of(section)
        self._address = f"{section.url}/chat/completions"
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=section.max_concurrent),
            follow_redirects=False,
        )

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, body: Mapping[str, Any]) -> object:
        """The text of the answer to a request; another JSON value where a server sends one.

        Raises:
            StorageError: the judge is down or overloaded, after several attempts, or redirects.
            UsageError: it refuses the request.
        """
        problem, wait = "", FIRST_WAIT_S
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(min(wait, LONGEST_WAIT_S))
                wait *= 2
            try:
                response = self._client.post(self._address, json=body)
            except self._errors as error:
                problem = self._shown(str(error) or type(error).__name__)
                continue
            status = response.status_code
            if status == 429 or status >= 500:
                problem = f"status {status}"
                wait = max(wait, _seconds(response.headers.get("Retry-After", "")))
                continue
            if 300 <= status < 400:
                raise StorageError(
                    f"{self._address}: redirects, which is not followed; set judge.url to the "
                    "final address"
                )
            if status != 200:
                reason = self._shown(response.text)
                raise UsageError(f"{self._address}: refused, status {status}: {reason}")
            return _content(response)
        raise StorageError(f"{self._address}: no answer ({problem})")

    def _shown(self, text: str) -> str:
        """Start of a server's text in one line, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return "".join(each for each in text if each.isprintable())[:200]


def _content(response: Any) -> object:
    try:
        return response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0
