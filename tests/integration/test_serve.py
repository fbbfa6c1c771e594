"""The server as seen by the openai package, a browser and plain sockets."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from slm_lora.adapters.multi import BASE, AdapterSet, load_adapter_set
from slm_lora.data.prompts import Prompt
from slm_lora.errors import UsageError
from slm_lora.evaluation.generation import Generation, Sampling, prompt_ids
from slm_lora.model.resolve import ModelSource
from slm_lora.records import Turn

from ..support.exports import make_adapter

openai = pytest.importorskip("openai", reason="needs the package openai (make test-all)")
pytest.importorskip("gradio", reason="needs the extra serve (make test-all)")

from slm_lora.serve import server as serving  # noqa: E402
from slm_lora.serve.api import make_app  # noqa: E402
from slm_lora.serve.engine import BusyError, Engine  # noqa: E402
from slm_lora.serve.guard import LOOPBACK, Guard  # noqa: E402
from slm_lora.serve.page import GENERAL_QUESTIONS, mount_page  # noqa: E402

MAX_BODY_BYTES, TIMEOUT_S, MAX_TOKENS = 100_000, 1.5, 200


@pytest.fixture(scope="module")
def variants(tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> AdapterSet:
    where = tmp_path_factory.mktemp("adapters")
    folders = [
        make_adapter(tiny_source, where / "single", scale=0.5, seed=1),
        make_adapter(tiny_source, where / "talker", scale=0.5, template="chat", seed=2),
    ]
    return load_adapter_set(str(tiny_source.path), folders, precision="fp32")


class Served:
    """A server on a free port, in a thread of the test process."""

    def __init__(
        self,
        variants: AdapterSet,
        token: str | None = None,
        page: bool = False,
        examples: Sequence[Prompt] = (Prompt((Turn("user", "Tea?"),), reference="Of leaves."),),
        default_adapter: str | None = None,
    ) -> None:
        self.engine = Engine(variants, max_tokens=MAX_TOKENS, max_waiting=70)
        app = make_app(self.engine)
        if page:
            app = mount_page(app, self.engine, examples, default_adapter)
        guarded = Guard(
            app, hosts=LOOPBACK, token=token, max_body_bytes=MAX_BODY_BYTES, timeout_s=TIMEOUT_S
        )
        listener = serving.listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=serving.serve, args=(guarded, listener), daemon=True).start()

    def client(self, key: str = "none") -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def ask(
        self, path: str = "/v1/models", body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        method = "GET" if body is None else "POST"
        connection.request(method, path, body, {"Content-Type": "application/json", **named})
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture(scope="module")
def served(variants: AdapterSet) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "REQUEST_HEAD_TIMEOUT_S", TIMEOUT_S)
        server = Served(variants)
        yield server
        server.engine.close()


QUESTION = [{"role": "user", "content": "Tell me fact 3 about bread."}]


def reference(
    variants: AdapterSet, name: str, question: str, sampling: Sampling
) -> tuple[str, Generation]:
    prompt = Prompt((Turn("user", question),))
    reply = Generation(variants, name, prompt_ids(variants, name, prompt), sampling)
    return "".join(reply.pieces()), reply


def test_openai_client_gets_the_replies_of_each_model(served: Served, variants: AdapterSet) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["base", "single", "talker"]
    assert client.models.retrieve("single").id == "single"
    texts = set()
    for name in variants.names:
        text, reply = reference(variants, name, QUESTION[0]["content"], Sampling(25))
        parameters = {"model": name, "messages": QUESTION, "max_tokens": 25, "temperature": 0}
        completion = client.chat.completions.create(**parameters)
        assert completion.choices[0].message.content == text
        assert completion.choices[0].finish_reason == reply.finished
        assert completion.usage.completion_tokens == len(reply.ids)
        streamed = list(
            client.chat.completions.create(
                **parameters, stream=True, stream_options={"include_usage": True}
            )
        )
        assert (
            "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
            == text
        )
        assert streamed[-2].choices[0].finish_reason == reply.finished
        assert streamed[-1].usage == completion.usage
        texts.add(text)
    assert len(texts) == 3


def test_completions_continue_the_raw_prompt(served: Served, variants: AdapterSet) -> None:
    client = served.client()
    raw = "Instruction:\nTea?\nResponse:\n"
    completion = client.completions.create(model="single", prompt=raw, max_tokens=12, temperature=0)
    text, reply = reference(variants, "single", "Tea?", Sampling(12))
    assert completion.choices[0].text == text and completion.usage.completion_tokens == len(
        reply.ids
    )
    pieces = client.completions.create(
        model="single", prompt=raw, max_tokens=12, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == text


def test_seed_stop_and_conversations_are_honoured(served: Served, variants: AdapterSet) -> None:
    client = served.client()

    def reply(**overrides: Any) -> str:
        parameters = {"model": "base", "messages": QUESTION, "max_tokens": 20, **overrides}
        content: str = client.chat.completions.create(**parameters).choices[0].message.content
        return content

    assert reply(seed=7) == reply(seed=7) != reply(seed=8)
    full_reply = reply(temperature=0)
    stop = full_reply[5:7]
    assert reply(temperature=0, stop=stop) == full_reply[: full_reply.index(stop)]
    turns = [
        {"role": "system", "content": "Be short."}, *QUESTION,
        {"role": "assistant", "content": "It rises."}, {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    assert reply(model="talker", messages=turns) is not None
    with pytest.raises(openai.BadRequestError, match="one instruction at a time"):
        reply(model="single", messages=turns)


def test_server_errors_have_the_format_of_openai(served: Served) -> None:
    client = served.client()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="../../etc", messages=QUESTION)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    for overrides, name in (
        ({"temperature": -1}, "temperature"), ({"n": 2}, "n"), ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"), ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 3}, "frequency_penalty"), ({"stop": [""]}, "stop"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**{"model": "base", "messages": QUESTION, **overrides})
        assert bad.value.param.startswith(name) and bad.value.type == "invalid_request_error"
    long = [{"role": "user", "content": "bread " * 2000}]
    with pytest.raises(openai.BadRequestError, match="shorten"):
        client.chat.completions.create(model="base", messages=long)
    assert served.ask("/v1/chat/completions", b"{not json")[0] == 400
    assert served.ask("/v1/nothing")[0] == 404


@pytest.mark.parametrize("text", ["half a \\ud83d", "\\u0000", "\\udb80\\udc00"])
def test_invalid_unicode_is_rejected(served: Served, text: str) -> None:
    head = '{"model": "base", "max_tokens": 2, '
    for path, body in (
        ("chat/completions", f'"messages": [{{"role": "user", "content": "{text}"}}]'),
        ("chat/completions", '"messages": [{"role": "user", "content": [{"type": "text", '
                             f'"text": "{text}"}}]}}]'),
        ("completions", f'"prompt": "{text}"'),
        ("completions", f'"prompt": "Tea?", "stop": ["{text}"]'),
    ):  # fmt: skip
        status, answer = served.ask(f"/v1/{path}", (head + body + "}").encode())
        assert status == 400, answer
        assert json.loads(answer)["error"]["param"].startswith(("messages", "prompt", "stop"))


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe", b'{"model": "\xff"}', b"[" * 90_000, b'{"model": "\\ud83d", "prompt": "Q"}',
        b'{"model": "base", "messages": [{"role": "\\ud83d", "content": "Q"}]}',
        b'{"model": "base", "messages": [{"role": "user", "content": "Q", "tool\\ud83d": "x"}]}',
    ],
)  # fmt: skip
def test_malformed_bodies_are_rejected(served: Served, body: bytes) -> None:
    for path in ("chat/completions", "completions"):
        status, answer = served.ask(f"/v1/{path}", body)
        assert status in (400, 404) and json.loads(answer)["error"]["message"]


CHAT = "/v1/chat/completions"


def post(served: Served, path: str, text: str | None = None, **overrides: Any) -> tuple[int, Any]:
    parameters: dict[str, Any] = {"model": "base", "max_tokens": 8, "temperature": 0}
    parameters |= {"messages": QUESTION} if path == CHAT else {"prompt": "Tea?"}
    body = json.dumps({**parameters, **overrides}) if text is None else text
    status, answer = served.ask(path, body.encode())
    answered = json.loads(answer)
    if status != 200:
        assert answered["error"]["type"] == "invalid_request_error", answered
        return status, answered["error"]
    choice = answered["choices"][0]
    return status, choice["message"]["content"] if path == CHAT else choice["text"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_null_and_neutral_values_change_nothing(served: Served, path: str) -> None:
    plain = post(served, path)
    for name in (
        "stream", "stream_options", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop",
        "frequency_penalty", "presence_penalty", "n", "logprobs", "logit_bias", "tools", "user",
        "tool_choice", "response_format", "suffix", "echo", "best_of", "min_tokens", "ignore_eos",
        "stop_token_ids", "max_completion_tokens", "reasoning_effort", "guided_json", "unknown",
    ):  # fmt: skip
        assert post(served, path, **{name: None}) == plain, name
    neutral: dict[str, Any] = {
        "stop": [], "logit_bias": {}, "tools": [], "n": 1, "logprobs": False, "top_k": -1,
        "response_format": {"type": "text"}, "tool_choice": "none", "functions": [], "suffix": "",
        "modalities": ["text"], "stop_token_ids": [], "best_of": 1, "echo": False, "min_p": 0,
        "user": "me", "metadata": {"a": 1}, "store": True, "repeat_penalty": 1.0,
        "skip_special_tokens": True, "chat_template_kwargs": {}, "some_new_field": [1],
    }  # fmt: skip
    for name, value in neutral.items():
        assert post(served, path, **{name: value}) == plain, name
    assert post(served, path, **neutral) == plain
    # Unset means the default, not zero.
    assert post(served, path, temperature=None, max_tokens=None)[0] == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_unsupported_fields_are_rejected_by_name(served: Served, path: str) -> None:
    for name, value in {
        "response_format": {"type": "json_object"}, "tools": [{"type": "function"}], "n": 2,
        "tool_choice": "auto", "functions": [{}], "logit_bias": {"5": 1}, "logprobs": True,
        "top_logprobs": 3, "best_of": 2, "suffix": "x", "echo": True, "audio": {"voice": "x"},
        "modalities": ["text", "audio"], "guided_json": {}, "guided_regex": "a",
        "reasoning_effort": "low", "chat_template": "x", "bad_words": ["x"], "typical_p": 0.5,
        "chat_template_kwargs": {"enable_thinking": False}, "repeat_penalty": 1.2,
        "max_new_tokens": 5, "do_sample": False, "use_beam_search": True, "system": "Be short.",
        "continue_final_message": True, "add_generation_prompt": False,
        "skip_special_tokens": False,
    }.items():  # fmt: skip
        if value == {}:
            continue
        status, error = post(served, path, **{name: value})
        assert (status, error["param"]) == (400, name), error
        assert error["message"].startswith(f"{name}: not supported: ")
    for wrong in (
        {"min_p": 2}, {"top_k": -2}, {"stop_token_ids": [10**6]}, {"stop": 3},
        {"min_tokens": 30, "max_tokens": 20}, {"repetition_penalty": 0}, {"seed": 2**64},
    ):  # fmt: skip
        status, error = post(served, path, **wrong)
        assert (status, error["param"].split(".")[0]) == (400, next(iter(wrong)))
    status, error = post(served, path, n=0)
    assert (status, error["param"]) == (400, "n")
    assert post(served, path, logprobs=0)[0] == 400


def test_message_contents_are_text_or_parts_and_others_rejected(served: Served) -> None:
    text = QUESTION[0]["content"]
    plain = post(served, CHAT)
    parts = [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]
    for content in (parts, [text]):
        assert post(served, CHAT, messages=[{"role": "user", "content": content}]) == plain
    harmless = {"name": "me", "tool_calls": None, "refusal": None, "audio": None}
    assert post(served, CHAT, messages=[{**QUESTION[0], **harmless}]) == plain
    replies = [
        post(served, CHAT, messages=[{"role": role, "content": "Be short."}, *QUESTION])
        for role in ("system", "developer")
    ]
    assert replies[0] == replies[1] and replies[0][0] == 200
    for messages, where in (
        ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([*QUESTION, {"role": "assistant", "content": None}], "messages.1.content"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "messages.0.content.0"),
        (["Tea?"], "messages.0"),
        (
            [*QUESTION, {"role": "assistant", "content": "x", "tool_calls": [{}]}, *QUESTION],
            "messages.1.tool_calls",
        ),
        (
            [*QUESTION, {"role": "assistant", "content": "x", "reasoning_content": "y"}, *QUESTION],
            "messages.1.reasoning_content",
        ),
    ):
        status, error = post(served, CHAT, messages=messages)
        assert (status, error["param"]) == (400, where), error


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_invalid_json_bodies_are_rejected(served: Served, path: str) -> None:
    half = json.dumps({"model": "base", "messages": QUESTION, "prompt": "Tea?"})
    for text in (
        "[]", "3", "null", "", "{", "[" * 100_00, '{"model": "base"}', '{"a": ' + "9" * 5000 + "}",
        half.replace("Tea?", "\\ud800").replace("bread", "\\udfff"),
        half.replace('"model"', '"\\ud800": 1, "model"'), half.replace('"base"', '"\\ud800"'),
        half.replace('"model"', '"temperature": NaN, "model"'),
        half.replace('"model"', '"max_tokens": 1e400, "model"'),
        half.replace('"model"', '"stop": ["\\udc00"], "model"'),
    ):  # fmt: skip
        assert post(served, path, text)[0] == 400, text[:80]
    status, _ = served.ask(path, b'{"model": "\xff"}')
    assert status == 400


def test_sampling_fields_reach_the_sampler(served: Served, variants: AdapterSet) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.4, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1,
        "frequency_penalty": -0.4, "presence_penalty": -0.3, "seed": 5, "min_tokens": 12,
        "stop_token_ids": [7], "ignore_eos": True,
    }  # fmt: skip
    sampling = Sampling(20, **{**fields, "stop_token_ids": (7,)})
    text = reference(variants, "base", QUESTION[0]["content"], sampling)[0]
    assert post(served, CHAT, max_tokens=20, **fields) == (200, text)
    for name in ("min_p", "frequency_penalty", "presence_penalty"):
        changed = Sampling(20, **{**fields, "stop_token_ids": (7,), name: 1.0})
        assert reference(variants, "base", QUESTION[0]["content"], changed)[0] != text, name


def test_max_tokens_is_clamped_to_the_limit_of_the_server(served: Served) -> None:
    parameters = {"model": "base", "messages": QUESTION, "max_tokens": 10**9, "temperature": 1}
    completion = served.client().chat.completions.create(**parameters, seed=3)
    assert completion.usage.completion_tokens <= MAX_TOKENS


def test_64_concurrent_requests_get_their_sequential_replies(
    served: Served, variants: AdapterSet
) -> None:
    requests = [
        (variants.names[i % 3], f"Tell me fact {i} about tea.", Sampling(12, float(i % 2), seed=i))
        for i in range(64)
    ]
    alone = [reference(variants, *request)[0] for request in requests]

    async def concurrently() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)

        async def ask(name: str, question: str, sampling: Sampling) -> str:
            completion = await client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": question}],
                max_tokens=sampling.max_new_tokens, temperature=sampling.temperature,
                seed=sampling.seed,
            )  # fmt: skip
            content: str = completion.choices[0].message.content
            return content

        return await asyncio.gather(*(ask(*request) for request in requests))

    assert asyncio.run(concurrently()) == alone


def test_full_queue_rejects_and_recovers(variants: AdapterSet) -> None:
    engine = Engine(variants, max_active=1, max_waiting=2)

    async def crowd() -> tuple[int, int]:
        ids = variants.row_tokenizers[BASE].prompt([Turn("user", "Tea?")])
        text = reference(variants, BASE, "Tea?", Sampling(50))[0]
        requests, rejected = [], 0
        for _ in range(10):
            try:
                requests.append(engine.submit(BASE, ids, Sampling(50)))
            except BusyError:
                rejected += 1
        for request in requests:
            assert "".join([piece async for piece in request.pieces()]) == text
        last = engine.submit(BASE, ids, Sampling(50))
        assert "".join([piece async for piece in last.pieces()]) == text
        return len(requests), rejected

    done, rejected = asyncio.run(crowd())
    assert rejected >= 6 and done + rejected == 10
    engine.close()


@pytest.mark.parametrize("stream", [True, False])
def test_computation_stops_for_disconnected_clients(
    served: Served, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    computed, advance = [0], Generation.advance

    def counted(generation: Generation) -> str:
        computed[0] += 1
        return advance(generation)

    monkeypatch.setattr(Generation, "advance", counted)
    fields = {"model": "base", "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": stream}
    data = json.dumps({**fields, "messages": QUESTION}).encode()
    head = f"Host: localhost\r\nContent-Length: {len(data)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}".encode() + data)
            if stream:
                client.recv(10)
    # Eight replies are computed in turns, so this one begins when at most seven are unfinished.
    assert post(served, CHAT)[0] == 200
    assert computed[0] < 13 * MAX_TOKENS


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://localhost:7860"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "file://"}, 403),
    ],
)
def test_requests_of_other_hosts_and_origins_are_rejected(
    served: Served, headers: dict[str, str], status: int
) -> None:
    assert served.ask(**headers)[0] == status


def test_server_sends_no_cors_header(served: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    connection.request("GET", "/v1/models", headers={"Origin": "http://localhost:1"})
    assert connection.getresponse().getheader("access-control-allow-origin") is None


def test_a_configured_token_is_required(variants: AdapterSet) -> None:
    server = Served(variants, token="a-secret", page=True)
    assert server.ask()[0] == 401 and server.ask("/")[0] == 401
    assert server.ask(Authorization="Bearer a-secret")[0] == 200
    for wrong in ("Bearer a-secre", "Bearer ", "a-secret", "Basic a-secret"):
        assert server.ask(Authorization=wrong)[0] == 401
    assert server.ask("/?token=wrong")[0] == 401
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/?token=a-secret")
    answer = connection.getresponse()
    assert answer.status == 303 and answer.getheader("location") == "/"
    cookie = answer.getheader("set-cookie") or ""
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert server.ask("/", Cookie=cookie.split(";")[0])[0] == 200
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()
    assert len(list(server.client("a-secret").models.list())) == 3
    server.engine.close()


def test_a_body_of_50_mb_is_rejected(served: Served) -> None:
    with contextlib.suppress(ConnectionError):  # the server may close before the end
        assert served.ask("/v1/completions", b"x" * 50_000_000)[0] == 413
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as client:
        head = "Host: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode())
        with contextlib.suppress(ConnectionError):
            for _ in range(500):
                client.sendall(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            assert b" 413 " in client.recv(100)
    assert served.ask()[0] == 200


def test_200_slow_clients_are_closed_while_others_are_served(served: Served) -> None:
    slow = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(200)]
    for number, client in enumerate(slow):
        if number % 3 == 0:
            client.sendall(b"GET /v1/mod")
        elif number % 3 == 1:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n{"
            )
    assert served.ask()[0] == 200, "blocked by slow clients"
    deadline = time.monotonic() + 20 * TIMEOUT_S
    for client in slow:
        client.settimeout(max(0.1, deadline - time.monotonic()))
        with contextlib.suppress(ConnectionError):
            while client.recv(1000):
                pass
        client.close()
    assert time.monotonic() < deadline
    assert served.ask()[0] == 200


def test_template_code_in_a_request_is_not_rendered(served: Served, variants: AdapterSet) -> None:
    attack = "{{ 7 * 7 }}{% for x in ().__class__.__base__.__subclasses__() %}{% endfor %}"
    for name in variants.names:
        completion = served.client().chat.completions.create(
            model=name, messages=[{"role": "user", "content": attack}], max_tokens=4, temperature=0
        )
        assert (
            completion.choices[0].message.content
            == reference(variants, name, attack, Sampling(4))[0]
        )
        prompter = variants.row_tokenizers[name]
        assert attack in variants.tokenizer.decode(prompter.prompt([Turn("user", attack)]))


def test_a_port_in_use_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: .*choose another"):
            serving.listen("127.0.0.1", port)


def letters(text: str) -> str:
    return "".join(c for c in text if c.isalnum())


@contextlib.contextmanager
def browser_page(url: str) -> Iterator[Any]:
    """Open a page in headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = Path("/usr/bin/chromium")
    if not browser_path.exists():
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=browser_path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(30_000)
        page.goto(url, wait_until="domcontentloaded")
        yield page
        browser.close()


