"""Tokenizers and chat templates made to hang or to eat memory cost one process, not the node."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.tiny_gguf import write_tiny_gguf
from support.trained_tokenizers import byte_level, splits, write_folder

from swarmd.node.models import text_process, text_worker
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.front import ModelFront
from swarmd.node.models.text_process import ModelText, TextError, TextTooLongError, TooBusyError

LIMIT = 1 << 20
ASK = [{"role": "user", "content": "What is 2 < 3 & 'so' on?\n"}]
CONFIG = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
# Only a long message makes these slow, so that one can see what becomes of a model afterwards.
SLOW = (
    "{% set text = messages[0].content %}{% if text | length > 9999 %}"
    "{% for i in range(400) %}{% for j in range(400) %}{% if 'needle' in text or 'hay' in text %}{% endif %}"
    "{% endfor %}{% endfor %}{% endif %}x"
)
OVERLAPPING = r"(?:a|aa|a+)+(?=b)|[\s\S]"


@pytest.fixture(scope="module")
def backend() -> Any:
    """A trained tokenizer."""
    return byte_level(splits(WORDS))


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[ModelText]:
    text = await ModelText.open(path)
    try:
        yield text
    finally:
        await text.close()


def talk(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The folder, its tokenizer.json changed."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("form", ["folder", "gguf"])
async def test_ids_and_texts_are_those_of_the_tokenizer_itself(form: str, backend: Any, tmp_path: Path):
    path = write_folder(tmp_path / "model", backend, **CONFIG)
    if form == "gguf":
        path = write_tiny_gguf(tmp_path / "tiny.gguf")
    front = ModelFront.load(path)
    async with opened(path) as text:
        for content in ("hi", "", "two\n\nlines  ", "\u00e9\U0001f600\u0000 <|im_end|>", "x" * 5000):
            assert await text.encode_chat(talk(content), LIMIT) == front.encode_rendered(front.render(talk(content)))
            assert await text.encode_text(content, LIMIT) == front.encode_text(content)
        ids = front.encode_text("What is the capital of France?")
        assert text.tokenizer.decode(ids) == front.tokenizer.decode(ids)
        assert text.tokenizer.eos_ids == front.tokenizer.eos_ids
        assert text.tokenizer.vocab_size == front.tokenizer.vocab_size
        every = range(front.tokenizer.vocab_size)
        assert list(map(text.tokenizer.token_bytes, every)) == list(map(front.tokenizer.token_bytes, every))


async def test_a_template_made_to_be_slow_is_ended_while_other_models_answer(backend: Any, tmp_path: Path):
    evil = write_folder(tmp_path / "evil", backend, **CONFIG, chat_template=SLOW)
    good = write_folder(tmp_path / "good", backend, **CONFIG)
    async with opened(evil) as slow, opened(good) as quick:
        process = psutil.Process(slow._process.pid if slow._process else 0)
        asked = asyncio.create_task(slow.encode_chat(talk("a" * 500_000), LIMIT))
        answered = 0
        while not asked.done():
            await quick.encode_chat(ASK, LIMIT)
            answered += 1
        with pytest.raises(TextError, match="took too long with this request"):
            await asked
        assert answered > 10
        assert not process.is_running()
        assert await slow.encode_chat(ASK, LIMIT), "the next request has a process again"


async def test_a_schema_is_checked_and_refused_in_words(backend: Any, tmp_path: Path):
    async with opened(write_folder(tmp_path / "model", backend, **CONFIG)) as text:
        await text.check_schema('{"type": "object"}')
        with pytest.raises(TextError, match="objec"):
            await text.check_schema('{"type": "objec"}')
        await text.check_schema('{"type": "object"}')


async def test_an_expression_that_backtracks_is_ended(backend: Any, tmp_path: Path):
    evil = write_folder(tmp_path / "evil", backend, **CONFIG)

    def backtracks(raw: dict[str, Any]) -> None:
        raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = OVERLAPPING

    async with opened(changed(evil, backtracks)) as slow:
        began = time.process_time()
        with pytest.raises(TextError, match=r"(took too long|failed) with this request"):
            await slow.encode_text("a" * 20_000, LIMIT)
        assert time.process_time() - began < 1, "the time went by in the other process"
        assert await slow.encode_text("b", LIMIT)


async def test_a_normalizer_that_makes_a_text_grow_again_and_again_never_comes_to_be(backend: Any, tmp_path: Path):
    evil = write_folder(tmp_path / "evil", backend, **CONFIG)
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    changed(evil, lambda raw: raw.update(normalizer={"type": "Sequence", "normalizers": [grow] * 9}))
    with pytest.raises(ModelFileError, match=r"the tokenizer of evil took too (much memory|long).*another copy"):
        await ModelText.open(evil)


async def test_a_normalizer_that_needs_a_certain_text_to_grow_is_ended_too(backend: Any, tmp_path: Path):
    evil = write_folder(tmp_path / "evil", backend, **CONFIG)
    grow = {"type": "Replace", "pattern": {"String": "q"}, "content": "q" * 1000}
    changed(evil, lambda raw: raw.update(normalizer={"type": "Sequence", "normalizers": [grow] * 9}))
    async with opened(evil) as text:
        with pytest.raises(TextError, match="took too"):
            await text.encode_text("q", LIMIT)
        assert await text.encode_text("b", LIMIT)


async def test_a_giant_prompt_does_not_hold_up_the_loop(backend: Any, tmp_path: Path):
    async with opened(write_folder(tmp_path / "model", backend, **CONFIG)) as text:
        asked = asyncio.create_task(text.encode_text("the there then " * 100_000, LIMIT))
        longest, last = 0.0, time.perf_counter()
        while not asked.done():
            await asyncio.sleep(0)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        assert len(await asked) > 100_000
        # In this process it would be several seconds: the library holds Python's lock.
        assert longest < 0.7


async def test_what_cannot_fit_is_not_even_tokenized(backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async with opened(write_folder(tmp_path / "model", backend, **CONFIG)) as text:
        longest = max(len(text.tokenizer.token_bytes(i)) for i in range(text.tokenizer.vocab_size))
        with pytest.raises(TextTooLongError) as caught:
            await text.encode_text("a" * (1000 * longest), 900)
        assert caught.value.count == 1000
        with pytest.raises(TextTooLongError) as caught:
            await text.encode_text("b a " * 200, 100)
        assert caught.value.count >= 200


async def test_who_leaves_early_gets_nobody_elses_answer(backend: Any, tmp_path: Path):
    async with opened(write_folder(tmp_path / "model", backend, **CONFIG)) as text:
        expected = await text.encode_text("bb", LIMIT)
        left = asyncio.create_task(text.encode_text("the there then " * 9999, LIMIT))
        await asyncio.sleep(0)
        left.cancel()
        assert await text.encode_text("bb", LIMIT) == expected
        assert left.cancelled()


async def test_a_queue_that_is_full_says_so(backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_process, "MOST_WAITING", 2)
    async with opened(write_folder(tmp_path / "model", backend, **CONFIG)) as text:
        results = await asyncio.gather(*(text.encode_text("a", LIMIT) for _ in range(5)), return_exceptions=True)
    assert [isinstance(result, TooBusyError) for result in results] == [False, False, True, True, True]


async def test_a_process_that_was_killed_or_had_nothing_to_do_is_replaced(backend: Any, tmp_path: Path):
    async with opened(write_folder(tmp_path / "model", backend, **CONFIG)) as text:
        expected = await text.encode_text("a", LIMIT)
        for end in (lambda process: process.kill(), lambda _: text._end_idle()):
            process = text._process
            assert process is not None
            end(process)
            await process.wait()
            assert await text.encode_text("a", LIMIT) == expected


async def test_damaged_files_are_named_in_their_readers_own_words(backend: Any, tmp_path: Path):
    folder = write_folder(tmp_path / "model", backend, **CONFIG)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json is not valid JSON"):
        await ModelText.open(folder)


def test_the_process_reads_no_more_than_a_question_may_have():
    read, write = os.pipe()
    os.write(write, (1 << 31).to_bytes(4, "big") + b"x" * 100)
    with os.fdopen(read, "rb") as questions:
        assert text_worker._read(questions) is None
    os.close(write)
