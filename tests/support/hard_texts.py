"""Texts that tokenizers stumble over, in many scripts."""

from __future__ import annotations

import itertools

PLAIN = (
    "",
    " ",
    "Hello, world!",
    "  leading and   inner  spaces ",
    "tabs\tand\nnew\n\n\nlines\r\n",
    "I'll say it's what they've done; he'd DON'T I'M WE'RE you'Ve \u017f's",
    "1234567890 3.14159 1,000,000 0x1F \u00bd \u00b2 \u2167 \u0661\u0662\u0663 \uff11\uff12\uff13",
    "def f(x):\n    return x**2  # comment\n\n\tif a!=b: pass",
    'fn main() { println!("{}", x[0] << 3 | !y); } // ok',
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE HTTPServer",
    "na\u00efve caf\u00e9 fa\u00e7ade \u00c5ngstr\u00f6m e\u0301 A\u030a \u1e9b\u0323 \u2126 \u212a",
    "Gr\u00f6\u00dfe, Stra\u00dfe, \u00dcbermut",
    "Здравствуй, мир",
    "γειά σου κόσμε",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "ខ្មែរ កាន់តែពិសេស",
    "你好，世界。今天天气不错！",
    "こんにちは世界、カタカナ",
    "안녕하세요 세계",
    "emoji 😀😃 👩‍👩‍👧‍👦 🇫🇷 ✊🏽 ❤️",
    "math ∑∏∫√∞ ≤≥≠ → x²",
    "zero\u200bwidth nb\u00a0sp \u3000wide \u2028line \ufeffbom",
    "almost <|im_end| > and <im_end> < | > [INST [/INST] <unk <0x41> </s",
    '{"json": [1, 2, {"a": null}], "s": "\\n"}',
    "https://example.org/a/b?c=d&e=%20f#g",
    "\x00\x01 control \x7f bytes \x1b[0m",
    "!?…—–-'\"«»„“” /path//x/\n/y",
    "trailing newline\n",
    "▁literal▁lower▁▁one eighth",
    "Ġ Ċ ĉ Ã©",
    "Cửa Việt",
    "\u0301\u0301 lone marks \u0e31\u0e31",
    "\ufffd replacement \U0010ffff last \ufdd1",
    "كِتَابٌ e\u0301\u0323\u0302 q\u0307\u0323",
    "日本語とEnglishが混ざる text です123円",
    "one\u0085two\u000bthree\u000cfour",
)

RUNS = tuple(
    unit * count
    for unit, count in itertools.product(
        (" ", "\n", "\r\n", "\t", "7", "a", "é", "漢", "🙂", "the ", " \n", "!", "\x00", "▁"), (1, 2, 3, 4, 7, 16, 37)
    )
)

MIXED = tuple(left + right for left, right in itertools.product(("a", " 1", "\n", "é", "漢", "🙂", "<"), PLAIN[2:24]))

TEXTS = PLAIN + RUNS + MIXED
"""Without control tokens; nearly three hundred."""

LONE_SURROGATES = ("a\ud800b", "\udc00", "\ud83d\ude00 \ud83d", "x\udfff\ud800y")