def wait_until(page: Any, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, page.locator("body").inner_text()
        page.wait_for_timeout(50)


def test_page_asks_stops_and_warns_without_examples(variants: AdapterSet, tmp_path: Path) -> None:
    server = Served(variants, page=True, examples=(), default_adapter="single")
    with browser_page(server.url) as page:
        question, base = page.get_by_label("Question"), page.locator("#base textarea")
        stop = page.get_by_role("button", name="Stop")
        assert GENERAL_QUESTIONS[0] in (question.get_attribute("placeholder") or "")
        assert "Enter asks" in (question.get_attribute("placeholder") or "")
        assert page.get_by_label("Adapter", exact=True).input_value() == "single"
        page.get_by_text(GENERAL_QUESTIONS[1]).first.wait_for()
        assert stop.count() == 0
        page.screenshot(path=tmp_path / "before.png")

        # Shift+Enter inserts a line break, Enter asks; Stop is visible during the reply.
        question.fill("Tea?")
        question.press("Shift+Enter")
        assert question.input_value() == "Tea?\n" and not base.input_value()
        question.fill("Tea?")
        question.press("Enter")
        wait_until(page, lambda: stop.count() == 1)
        wait_until(page, lambda: bool(base.input_value()))
        page.screenshot(path=tmp_path / "while.png")
        wait_until(page, lambda: stop.count() == 0)
        answers = [base.input_value(), page.locator("#first textarea").input_value()]
        assert all(answers)

        # An empty question gives a hint and keeps the answers.
        question.fill("  ")
        page.get_by_role("button", name="Ask").click()
        page.get_by_text("Write a question first.").wait_for()
        page.screenshot(path=tmp_path / "hint.png")
        assert [base.input_value(), page.locator("#first textarea").input_value()] == answers
        assert stop.count() == 0

        # A question that is too long gives a warning and stays in its field.
        question.fill("bread " * 600)
        question.press("Enter")
        page.get_by_text("shorten it").wait_for()
        wait_until(page, lambda: stop.count() == 0)
        assert question.input_value().startswith("bread")

        # After Stop the page accepts the next question.
        page.get_by_role("button", name="Sampling").click()
        for pause_ms in (0, 0, 30, 100, 300):
            question.fill("Salt?")
            question.press("Enter")
            wait_until(page, lambda: stop.count() == 1)
            page.wait_for_timeout(pause_ms)
            stop.click()
            wait_until(page, lambda: stop.count() == 0)
            assert page.get_by_text("Error", exact=True).count() == 0
        question.fill("Tea?")
        question.press("Enter")
        wait_until(page, lambda: stop.count() == 1)
        wait_until(page, lambda: stop.count() == 0 and base.input_value() == answers[0])
    server.engine.close()


def test_page_shows_base_and_adapters_side_by_side(variants: AdapterSet, tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="needs playwright")
    # All use the template of the first selected adapter. The references are computed before the
    # server starts, because both use the same model.
    ids = prompt_ids(variants, "talker", Prompt((Turn("user", "Tea?"),)))
    texts = {
        name: "".join(Generation(variants, name, ids, Sampling(160)).pieces())
        for name in variants.names
    }
    server = Served(variants, page=True)
    outside: list[str] = []
    with browser_page("about:blank") as page:
        page.on("request", lambda request: outside.append(request.url))
        page.goto(server.url, wait_until="domcontentloaded")
        page.get_by_label("Question").fill("Tea?")
        page.get_by_label("Second adapter").click()
        page.get_by_role("option", name="single").click()
        page.get_by_role("button", name="Sampling").click()
        page.get_by_label("Reference answer").fill("Leaves in water.")
        page.get_by_role("button", name="Ask").click()
        shown = {}
        for place, name in (("base", BASE), ("first", "talker"), ("second", "single")):
            text = texts[name]
            box = page.locator(f"#{place} textarea")
            deadline = time.monotonic() + 60
            # Browsers replace control characters, of which this model generates many.
            while letters(box.input_value()) != letters(text):
                assert time.monotonic() < deadline, box.input_value()
                page.wait_for_timeout(100)
            shown[name] = page.locator(f"#{place}").inner_text()
        assert all("loss" in label for label in shown.values())
        page.screenshot(path=tmp_path / "page.png")
    assert not [url for url in outside if not url.startswith((server.url, "data:", "blob:"))]
    server.engine.close()
