"""Ask language models for labels through the OpenAI and Anthropic clients, and keep their answers.

1. Every prompt has a key, a hash of the prompt and the model. Prompts that have been answered are not sent again.
2. Answers are appended, with their prompts, to a file of JSON lines as they arrive, so a killed run loses only the
   requests in flight. An incomplete or damaged line is ignored, with a warning.
3. All requests obey the rate limit, including the clients' own retries after a status such as 429 or 500.
4. Refusals, answers cut off at `max_tokens` and malformed answers are kept with their status. Failed requests are not.

API keys are read from the environment only, and are never written to a file or a message.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crosslens.errors import UserError, did_you_mean, first_line, json_checksum

KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
"""Clients and the environment variables of their API keys."""

BYTES_PER_TOKEN = 3
"""UTF-8 bytes per token in estimates: on the low side, since English text has about four."""

FRAME_TOKENS = 16
"""Tokens that estimates add to every request for its format."""

MAX_FAILURES = 5
"""Consecutive failures after which no more requests are sent."""

_MESSAGE = 200  # characters of a server's error message to show


def estimate_tokens(prompt: Prompt) -> int:
    """Estimate the tokens of a request: UTF-8 bytes / `BYTES_PER_TOKEN`, rounded up, plus `FRAME_TOKENS`."""
    size = sum(len(text.encode("utf-8", "replace")) for text in (prompt.system, prompt.user))
    return -(-size // BYTES_PER_TOKEN) + FRAME_TOKENS


def check_client(explainer: Explainer) -> None:
    """Check that the client is installed and has an API key.

    Raises:
        UserError: the package or the key is missing.
    """
    if importlib.util.find_spec(explainer.client) is None:
        raise UserError(f"the package {explainer.client!r} is not installed: pip install 'crosslens[labels]'")
    if not os.environ.get(KEYS[explainer.client], "").strip():
        raise UserError(
            f"the environment has no {KEYS[explainer.client]}: set it (to any word if your server needs no key)"
        )


def ask_all(
    explainer: Explainer, prompts: Mapping[str, Prompt], answers: Answers
) -> Generator[tuple[str, Reply | None]]:
    """Send several prompts at a time, and save each answer before it is yielded.

    Args:
        explainer: the language model.
        prompts: by key.
        answers: where answers are saved.

    Yields:
        A key and its answer, in order of arrival; None if the request failed.

    Raises:
        UserError: no client or key; a key or model that is refused; `MAX_FAILURES` consecutive failures.
    """
    check_client(explainer)
    ask = _OPEN[explainer.client](explainer, _RateLimit(explainer.requests_per_minute))

    def one(key: str, prompt: Prompt) -> Reply:
        reply = ask(prompt)
        about = {"client": explainer.client, "model": explainer.model, "system": prompt.system, "user": prompt.user}
        answers.add(key, reply, **about)
        return reply

    pool, failures = ThreadPoolExecutor(explainer.workers), 0
    try:
        asked = {pool.submit(one, key, prompt): key for key, prompt in prompts.items()}
        for done in as_completed(asked):
            try:
                reply = done.result()
                failures = 0
            except _FailedError as error:
                reply = None
                failures += 1
                if error.final or failures >= MAX_FAILURES:
                    raise UserError(f"{error}; answers received so far are kept") from error
            yield asked[done], reply
    finally:
        # cancel requests not yet sent; wait for those in flight and keep their answers
        pool.shutdown(cancel_futures=True)


def _openai(explainer: Explainer, limit: _RateLimit) -> Callable[[Prompt], Reply]:
    library: Any = importlib.import_module("openai")
    client = library.OpenAI(**_options(explainer, limit, library))

    def ask(prompt: Prompt) -> Reply:
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        request = {"model": explainer.model, "messages": messages, "max_completion_tokens": explainer.max_tokens}
        return _send(explainer, lambda: _read_openai(client.chat.completions.create(**request)), library.OpenAIError)

    return ask


def _anthropic(explainer: Explainer, limit: _RateLimit) -> Callable[[Prompt], Reply]:
    library: Any = importlib.import_module("anthropic")
    client = library.Anthropic(**_options(explainer, limit, library))

    def ask(prompt: Prompt) -> Reply:
        messages = [{"role": "user", "content": prompt.user}]
        request = {
            "model": explainer.model,
            "system": prompt.system,
            "messages": messages,
            "max_tokens": explainer.max_tokens,
        }
        return _send(explainer, lambda: _read_anthropic(client.messages.create(**request)), library.AnthropicError)

    return ask


_OPEN = {"openai": _openai, "anthropic": _anthropic}


def _options(explainer: Explainer, limit: _RateLimit, library: Any) -> dict[str, Any]:
    options = {
        "api_key": os.environ[KEYS[explainer.client]].strip(),
        "timeout": explainer.timeout,
        "max_retries": explainer.max_retries,
        # below the client, so that its retries wait too
        "http_client": library.DefaultHttpxClient(event_hooks={"request": [limit]}),
    }
    return options if explainer.base_url is None else {**options, "base_url": explainer.base_url}


def _send(explainer: Explainer, ask: Callable[[], Reply], error_type: type[Exception]) -> Reply:
    """Send one request; errors of the client become a `_FailedError` with a readable message."""
    try:
        return ask()
    except (json.JSONDecodeError, UnicodeDecodeError):
        return Reply("malformed", "")
    except (error_type, ValueError) as error:
        status, key = getattr(error, "status_code", None), KEYS[explainer.client]
        shown = first_line(error).replace(os.environ.get(key, "").strip() or "\0", "***")[:_MESSAGE]
        message = f"{explainer.client} does not answer for model {explainer.model!r} ({shown})"
        # rejected key or model, or an error raised by the client before sending: every request would fail
        final = status in (401, 403, 404) or not isinstance(error, error_type)
        if final:
            message += f": check {key}, the model and the base url"
        raise _FailedError(message, final) from error


# a server may send anything: check every part of an answer before using it


def _read_openai(found: Any) -> Reply:
    choices = getattr(found, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message, reason = getattr(choice, "message", None), getattr(choice, "finish_reason", None)
    text, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
    usage = getattr(found, "usage", None)
    return _reply(
        text if isinstance(text, str) else None,
        refusal if isinstance(refusal, str) else "" if reason == "content_filter" else None,
        reason == "length",
        getattr(usage, "prompt_tokens", None),
        getattr(usage, "completion_tokens", None),
    )


def _read_anthropic(found: Any) -> Reply:
    blocks, reason = getattr(found, "content", None), getattr(found, "stop_reason", None)
    texts = [getattr(block, "text", None) for block in blocks] if isinstance(blocks, list) else []
    text = "".join(part for part in texts if isinstance(part, str))
    usage = getattr(found, "usage", None)
    return _reply(
        text or None,
        text if reason == "refusal" else None,
        reason == "max_tokens",
        getattr(usage, "input_tokens", None),
        getattr(usage, "output_tokens", None),
    )


def _reply(text: str | None, refusal: str | None, cut: bool, tokens_in: Any, tokens_out: Any) -> Reply:
    status = "refused" if refusal is not None else "cut" if cut else "malformed" if text is None else "answered"
    counts = (int(n) if isinstance(n, int) and n >= 0 else 0 for n in (tokens_in, tokens_out))
    return Reply(status, refusal or text or "", *counts)


@dataclass(frozen=True)
class Explainer:
    """A language model that explains features, and how to query it.

    Attributes:
        client: "openai" or "anthropic", the API that the server understands.
        model: its name on that server.
        base_url: URL of another server, such as a local one; the client's default if None (OPENAI_BASE_URL,
            ANTHROPIC_BASE_URL, or the company's own).
        max_tokens: most tokens in an answer, including hidden reasoning.
        requests_per_minute: rate limit; requests are spaced evenly, and retries count.
        max_retries: how often the client retries a request, with growing pauses.
        timeout: seconds per request.
        workers: concurrent requests.
        attempts: how often, over all runs, to send a prompt whose answer is a refusal or malformed.
        prices: prices of a million tokens in and out, in any currency, for estimates.

    Raises:
        UserError: an unknown client, an empty model, a number out of range, or an invalid base_url.
    """

    client: str
    model: str
    base_url: str | None = None
    max_tokens: int = 1024
    requests_per_minute: float = 50.0
    max_retries: int = 4
    timeout: float = 60.0
    workers: int = 4
    attempts: int = 1
    prices: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.client not in KEYS:
            raise UserError(f"client {self.client!r} is not one of {', '.join(KEYS)}{did_you_mean(self.client, KEYS)}")
        if not self.model.strip():
            raise UserError("model is empty: give its name on the server")
        least = {"max_tokens": 16, "max_retries": 0, "workers": 1, "attempts": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"{name}={getattr(self, name)} must be {bound} or more")
        for name in ("requests_per_minute", "timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name}={getattr(self, name)} must be a number above 0")
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"base_url {self.base_url!r} must begin with http:// or https://")
        if self.prices is not None and not all(0 <= price < float("inf") for price in self.prices):
            raise UserError(f"prices={self.prices} must be two numbers of 0 or more: of a million tokens in, and out")


@dataclass(frozen=True)
class Prompt:
    """A system prompt with the task, and a user prompt with the data.

    Attributes:
        system: the task.
        user: the data.
        draw: 1, or the number of an independent answer to the same prompt.
    """

    system: str
    user: str
    draw: int = 1

    def key(self, explainer: Explainer) -> str:
        """SHA-256 of the prompt, the client, the model and `max_tokens`."""
        contents = [explainer.client, explainer.model, explainer.max_tokens, self.system, self.user]
        contents += [self.draw] if self.draw > 1 else []
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """An answer of a language model.

    Attributes:
        status: "answered", "refused", "cut" (at `max_tokens`) or "malformed".
        text: unprocessed.
        tokens_in: tokens in the request, as counted by the server.
        tokens_out: tokens in the answer.
    """

    status: str
    text: str
    tokens_in: int = 0
    tokens_out: int = 0


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in an answer, which may say something before and after it; None if there is none."""
    begin = text.find("{")
    try:
        return json.JSONDecoder().raw_decode(text[begin:] if begin >= 0 else "")[0]
    except (ValueError, RecursionError):
        return None


