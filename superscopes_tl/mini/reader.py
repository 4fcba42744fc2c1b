"""Read hidden states of the bundled model through the paper's target prompt, plain transformers.

1. Run the target prompt up to its placeholder `x` once and keep the KV cache.
2. Run the source texts and keep block outputs and MLP outputs of their last tokens.
3. Per batch of vectors, give every row the cached prefix, run `x` with the block output of the
   target layer replaced, and continue greedily until every row has closed its description.
4. The reading is the text up to the next `,`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from superscopes_tl.mini import MODEL_DIR
from superscopes_tl.mini.corpus import PLACEHOLDER
from superscopes_tl.mini.facts import FEW_SHOT

PREFIX = "".join(f"{name}: {description}, " for name, description in FEW_SHOT)
BATCH = 256


def crop(text: str) -> str:
    """Return the description at the start of a continuation.

    >>> crop(": Country in the Middle East, Leonardo")
    'Country in the Middle East'
    """
    return text.split(",")[0].lstrip(" :").strip()


@dataclass(frozen=True)
class States:
    """Last-token activations of some texts.

    Attributes:
        resid_post: `[layer text d_model]` block outputs.
        mlp_out: `[layer text d_model]` MLP outputs.
    """

    resid_post: Float[Tensor, "layer text d_model"]
    mlp_out: Float[Tensor, "layer text d_model"]


class Reader:
    """The bundled model with the paper's target prompt, ready to read vectors."""

    def __init__(self, folder: Path = MODEL_DIR) -> None:
        """Load the model in float32 and run the target prompt up to its placeholder."""
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.n_layers: int = self.model.config.num_hidden_layers
        self.max_new_tokens: int = self.model.generation_config.max_new_tokens
        self._placeholder = self.tokenize(PLACEHOLDER)[-1]
        prefix = torch.tensor([self.tokenize(PREFIX.rstrip())])
        with torch.no_grad():
            self._prefix = self.model(prefix, use_cache=True).past_key_values
        self._comma = self.tokenize("x,")[-1]

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens, `<s>` first."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> States:
        """Run the texts and keep what their last tokens carry."""
        ids = [self.tokenize(text) for text in texts]
        last = torch.tensor([len(row) - 1 for row in ids])
        rows = torch.arange(len(ids))
        batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], True)
        kept: dict[str, list[Tensor]] = {"resid_post": [], "mlp_out": []}

        def keep(name: str) -> Callable[[Any, Any, Any], None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                kept[name].append(tensor[rows, last])

            return hook

        hooks = []
        for block in self.model.model.layers:
            hooks.append(block.mlp.register_forward_hook(keep("mlp_out")))
            hooks.append(block.register_forward_hook(keep("resid_post")))
        try:
            # Padding stands on the right, where causal attention never looks.
            self.model(batch, use_cache=False)
        finally:
            for handle in hooks:
                handle.remove()
        return States(torch.stack(kept["resid_post"]), torch.stack(kept["mlp_out"]))

    def _start(self, rows: int) -> DynamicCache:
        cache = DynamicCache()
        for number, layer in enumerate(self._prefix.layers):
            keys = layer.keys.expand(rows, -1, -1, -1)
            values = layer.values.expand(rows, -1, -1, -1)
            cache.update(keys, values, number)
        return cache

    def _continue(
        self,
        ids: Int[Tensor, "batch seq"],
        patch: Tensor | None = None,
        at: int = 0,
        generator: torch.Generator | None = None,
    ) -> list[str]:
        """Continue the prefix and `ids`; `patch` replaces block `at`'s only output."""
        cache = self._start(len(ids))
        if patch is None:
            out = self.model(ids, past_key_values=cache, use_cache=True)
        else:

            def hook(module: Any, inputs: Any, output: Any) -> Any:
                new = patch.unsqueeze(1)
                return (new, *output[1:]) if isinstance(output, tuple) else new

            handle = self.model.model.layers[at].register_forward_hook(hook)
            try:
                out = self.model(ids, past_key_values=cache, use_cache=True)
            finally:
                handle.remove()
        texts = [""] * len(ids)
        # Rows that have closed their description leave the batch when they are half of it.
        rows = torch.arange(len(ids))
        written = torch.empty((len(ids), 0), dtype=torch.long)
        closed = torch.zeros(len(ids), dtype=torch.bool)
        for step in range(self.max_new_tokens):
            logits = out.logits[:, -1]
            if generator is None:
                token = logits.argmax(-1)
            else:
                token = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
            written = torch.cat([written, token.unsqueeze(1)], 1)
            closed |= token == self._comma
            if bool(closed.all()) or step + 1 == self.max_new_tokens:
                break
            if 2 * int(closed.sum()) > len(closed):
                for row, tokens in zip(
                    rows[closed].tolist(), written[closed].tolist(), strict=True
                ):
                    texts[row] = crop(self.tokenizer.decode(tokens))
                rows, written, token = rows[~closed], written[~closed], token[~closed]
                cache.batch_select_indices(torch.nonzero(~closed).squeeze(1))
                closed = closed[~closed]
            out = self.model(token.unsqueeze(1), past_key_values=cache, use_cache=True)
        for row, tokens in zip(rows.tolist(), written.tolist(), strict=True):
            texts[row] = crop(self.tokenizer.decode(tokens))
        return texts

    @torch.no_grad()
    def read(
        self,
        vectors: Float[Tensor, "n d_model"],
        layer: int = 0,
        generator: torch.Generator | None = None,
    ) -> list[str]:
        """Patch each vector over the placeholder's block output and return the readings.

        Args:
            vectors: `[n d_model]` what to write, already amplified.
            layer: The target layer.
            generator: Draw the tokens at temperature 1 from it; greedy unless given.
        """
        texts: list[str] = []
        for part in torch.split(vectors, BATCH):
            ids = torch.full((len(part), 1), self._placeholder)
            texts += self._continue(ids, part, layer, generator)
        return texts

    @torch.no_grad()
    def recall(self, names: Sequence[str]) -> list[str]:
        """Return what the model writes after each name in plain text, same few-shot prefix."""
        by_length: dict[int, list[int]] = {}
        encoded = [self.tokenize(name)[1:] for name in names]
        for index, ids in enumerate(encoded):
            by_length.setdefault(len(ids), []).append(index)
        texts = [""] * len(names)
        for members in by_length.values():
            for start in range(0, len(members), BATCH):
                part = members[start : start + BATCH]
                batch = torch.tensor([encoded[index] for index in part])
                for index, text in zip(part, self._continue(batch), strict=True):
                    texts[index] = text
        return texts
