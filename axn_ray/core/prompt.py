"""The text that a causal language model reads around a pair, cut into parts that are tokenized apart.

A query and an item are tokenized once, each with the blanks that its tokenizer would join to it; the parts' ids, put
together, are those of the whole text. Knows no weights.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from axn_ray.core.tokens import PairTemplate, TokenTable
from axn_ray.errors import InputError, ModelError

# Source: the model card of Qwen3-Reranker.
QWEN3_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {item}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_PARTS = re.compile(r"(.*?)( *)\{query\}([\r\n]*)(.*?)( *)\{item\}([\r\n]*)(.*)", re.DOTALL)
_PROBES = ("he ran home", "what is it?", "(see 12.5)", "a: b.", '"so"')


@dataclass(frozen=True)
class Prompt:
    """`prefix before[0] query after[0] middle before[1] item after[1] suffix`: blanks stand with the text they may join."""

    prefix: str
    middle: str
    suffix: str
    before: tuple[str, str]
    after: tuple[str, str]

    @classmethod
    def of(cls, template: str, instruction: str) -> "Prompt":
        """Cut a template with {query}, then {item}, each once, and {instruction} anywhere.

        Raises:
            InputError: another template.
        """
        if template.count("{query}") != 1 or template.count("{item}") != 1:
            raise InputError(f"template {template[:60]!r} must hold {{query}} and {{item}}, each once")
        found = _PARTS.fullmatch(template)
        if found is None:
            raise InputError(f"template {template[:60]!r} has {{item}} before {{query}}; put the query first")
        prefix, middle, suffix = (found[part].replace("{instruction}", instruction) for part in (1, 4, 7))
        return cls(prefix, middle, suffix, before=(found[2], found[5]), after=(found[3], found[6]))

    def render(self, query: str, item: str) -> str:
        """The whole text of one pair."""
        return self.prefix + self._wrap(query, 0) + self.middle + self._wrap(item, 1) + self.suffix

    def _wrap(self, text: str, side: int) -> str:
        return self.before[side] + text + self.after[side]

    def tokenize(self, texts: Sequence[str], side: int, tokenizer: Any) -> TokenTable:
        """Tokenize n queries (side 0) or items (side 1) with their blanks; a text without words has no ids."""
        return TokenTable.from_texts([self._wrap(text, side) if text.strip() else "" for text in texts], tokenizer)

    def pair_template(self, tokenizer: Any) -> PairTemplate:
        """The fixed parts as ids.

        Raises:
            ModelError: the tokenizer joins text across the parts, so that they cannot be tokenized apart.
        """
        fixed = TokenTable.from_texts([self.prefix, self.middle, self.suffix], tokenizer)
        prefix, middle, suffix = (tuple(fixed[row].tolist()) for row in range(3))
        queries, items = (self.tokenize(_PROBES, side, tokenizer) for side in (0, 1))
        for row, probe in enumerate(_PROBES):
            whole = tokenizer(self.render(probe, probe), add_special_tokens=False)["input_ids"]
            if [*prefix, *queries[row], *middle, *items[row], *suffix] != whole:
                raise ModelError(
                    f"the tokenizer joins {probe!r} to the template's text; let a line end or a special token follow {{query}} "
                    "and {item}"
                )
        pad = tokenizer.pad_token_id or 0  # masked, and after the token that is read: any id will do
        return PairTemplate(prefix, middle, suffix, 0, 0, (0,) * len(middle), pad, uses_types=False)
