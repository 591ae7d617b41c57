"""What a request may say: every field is honoured or refused by name, none is silently dropped."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from swarmd.node.api.errors import ApiError
from swarmd.node.api.openai_schema import ChatRequest, CompletionRequest, parse
from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.generation import GenerationRequest

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> GenerationRequest:
    return parse(json.dumps({"model": "m", "messages": MESSAGES} | fields).encode(), ChatRequest).generation()


def text(**fields: Any) -> GenerationRequest:
    return parse(json.dumps({"model": "m", "prompt": "once"} | fields).encode(), CompletionRequest).generation()


def schema_format(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema} | more}


def refused(request: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        request(**fields)
    assert caught.value.status == 400
    return caught.value


def test_defaults_are_those_of_openai():
    request = chat()
    assert request == GenerationRequest(
        model="m",
        sampling=SamplingParams(seed=request.sampling.seed),
        max_tokens=None,
        messages=({"role": "user", "content": "hi"},),
    )
    assert request.sampling.temperature == request.sampling.top_p == 1
    assert text().max_tokens == 16
    assert text().prompt == "once"


def test_every_sampling_wish_arrives():
    wishes = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.1,
        "seed": -3,
    }
    for request in (chat, text):
        sampling = request(**wishes, logit_bias={"5": -100, "7": 2.5}, stop="END", max_tokens=9)
        assert {name: getattr(sampling.sampling, name) for name in wishes} == wishes
        assert sampling.sampling.logit_bias == {5: -100, 7: 2.5}
        assert (sampling.stop, sampling.max_tokens) == (("END",), 9)
    assert chat(logprobs=True, top_logprobs=3).sampling.top_logprobs == 3
    assert text(logprobs=4).sampling.top_logprobs == 4
    assert chat(max_tokens=3, max_completion_tokens=5).max_tokens == 5


def test_without_a_seed_requests_differ():
    assert chat().sampling.seed != chat().sampling.seed


def test_null_is_the_same_as_leaving_a_field_out():
    nothing = dict.fromkeys(["temperature", "top_p", "stop", "stream", "max_tokens", "logit_bias", "n", "user"])
    assert chat(**nothing, seed=1) == chat(seed=1)


def test_fields_that_only_name_the_caller_are_taken():
    chat(user="u", metadata={"k": "v"}, safety_identifier="s", prompt_cache_key="p", store=False, service_tier="auto")


def test_messages_of_every_role_and_form():
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "name": "ann"},
        {"role": "assistant", "content": "three", "refusal": None},
    ]
    assert chat(messages=messages).messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one two", "name": "ann"},
        {"role": "assistant", "content": "three"},
    )


@pytest.mark.parametrize(("given", "prompt"), [("a", "a"), (["a"], "a"), ([1, 2], (1, 2)), ([7], (7,))])
def test_a_prompt_is_text_or_tokens(given: object, prompt: object):
    assert text(prompt=given).prompt == prompt


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_k", -1),
        ("top_k", 2**40),
        ("min_p", 1.5),
        ("seed", 2**70),
        ("presence_penalty", 3),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("n", 2),
        ("stop", ""),
        ("stop", ["x"] * 9),
        ("stream", "yes"),
        ("stream_options", {"include": True}),
        ("logit_bias", {"word": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"5": 101}),
        ("model", None),
        ("model", ""),
        ("store", True),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_by_name(field: str, value: object):
    for request in (chat, text):
        error = refused(request, **{field: value})
        assert error.param == field
        assert field in error.message
        assert error.code


def test_a_format_becomes_a_schema_whose_keys_keep_their_order():
    schema = {"type": "object", "properties": {"z": {"type": "null"}, "a": {"const": "\u00e9"}}}
    assert json.loads(chat(response_format=schema_format(schema, strict=True)).sampling.json_schema) == schema
    text = chat(response_format=schema_format(schema)).sampling.json_schema
    assert text.index('"z"') < text.index('"a"')
    assert json.loads(chat(response_format={"type": "json_object"}).sampling.json_schema) == {"type": "object"}
    with pytest.raises(ApiError, match="utf-8") as caught:
        parse(
            json.dumps({"model": "m", "messages": MESSAGES, "response_format": schema_format({"title": "@"})})
            .encode()
            .replace(b"@", b"\xff"),
            ChatRequest,
        ).generation()
    assert (caught.value.status, caught.value.param) == (400, "response_format")
    assert chat(response_format={"type": "text"}).sampling.json_schema == chat().sampling.json_schema == ""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [*MESSAGES, {"role": "user", "content": "hi", "mood": "good"}]}, "messages"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}, "response_format"),
        ({"response_format": schema_format({"description": "x" * 65536})}, "response_format"),
        ({"response_format": schema_format({}, mood="good")}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_chats_that_are_refused(fields: dict[str, object], param: str):
    assert refused(chat, **fields).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1]]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
    ],
)
def test_completions_that_are_refused(fields: dict[str, object], param: str):
    assert refused(text, **fields).param == param


@pytest.mark.parametrize("field", ["tools", "functions", "audio", "web_search_options", "temprature"])
def test_what_is_not_known_is_refused_by_name(field: str):
    for request in (chat, text):
        error = refused(request, **{field: []})
        assert (error.param, error.code) == (field, "unsupported_parameter")
        assert field in error.message


def test_the_place_of_a_deep_fault_is_told():
    error = refused(chat, messages=[*MESSAGES, {"role": "user", "content": "hi", "mood": "good"}])
    assert error.message == "mood in messages[1] is not supported by this server"


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": "\xff"}', b"\x00", b'{"model": "\\ud800"}'])
def test_what_is_not_json_is_refused_as_such(body: bytes):
    with pytest.raises(ApiError, match="not valid JSON") as caught:
        parse(body, ChatRequest)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


MANY = b",".join(b'"%d":1' % n for n in range(300_000))
HEAD = b'{"model":"m","messages":[{"role":"user","content":"hi"}]'


@pytest.mark.parametrize(
    "body",
    [
        HEAD + b',"logit_bias":{' + MANY + b"}}",
        HEAD + b',"logit_bias":{' + MANY + b'},"logit_bias":{}}',
        HEAD + b',"metadata":{' + MANY.replace(b":1", b':""') + b"}}",
        HEAD + b',"stop":[' + b",".join([b'"a"'] * 300_000) + b"]}",
        HEAD + b',"temperature":0.' + b"1" * 300_000 + b"}",
        HEAD + b',"max_tokens":' + b"9" * 300_000 + b"}",
        HEAD + b',"unknown":"' + b"a" * 300_000 + b'"}',
        HEAD + b" " * 300_000 + b"}",
        HEAD + b',"metadata":' + b'{"a":' * 300_000,
        b"[" * 300_000,
        b'{"model":"m","messages":' + b"[" * 300_000,
        b'{"model":"m","messages":[' + b",".join([b'{"role":"user","content":""}'] * 30_000) + b"]}",
    ],
    ids=range(12),
)
def test_a_body_that_is_large_but_for_its_text_is_refused_before_it_is_built(body: bytes):
    tracemalloc.start()
    with pytest.raises(ApiError) as caught:
        parse(body, ChatRequest)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.status == 400
    assert len(caught.value.message) < 300
    assert peak < 8 << 20


def test_a_long_text_is_welcome():
    asked = parse(HEAD.replace(b"hi", b"\\u00e9" * 300_000) + b"}", ChatRequest)
    assert asked.messages[0].content == "\u00e9" * 300_000


@pytest.mark.parametrize(
    "text",
    [
        b"NaN",
        b"-Infinity",
        b"1e999999999",
        b"0x10",
        b"1_000",
        b"01",
        b"9" * 10_000,
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
        b'"\xed\xa0\x80"',
        b'"\xc0\x80"',
        b'"\x00"',
        b"'one'",
        b"1/*c*/",
    ],
)
@pytest.mark.parametrize("field", [b"temperature", b"seed", b"user"])
def test_numbers_and_texts_that_are_none(field: bytes, text: bytes):
    with pytest.raises(ApiError) as caught:
        parse(HEAD + b',"' + field + b'":' + text + b"}", ChatRequest)
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [b"[]", b"null", b"3", b'"text"', b"[" * 100_000, b'{"model":' * 100_000])
def test_what_is_no_object_is_refused(body: bytes):
    with pytest.raises(ApiError) as caught:
        parse(body, ChatRequest)
    assert caught.value.status == 400


@pytest.mark.parametrize(("body", "param"), [({"model": "m"}, "messages"), ({"messages": MESSAGES}, "model")])
def test_a_missing_field_is_named(body: dict[str, object], param: str):
    with pytest.raises(ApiError, match=f"{param} is required") as caught:
        parse(json.dumps(body).encode(), ChatRequest)
    assert (caught.value.param, caught.value.code) == (param, "missing_required_parameter")
