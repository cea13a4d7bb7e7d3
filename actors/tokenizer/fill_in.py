"""Filling in the middle: how code models are shown what stands before and behind what they are to write."""

from __future__ import annotations

from typing import NamedTuple

from llm_runtime.actors.vocabulary import Vocabulary


class Format(NamedTuple):
    """A family's tokens, by name.

    Attributes:
        prefix: before what stands before. suffix: before what stands behind. middle: last of all, empty for none.
        ends: what ends the middle, beside the model's own end of text.
        suffix_first: what stands behind comes first.
    """

    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...] = ()
    suffix_first: bool = False


FORMATS = (
    # Qwen2.5-Coder; CodeGemma
    Format(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    # StarCoder, Granite; SantaCoder
    Format("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<fim_pad>", "<file_sep>", "<repo_name>", "<filename>")),
    Format("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<fim-pad>",)),
    # CodeLlama
    Format("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),
    # DeepSeek-Coder, DeepSeek-V2 and later
    Format("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    # Codestral
    Format("[PREFIX]", "[SUFFIX]", "", (), suffix_first=True),
    # Seed-Coder
    Format("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", (), suffix_first=True),
    # CodeGeeX4
    Format("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
)


def fill_in(vocabulary: Vocabulary, before: str, behind: str, add_special: bool) -> tuple[list[int], list[int]] | None:
    """Token ids of a prompt to which the model answers with what stands between two texts, and ids that end the answer.
    None if the vocabulary has no tokens for it."""
    id_of = vocabulary.tokenizer.token_to_id
    for form in FORMATS:
        names = [name for name in (form.prefix, form.suffix, form.middle) if name]
        markers = [token for name in names if (token := id_of(name)) is not None]
        if len(markers) < len(names):
            continue
        prefix, suffix, *middle = markers
        first = [prefix, *vocabulary.encode(before, add_special=False)]
        second = [suffix, *_within(vocabulary, behind)]
        begin = vocabulary.encode("", add_special=True) if add_special else []
        parts = [*second, *first] if form.suffix_first else [*first, *second]
        others = [id_of(name) for name in form.ends]
        return [*begin, *parts, *middle], [*markers, *(each for each in others if each is not None)]
    return None


def _within(vocabulary: Vocabulary, text: str) -> list[int]:
    """The token ids of a text that another one goes on with: without the space that some put before a whole text."""
    mark = vocabulary.encode("\n", add_special=False)
    ids = vocabulary.encode("\n" + text, add_special=False)
    if vocabulary.strips_leading_space and ids[: len(mark)] == mark:
        return ids[len(mark) :]
    return vocabulary.encode(text, add_special=False)
