"""Language models that are asked for labels, through the clients of OpenAI and Anthropic, and what they answered.

1. A prompt is known by the hash of it and of the model: what has been answered once is not asked again.
2. Answers are appended to a file of JSON lines as they come, so that a killed run loses at most those under way. A line
   that was cut off is passed over.
3. Every request waits for its turn, those included with which the clients try again after an answer such as 429 or 500.
4. What is no answer (a refusal, one cut at `max_tokens`, one that nothing can be read from) is kept as what it is. A
   request that fails is not kept: it says nothing about the prompt.

Keys come from the environment alone and stand in no file and no message.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crosslens.errors import UserError, did_you_mean, first_line

KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
"""Clients, and where their keys come from."""

BYTES_PER_TOKEN = 3
"""UTF-8 bytes that the estimate counts as one token: rather too few, for English text has about four."""

FRAME_TOKENS = 16
"""Tokens that the estimate adds to a request for its form."""

MAX_FAILURES = 5
"""Requests that fail one after the other before nothing more is asked."""

_TOLD = 200  # characters of somebody else's message


def estimate_tokens(prompt: Prompt) -> int:
    """Tokens of a request: one for every `BYTES_PER_TOKEN` bytes of UTF-8, rounded up, and `FRAME_TOKENS`."""
    size = sum(len(text.encode("utf-8", "replace")) for text in (prompt.system, prompt.user))
    return -(-size // BYTES_PER_TOKEN) + FRAME_TOKENS


def check_client(rater: Rater) -> None:
    """Make sure that the client is installed and that there is a key.

    Raises:
        UserError: it is not, or there is none.
    """
    if importlib.util.find_spec(rater.client) is None:
        raise UserError(f"the package {rater.client!r} is not installed: pip install 'crosslens[labels]'")
    if not os.environ.get(KEYS[rater.client], "").strip():
        raise UserError(
            f"the environment has no {KEYS[rater.client]}: set it; a server that wants no key takes any word"
        )


def ask_all(rater: Rater, prompts: Mapping[str, Prompt], answers: Answers) -> Generator[tuple[str, Reply | None]]:
    """Ask, several at a time; each answer is kept before it is given.

    Args:
        rater: whom.
        prompts: by key.
        answers: where answers are kept.

    Yields:
        A key and its answer, in the order in which they come; None where the request failed.

    Raises:
        UserError: no client or key; a key or model that is refused; `MAX_FAILURES` failures in a row.
    """
    check_client(rater)
    ask = _OPEN[rater.client](rater, _Turns(rater.requests_per_minute))

    def one(key: str, prompt: Prompt) -> Reply:
        reply = ask(prompt)
        answers.add(key, reply, client=rater.client, model=rater.model)
        return reply

    pool, failures = ThreadPoolExecutor(rater.workers), 0
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
                    raise UserError(f"{error}; what has been answered is kept") from error
            yield asked[done], reply
    finally:
        # what has not been sent never is; what is under way is waited for, and kept
        pool.shutdown(cancel_futures=True)


def _openai(rater: Rater, turns: _Turns) -> Callable[[Prompt], Reply]:
    library: Any = importlib.import_module("openai")
    client = library.OpenAI(**_options(rater, turns, library))

    def ask(prompt: Prompt) -> Reply:
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        request = {"model": rater.model, "messages": messages, "max_completion_tokens": rater.max_tokens}
        return _send(rater, lambda: _read_openai(client.chat.completions.create(**request)), library.OpenAIError)

    return ask


def _anthropic(rater: Rater, turns: _Turns) -> Callable[[Prompt], Reply]:
    library: Any = importlib.import_module("anthropic")
    client = library.Anthropic(**_options(rater, turns, library))

    def ask(prompt: Prompt) -> Reply:
        messages = [{"role": "user", "content": prompt.user}]
        request = {"model": rater.model, "system": prompt.system, "messages": messages, "max_tokens": rater.max_tokens}
        return _send(rater, lambda: _read_anthropic(client.messages.create(**request)), library.AnthropicError)

    return ask


_OPEN = {"openai": _openai, "anthropic": _anthropic}


def _options(rater: Rater, turns: _Turns, library: Any) -> dict[str, Any]:
    options = {
        "api_key": os.environ[KEYS[rater.client]].strip(),
        "timeout": rater.timeout,
        "max_retries": rater.max_retries,
        # below the client, where its own retries pass as well
        "http_client": library.DefaultHttpxClient(event_hooks={"request": [turns]}),
    }
    return options if rater.base_url is None else {**options, "base_url": rater.base_url}


def _send(rater: Rater, ask: Callable[[], Reply], error_type: type[Exception]) -> Reply:
    """An answer; what the client raises is turned into words."""
    try:
        return ask()
    except (json.JSONDecodeError, UnicodeDecodeError):
        return Reply("malformed", "")
    except (error_type, ValueError) as error:
        status, key = getattr(error, "status_code", None), KEYS[rater.client]
        told = first_line(error).replace(os.environ.get(key, "").strip() or "\0", "***")[:_TOLD]
        words = f"{rater.client} does not answer for model {rater.model!r} ({told})"
        # refused before it was read, or by the client itself
        final = status in (401, 403, 404) or not isinstance(error, error_type)
        raise _FailedError(f"{words}: check {key}, the model and the base url" if final else words, final) from error


# a server may send anything: whatever is read from an answer is looked at before it is used


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
class Rater:
    """A language model and how it is asked.

    Attributes:
        client: "openai" or "anthropic": which form of requests the server understands.
        model: its name there.
        base_url: of another server, such as a local one; where the client looks when None (OPENAI_BASE_URL,
            ANTHROPIC_BASE_URL, or the company's own).
        max_tokens: most tokens of an answer, hidden reasoning included.
        requests_per_minute: most requests, spaced evenly; retries count.
        max_retries: how many times the client tries one request again, with growing pauses.
        timeout: seconds that one request may take.
        workers: requests under way at once.

    Raises:
        UserError: an unknown client, no model, a number out of range, or a base_url that is none.
    """

    client: str
    model: str
    base_url: str | None = None
    max_tokens: int = 1024
    requests_per_minute: float = 50.0
    max_retries: int = 4
    timeout: float = 60.0
    workers: int = 4

    def __post_init__(self) -> None:
        if self.client not in KEYS:
            raise UserError(f"client {self.client!r} is not one of {', '.join(KEYS)}{did_you_mean(self.client, KEYS)}")
        if not self.model.strip():
            raise UserError("model is empty: give the name by which the server knows it")
        least = {"max_tokens": 16, "max_retries": 0, "workers": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"{name}={getattr(self, name)} must be {bound} or more")
        for name in ("requests_per_minute", "timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name}={getattr(self, name)} must be a number above 0")
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"base_url {self.base_url!r} must begin with http:// or https://")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: the task, and what it is to be done on."""

    system: str
    user: str

    def key(self, rater: Rater) -> str:
        """SHA-256 of the prompt, the form of the request, the model and its limit."""
        contents = [rater.client, rater.model, rater.max_tokens, self.system, self.user]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        status: "answered", "refused", "cut" (at `max_tokens`) or "malformed".
        text: of it, as it came.
        tokens_in: of the request, as the server counts.
        tokens_out: of the answer.
    """

    status: str
    text: str
    tokens_in: int = 0
    tokens_out: int = 0


class Answers:
    """Answers by key, in a file of JSON lines that grows.

    Args:
        path: of the file, made when something is added; None keeps them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._lock = path, threading.Lock()
        self._replies: dict[str, Reply] = {}
        self._times: Counter[str] = Counter()
        if path is not None and path.is_file():
            for line in path.read_bytes().splitlines():
                self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            found = json.loads(line)
            key, reply = found["key"], Reply(**{name: found[name] for name in Reply.__annotations__})
        except (ValueError, KeyError, TypeError, RecursionError):
            return  # cut off, or not from here
        if isinstance(key, str) and isinstance(reply.text, str):
            self._keep(key, reply)

    def _keep(self, key: str, reply: Reply) -> None:
        self._replies[key] = reply
        self._times[key] += 1

    def get(self, key: str) -> Reply | None:
        """The last answer, or None."""
        return self._replies.get(key)

    def times(self, key: str) -> int:
        """How often something came back."""
        return self._times[key]

    def add(self, key: str, reply: Reply, **about: str) -> None:
        """Keep an answer, and on disk what is told about it."""
        with self._lock:
            self._keep(key, reply)
            if self._path is None:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"key": key, **about, **asdict(reply)}).encode() + b"\n"
            with self._path.open("a+b") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # the line before was cut off
                        line = b"\n" + line
                file.write(line)


class _Turns:
    """Called before each request: waits until it is its turn."""

    def __init__(self, per_minute: float) -> None:
        self._gap, self._next, self._lock = 60 / per_minute, 0.0, threading.Lock()

    def __call__(self, _: object) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        time.sleep(turn - now)


class _FailedError(Exception):
    """A request that failed; `final` where every other would as well."""

    def __init__(self, words: str, final: bool) -> None:
        super().__init__(words)
        self.final = final
