"""Targets: the JSON schemas that clients want answers held to."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from fuzz.engine import Target
from fuzz.mutate import mutate
from fuzz.trees import change
from support.tiny_tokenizers import byte_level_metadata

from swarmd.node.engine.constraint import Constraints, check_schema
from swarmd.node.engine.sampling_params import MAX_SCHEMA
from swarmd.node.models.tokenizer import Tokenizer

_NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "value": {"type": ["null", "number"]}}}
SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "object"},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 20},
            "when": {"type": "string", "format": "date-time"},
            "code": {"type": "string", "pattern": "^[A-Z]{2}-(\\d{1,4}|x+)$"},
            "size": {"type": "number", "exclusiveMinimum": 0.5, "maximum": 1e6, "multipleOf": 0.25},
            "tags": {"type": "array", "items": {"enum": ["a", "b", 1, None]}, "minItems": 1, "maxItems": 9},
            "pair": {"type": "array", "prefixItems": [{"const": 7}, {"type": "boolean"}], "items": False},
        },
        "required": ["name", "size"],
        "additionalProperties": {"type": "integer", "minimum": -5, "maximum": 5},
    },
    {"$ref": "#/$defs/node", "$defs": {"node": _NODE}},
    {"anyOf": [{"type": "string"}, {"allOf": [{"type": "object", "required": ["x"]}, _NODE]}], "title": "a"},
    {"oneOf": [{"const": {"a": [1, 2]}}, {"type": "array", "items": {"type": "string", "format": "uuid"}}]},
)
_TOKENS = 12


class Schemas(Target):
    """One is refused in words, or an answer can be begun, whatever tokens are drawn."""

    name = "json schemas"
    errors = (ValueError,)
    memory_per_byte = 256

    def __init__(self) -> None:
        tokenizer = Tokenizer.from_gguf(byte_level_metadata())
        self._constraints = Constraints(lambda: tokenizer)
        self._constraints.constraint("{}")  # what is made once is no input's
        self._ends = tokenizer.eos_ids

    def seeds(self) -> list[bytes]:
        return [json.dumps(schema).encode() for schema in SCHEMAS]

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        if random.random() < 0.2:
            return mutate(random, random.choice(pool), random.choice(pool))
        value: Any = random.choice(SCHEMAS)
        for _ in range(random.randrange(1, 5)):
            value = change(random, value)
        return json.dumps(value).encode()

    def run(self, data: bytes) -> str:
        schema = data.decode(errors="replace")[:MAX_SCHEMA]
        check_schema(schema)
        constraint, random, tokens = self._constraints.constraint(schema), Random(len(data)), []
        assert constraint is not None
        while len(tokens) < _TOKENS and self._ends.isdisjoint(tokens):
            choices = constraint.allowed(tokens).nonzero()[0].tolist()
            tokens.append(random.choice(choices))
        return "ended" if len(tokens) < _TOKENS else "begun"
