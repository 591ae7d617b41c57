"""The official `openai` client, which checks every response against its types, talks to a real node."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import APIError, BadRequestError, NotFoundError, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field
from support.answers import MODEL
from support.fake_node import FakeNode, piece, serving
from support.swarm import Node

from swarmd.node.models.tokenizer import Tokenizer
from swarmd.node.serving.generation import GenerationError

FRANCE: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
COUNT: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Count from one to ten in words."}]


class Gull(BaseModel):
    """What an answer is to be."""

    name: str = Field(max_length=20)
    age: int = Field(ge=1, le=40)


GULL: dict[str, object] = Gull.model_json_schema()


def schema_format(schema: dict[str, object]) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.fixture(scope="module")
def client(node: Node) -> OpenAI:
    return OpenAI(
        base_url=f"{node.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=120,
        _strict_response_validation=True,
    )


def test_lists_and_retrieves_models(client: OpenAI):
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "swarmd")
    assert client.models.retrieve(MODEL) == model


def test_a_model_that_nobody_serves(client: OpenAI):
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve("no-such-model")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(NotFoundError) as caught:
        client.chat.completions.create(model="no-such-model", messages=FRANCE)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert MODEL in caught.value.message


def test_a_chat(client: OpenAI):
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=24)
    [choice] = answer.choices
    assert "Paris" in (choice.message.content or "")
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_same_answer_in_pieces(client: OpenAI):
    whole = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=24)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=FRANCE,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in pieces if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in pieces)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_has_no_usage_unless_asked(client: OpenAI):
    stream = client.chat.completions.create(model=MODEL, messages=FRANCE, max_tokens=2, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_an_answer_can_go_back_into_the_conversation(client: OpenAI):
    first = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=24)
    message: ChatCompletionMessageParam = first.choices[0].message  # pyright: ignore[reportAssignmentType]
    second = client.chat.completions.create(
        model=MODEL,
        messages=[*FRANCE, message, {"role": "user", "content": "And of Italy?"}],
        temperature=0,
        max_tokens=4,
    )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_completion(client: OpenAI):
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=5, logprobs=2
    )
    [choice] = answer.choices
    assert "Paris" in choice.text
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert [len(top) for top in choice.logprobs.top_logprobs or []] == [2] * 5
    assert choice.logprobs.text_offset == [0, *_offsets(choice.logprobs.tokens or [])[:-1]]


def test_a_completion_as_a_stream(node: Node):
    # The client's type for these chunks knows no null as finish_reason, which is what OpenAI's own endpoint sends.
    lenient = OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=120)
    ask = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 4}
    whole = lenient.completions.create(**ask)
    chunks = list(lenient.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]


def test_log_probabilities(client: OpenAI):
    answer = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    [choice] = answer.choices
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert answer.usage is not None
    assert len(tokens) == answer.usage.completion_tokens == 6
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        # Greedy: the token is the likeliest one.
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, values[0])
        assert values[0] <= 0
        assert bytes(token.bytes or []).decode() == token.token


def test_stop_strings_end_an_answer_and_are_not_part_of_it(client: OpenAI):
    free = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=24)
    text = free.choices[0].message.content or ""
    before, stop, _ = text.partition("Paris")
    assert stop
    for wish, expected in (("Paris", before), (["Paris", "is Par"], text.partition("is Par")[0])):
        answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=24, stop=wish)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, max_tokens=24, stop="Paris", stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == before


def test_a_seed_gives_the_same_answer_again(client: OpenAI):
    def ask(seed: int) -> str | None:
        answer = client.chat.completions.create(model=MODEL, messages=COUNT, temperature=1.0, seed=seed, max_tokens=8)
        return answer.choices[0].message.content

    first = ask(7)
    assert ask(7) == first
    assert ask(8) != first


def test_max_tokens_is_kept_to(client: OpenAI):
    for wish in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        answer = client.chat.completions.create(model=MODEL, messages=COUNT, temperature=0, **wish)  # pyright: ignore
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3


def test_a_bias_bans_a_token_and_forces_one(client: OpenAI, smollm2_metadata: dict[str, Any]):
    tokenizer = Tokenizer.from_gguf(smollm2_metadata)
    [paris], [rome] = (tokenizer.encode(word, add_special=False) for word in (" Paris", " Rome"))

    def ask(bias: dict[str, int]) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=1, logit_bias=bias
        )
        return answer.choices[0].text

    assert ask({}) == " Paris"
    assert ask({str(paris): -100}) != " Paris"
    assert ask({str(rome): 100}) == " Rome"


def test_an_answer_is_parsed_into_the_clients_own_class(client: OpenAI):
    wish: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Describe a gull as JSON: its name and age."}]
    for seed in range(3):
        answer = client.chat.completions.parse(model=MODEL, messages=wish, seed=seed, response_format=Gull)
        [choice] = answer.choices
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Gull)
    seeded: dict[str, Any] = {"model": MODEL, "messages": wish, "seed": 1, "response_format": schema_format(GULL)}
    whole = client.chat.completions.create(**seeded).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**seeded, stream=True)]
    assert "".join(pieces) == whole
    assert Gull.model_validate_json(str(whole))


def test_any_json_object(client: OpenAI):
    wish: Any = {"response_format": {"type": "json_object"}, "stop": ["}"], "temperature": 0, "max_tokens": 60}
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, **wish).choices[0]
    assert (answer.message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"mood": "good"}}, "mood"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": schema_format({"type": "object", "not": {}})}, "response_format"),
        ({"logit_bias": {"Paris": 5}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
    ],
)
def test_what_cannot_be_done_names_the_parameter(client: OpenAI, wish: dict[str, object], param: str):
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**({"model": MODEL, "messages": FRANCE} | wish))  # pyright: ignore
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_longer_than_the_context_says_how_long_both_are(client: OpenAI):
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[5] * 1500)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"
    assert "1500 tokens" in caught.value.message
    assert "1024" in caught.value.message
    with pytest.raises(BadRequestError):
        client.completions.create(model=MODEL, prompt=[10**6])


async def test_an_error_in_the_middle_of_a_stream_keeps_its_code():
    node = FakeNode(piece("Pa"), GenerationError("node_lost", "a node of the pipeline was lost"))
    async with serving(node) as url:
        client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        )
        stream = await client.chat.completions.create(model="fake:1b", messages=FRANCE, stream=True)
        chunks = aiter(stream)
        assert [(await anext(chunks)).choices[0].delta.content for _ in range(2)] == ["", "Pa"]
        with pytest.raises(APIError, match="a node of the pipeline was lost") as caught:
            await anext(chunks)
        assert caught.value.code == "node_lost"
        await client.close()


def _offsets(tokens: list[str]) -> list[int]:
    """Where the text after each token begins."""
    return [sum(map(len, tokens[: i + 1])) for i in range(len(tokens))]