class Answers:
    """Answers by key, in an append-only file of JSON lines.

    Args:
        path: file path, created with the first answer; None keeps answers in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._lock = path, threading.Lock()
        self._replies: dict[str, Reply] = {}
        self._times: Counter[str] = Counter()
        if path is not None and path.is_file():
            read = [self._read(line) for line in path.read_bytes().split(b"\n") if line]
            if damaged := read.count(False):
                warnings.warn(
                    f"{path} has {damaged} of {len(read)} lines that are incomplete or damaged: what they answered is "
                    "asked again",
                    stacklevel=3,
                )

    def _read(self, line: bytes) -> bool:
        """Keep the answer in a line; False if there is none, or it does not have the line's checksum."""
        try:
            found = json.loads(line)
            key, reply = found["key"], Reply(**{name: found[name] for name in Reply.__annotations__})
            checksum = found.pop("checksum", None)  # lines of older releases have none
            if (
                not isinstance(key, str)
                or not isinstance(reply.text, str)
                or checksum not in (None, json_checksum(found))
            ):
                return False
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        self._keep(key, reply)
        return True

    def _keep(self, key: str, reply: Reply) -> None:
        self._replies[key] = reply
        self._times[key] += 1

    def get(self, key: str) -> Reply | None:
        """The latest answer, or None."""
        return self._replies.get(key)

    def times(self, key: str) -> int:
        """Number of answers received, of any status."""
        return self._times[key]

    def add(self, key: str, reply: Reply, **about: str) -> None:
        """Keep an answer, and write it to disk with `about`."""
        with self._lock:
            self._keep(key, reply)
            if self._path is None:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            contents = {"key": key, **about, **asdict(reply)}
            line = json.dumps({**contents, "checksum": json_checksum(contents)}).encode() + b"\n"
            with self._path.open("a+b") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # the last line is incomplete
                        line = b"\n" + line
                file.write(line)


class _RateLimit:
    """Called before each request: waits as long as the rate limit demands."""

    def __init__(self, per_minute: float) -> None:
        self._gap, self._next, self._lock = 60 / per_minute, 0.0, threading.Lock()

    def __call__(self, _: object) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        time.sleep(turn - now)


class _FailedError(Exception):
    """A failed request; `final` if all other requests would fail too."""

    def __init__(self, message: str, final: bool) -> None:
        super().__init__(message)
        self.final = final
