"""Texts that tokenizers and detokenizers stumble over."""

from __future__ import annotations

import random

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n \n\t\t x",
    "Hello world",
    " Hello  world ",
    "Hello, y'all! I'LL we've DON'T it's 'tis",
    "w048 7tuijk dsdfhu 3 33 333 3333 3.14159 1,000,000 ½ ² ٣ ५",
    "def f(x):\n    return x[1:]  # comment\n\n\nclass A:\n\tpass\r\n",
    "нещо на Български",
    "កាន់តែពិសេសអាចខលចេញ",
    "我想在apple工作1314151天～ 日本語のテキスト、カタカナ。한국어 문장입니다.",
    "مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया ไทยภาษา",
    "🚀 (normal) 😶‍🌫️ (joined) 👨‍👩‍👧‍👦 ✅ 🇩🇪🏳️‍🌈 e\u0301 \u00e9 ﬁ",
    "Z̴a̷l̶g̸o̵ \u200b\ufeff\u00ad\u2028 nbsp\u00a0x",
    "https://example.org/a?b=c&d=%20#e <html>&amp;</html>",
    "{\"a\": [1, 2.5e-3, null], 'b': `c`} $x_1^2$ \\alpha ~!@#$%^&*()_+",
    "a" * 200,
    "!!!!!! ------ ====== ......",
    "The quick brown fox jumps over the lazy dog. " * 3,
]
"""Plain texts without names of special tokens."""


def random_text(source: random.Random, length: int) -> str:
    """Characters from many scripts, and pieces of TEXTS."""
    ranges = [(0x20, 0x7E), (0x20, 0x7E), (0xA0, 0x24F), (0x400, 0x4FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
    parts: list[str] = []
    while sum(map(len, parts)) < length:
        if source.random() < 0.3:
            parts.append(source.choice(TEXTS))
        else:
            parts.append(chr(source.randint(*source.choice(ranges))))
    return "".join(parts)[:length]


RANDOM_TEXTS = [random_text(random.Random(seed), 300) for seed in range(40)]
"""The same ones in each run."""
