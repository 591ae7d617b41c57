"""Answers held to a JSON schema: whatever is drawn fits it, and what may come next depends on nothing but the text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from support.tiny_tokenizers import byte_level_metadata, sentencepiece_metadata

from swarmd.node.engine.constraint import Constraint, Constraints, check_schema
from swarmd.node.models.tokenizer import Tokenizer

SHIP = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 12},
        "crew": {"type": "integer", "minimum": 1, "maximum": 40},
        "flags": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 3},
        "afloat": {"type": "boolean"},
    },
    "required": ["name", "crew", "flags"],
    "additionalProperties": False,
}
PIECES = ["\u2581", "a", "b", '"', "{", "}", '{"', '":', "\u2581\u00e9", "red", "</s>x"]


def tokenizers() -> dict[str, Tokenizer]:
    return {
        "bytes": Tokenizer.from_gguf(byte_level_metadata()),
        "sentencepiece": Tokenizer.from_gguf(sentencepiece_metadata(PIECES)),
    }


@pytest.fixture(params=["bytes", "sentencepiece", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "smollm2":
        return Tokenizer.from_gguf(request.getfixturevalue("smollm2_metadata"))
    return tokenizers()[request.param]


def held(tokenizer: Tokenizer, schema: Any = SHIP) -> Constraint:
    return made(Constraints(lambda: tokenizer), schema)


def made(constraints: Constraints, schema: Any = SHIP) -> Constraint:
    constraint = constraints.constraint(json.dumps(schema))
    assert constraint is not None
    return constraint


def may_follow(constraint: Constraint, tokens: list[int]) -> list[int]:
    return constraint.allowed(tokens).nonzero()[0].tolist()


def write(tokenizer: Tokenizer, constraint: Constraint, chance: random.Random) -> list[int]:
    """An answer drawn without any sense, up to the token that ends it. It hastens to an end after a while."""
    tokens: list[int] = []
    while not tokens or tokens[-1] not in tokenizer.eos_ids:
        choices = may_follow(constraint, tokens)
        if len(tokens) > 60:
            closing = [t for t in choices if tokenizer.token_bytes(t) in (b'"', b"}", b"]") or t in tokenizer.eos_ids]
            choices = closing or choices
        tokens.append(chance.choice(choices))
    return tokens


def check_ship(ship: dict[str, Any]) -> None:
    assert list(ship) == [key for key in SHIP["properties"] if key in ship], "in the order of the schema"
    assert 3 <= len(ship["name"]) <= 12
    assert type(ship["crew"]) is int
    assert 1 <= ship["crew"] <= 40
    assert 1 <= len(ship["flags"]) <= 3
    assert set(ship["flags"]) <= {"red", "blue"}
    assert isinstance(ship.get("afloat", True), bool)


def test_whatever_is_drawn_fits_the_schema(tokenizer: Tokenizer):
    for seed in range(20):
        tokens = write(tokenizer, held(tokenizer), random.Random(seed))
        assert not set(tokens[:-1]) & tokenizer.hidden
        check_ship(json.loads(tokenizer.decode(tokens)))


def test_what_may_follow_depends_on_the_text_alone(tokenizer: Tokenizer):
    """Drafts that were wrong, another answer in between, a replay in one go: all the same."""
    chance = random.Random(1)
    maker = Constraints(lambda: tokenizer)
    constraint = made(maker)
    answers = [write(tokenizer, constraint, chance) for _ in range(3)]
    for _ in range(40):
        answer = chance.choice(answers)
        part = answer[: chance.randrange(len(answer) + 1)]
        assert may_follow(constraint, part) == may_follow(made(maker), part)


def test_a_complete_answer_can_only_end(tokenizer: Tokenizer):
    constraint = held(tokenizer, {"const": 7})
    assert [tokenizer.token_bytes(t) for t in may_follow(constraint, [])] == [b"7"]
    seven = may_follow(constraint, [])
    assert set(may_follow(constraint, seven)) == tokenizer.eos_ids
    assert set(may_follow(constraint, [*seven, min(tokenizer.eos_ids)])) == tokenizer.eos_ids
    assert set(may_follow(constraint, [*seven, min(tokenizer.eos_ids), seven[0]])) == tokenizer.eos_ids


def test_a_text_that_is_forced_can_be_written(tokenizer: Tokenizer):
    """Whatever tokens a vocabulary has for it."""
    for text in ("hello world of mine", "caf\u00e9 \U0001f600", "<|im_end|></s>"):
        tokens = write(tokenizer, held(tokenizer, {"const": text}), random.Random(0))
        assert json.loads(tokenizer.decode(tokens)) == text


def test_white_space_is_bounded(tokenizer: Tokenizer):
    constraint = held(tokenizer, {"type": "array", "maxItems": 0})
    [bracket] = [t for t in may_follow(constraint, []) if tokenizer.token_bytes(t) == b"["]
    tokens, blank = [bracket], 0
    while spaces := [t for t in may_follow(constraint, tokens) if not tokenizer.token_bytes(t).strip()]:
        tokens.append(spaces[-1])
        blank += len(tokenizer.token_bytes(spaces[-1]))
        assert blank <= 21


def test_a_text_that_does_not_fit_is_an_error_and_costs_nothing(tokenizer: Tokenizer):
    constraint = held(tokenizer)
    at_first = may_follow(constraint, [])
    wrong = tokenizer.encode("never", add_special=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="JSON schema"):
            constraint.allowed(wrong)
        assert may_follow(constraint, []) == at_first


def test_a_model_whose_answers_never_end_cannot_be_held():
    tokenizer = tokenizers()["bytes"]
    tokenizer.eos_ids = frozenset()
    with pytest.raises(ValueError, match="no token that ends"):
        held(tokenizer)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ('{"type": "objec"}', "objec"),
        ('{"type": "string", "format": "nonsense"}', "nonsense"),
        ('{"not": {"type": "string"}}', "not"),
        ('{"$ref": "https://example.com/schema.json"}', "example.com"),
        ('{"$ref": "file:///etc/passwd"}', "passwd"),
        ('{"$ref": "#/definitions/none"}', "none"),
        ('{"type": "string", "pattern": "(?=look ahead)"}', "look"),
        ('{"x-guidance": {"lenient": true}, "not": {}}', "x-guidance"),
        ('{"type": "string", "minLength": 3, "maxLength": 2}', ""),
        ('{"const": -9223372036854775808}', "-9223372036854775808"),
        ('{"type": "integer", "maximum": 1' + "0" * 5000 + "}", "RFC 8259"),
        ('{"x-guidance": {"item_separator": "foo"}, "type": "array"}', "x-guidance"),
        ('{"$ref": "#"}', ""),
        (
            json.dumps({"allOf": [{"anyOf": [{"properties": {f"p{n}{m}": {}}} for m in range(3)]} for n in range(7)]}),
            "",
        ),
        (json.dumps({"properties": {f"p{n}": {"type": "string"} for n in range(700)}}), "items"),
        ("[]", "object"),
        ("true", "object"),
        ("{", "object"),
        ('{"a":' * 3000 + "1" + "}" * 3000, ""),
        ('{"properties": {"a":' * 3000 + "{}" + "}}" * 3000, ""),
    ],
)
def test_schemas_that_cannot_be_honoured_say_why(schema: str, says: str):
    with pytest.raises(ValueError, match=says or None) as caught:
        check_schema(schema)
    assert len(str(caught.value)) < 400


GREEDY_SCHEMAS: list[Callable[[int], Any]] = [
    lambda size: {"type": "string", "pattern": "(" * size + "a" + "{0,50})" * size},
    lambda size: {"type": "string", "minLength": 10**size},
    lambda size: {"enum": [f"{n:04}" for n in range(size * 1000)]},
    lambda size: {"anyOf": [{"type": "string", "pattern": f"[a-m]*{n}[n-z]*"} for n in range(size * 100)]},
    lambda size: {"type": "array", "minItems": 10**size, "items": {"type": "integer"}},
    lambda size: {"properties": {f"p{n}": {"type": ["string", "integer"]} for n in range(size * 150)}},
]


@pytest.mark.parametrize("number", range(len(GREEDY_SCHEMAS)))
def test_a_schema_made_to_be_costly_is_refused_or_can_be_used(number: int):
    """In the text process, which may be ended; here it is enough that an answer is begun or an error said."""
    tokenizer = tokenizers()["bytes"]
    for size in (1, 4, 8):
        schema = GREEDY_SCHEMAS[number](size)
        try:
            check_schema(json.dumps(schema))
            tokens: list[int] = []
            constraint = held(tokenizer, schema)
            while len(tokens) < 20 and (not tokens or tokens[-1] not in tokenizer.eos_ids):
                tokens.append(may_follow(constraint, tokens)[-1])
        except ValueError as error:
            assert str(error)
