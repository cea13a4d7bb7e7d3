"""How byte-level vocabularies cut text into words before merging, by the name that GGUF files have for it.

The expressions are those of the models' own `tokenizer.json`; llama.cpp gave them their names (`llama-vocab.cpp`).
"""

from __future__ import annotations

from msgspec import Struct
from tokenizers import Regex, normalizers, pre_tokenizers


class PreTokenizer(Struct, frozen=True):
    """One way to cut text into words.

    Attributes:
        splits: expressions applied one after the other; each match becomes a word of its own.
        digits: each digit is a word of its own, before anything else.
        gpt2: then cut words as GPT-2 does.
        nfc: normalize the text to NFC first.
        ignore_merges: a word that is a token is taken whole, whatever the merges say.
        add_bos: texts start with BOS when the file does not say.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def normalizer(self) -> normalizers.Normalizer | None:
        """The step before cutting."""
        return normalizers.NFC() if self.nfc else None

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The cutting, ending in the byte-level alphabet."""
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.extend(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in self.splits)
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2))
        return pre_tokenizers.Sequence(steps)


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

_GPT2_WORDS = PreTokenizer(gpt2=True)
_DIGITS_THEN_GPT2 = PreTokenizer(digits=True, gpt2=True)
_LLAMA3_WORDS = PreTokenizer(splits=(_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_WORDS = PreTokenizer(splits=(_QWEN2,), nfc=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _GPT2_WORDS,
    "gpt-2": _GPT2_WORDS,
    "phi-2": _GPT2_WORDS,
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "command-r": PreTokenizer(digits=True, gpt2=True, nfc=True),
    "llama3": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "llama-bpe": _LLAMA3_WORDS,
    "chatglm-bpe": PreTokenizer(splits=(_LLAMA3,)),
    "glm4": PreTokenizer(splits=(_LLAMA3,), ignore_merges=True),
    "glm5": PreTokenizer(splits=(_LLAMA3,), ignore_merges=True),
    "qwen2": _QWEN2_WORDS,
    "deepseek-r1-qwen": _QWEN2_WORDS,
    "qwen35": PreTokenizer(splits=(_QWEN35,), nfc=True),
    "deepseek-v3": PreTokenizer(splits=_DEEPSEEK_V3),
}
"""By `tokenizer.ggml.pre`."""
