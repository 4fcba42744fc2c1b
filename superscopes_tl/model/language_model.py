"""What the rest of the package needs to know of a model, whatever class it is.

1. `LanguageModel` states it: the TransformerLens object with its hook points, the tokenizer, the
   decoder, the kinds of activation that exist, sizes, special tokens, provenance.
2. `describe_model` reads it off a TransformerLens object.

`loading.load_model` makes one from anything that is a model.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from superscopes_tl.model.decoder import Decoder, decoder_for
from superscopes_tl.model.sites import KINDS, HookKind, hook_name
from superscopes_tl.model.verification import Seen

Hook = Callable[..., Tensor | None]

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model with TransformerLens hooks.

    Attributes:
        name: how results and messages call it.
        lens: the `HookedTransformer` or `TransformerBridge`.
        tokenizer: a fast Hugging Face tokenizer, as it came (TransformerLens alters its own copy).
        decoder: cached decoding with `lens`.
        kinds: the kinds of activation that this model computes.
        n_layers: number of blocks.
        d_model: width of the residual stream.
        n_ctx: longest sequence, in tokens.
        n_vocab: how many tokens have an embedding; a tokenizer may know more.
        prefix_ids: put in front of every prompt: the BOS, or whatever the tokenizer puts there by
            itself; empty if prompts start without.
        eos_token_ids: any of these ends a generation.
        max_new_tokens: the model's own default length of a generation
            (`generation_config.json`), if it states one.
        processing: what was done to the weights; "none" is the raw model.
        fingerprint: a hash of the weights (of every parameter its name, shape and first values).
        revision: the hub commit, where there is one.
        origin: loads the same model in another process; `None` of one that was made in memory.
        source: of weights from a file that was quantized: the file, its hash, how it stored them.
        absent: why the kinds that are not among `kinds` are not, where that is known.
    """

    name: str
    lens: Any
    tokenizer: Any
    decoder: Decoder
    kinds: tuple[HookKind, ...]
    n_layers: int
    d_model: int
    n_ctx: int
    n_vocab: int
    prefix_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    max_new_tokens: int | None
    processing: str
    fingerprint: str
    revision: str | None
    origin: Callable[[], LanguageModel] | None = None
    source: Mapping[str, str] | None = None
    absent: Mapping[HookKind, str] = field(default_factory=dict)

    @property
    def bos_token_id(self) -> int | None:
        """The BOS token, if prompts start with it."""
        bos: int | None = self.tokenizer.bos_token_id
        return bos if bos in self.prefix_ids else None

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the weights."""
        return next(iter(self.lens.parameters())).dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where tokens have to be put."""
        return next(iter(self.lens.parameters())).device  # type: ignore[no-any-return]

    @property
    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """Held during a forward pass: hooks are on the model, so one thread runs it at a time."""
        lock: contextlib.AbstractContextManager[Any] = _LOCKS.setdefault(
            self.lens, threading.RLock()
        )
        return lock

    @contextlib.contextmanager
    def hooks(self, hooks: Sequence[tuple[str, Hook]]) -> Iterator[None]:
        """Return a context in which the named hook points run the given functions."""
        # Not through `lens.hooks`, which collects all points of a bridge anew for every hook:
        # with a hook per layer that takes longer than a small batch.
        lens = self.lens
        points = lens.hook_dict if hooks else {}
        placed = [(points[name], function) for name, function in hooks]
        lens.context_level += 1
        level = lens.context_level
        try:
            for point, function in placed:
                point.add_hook(function, level=level)
            yield
        finally:
            for point, _ in placed:
                point.remove_hooks(level=level)
            lens.context_level -= 1

    def activations(
        self, tokens: Int[Tensor, "batch pos"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Run `tokens` once and return what the named hook points saw, `batch pos d_model`."""
        with self.lock, torch.no_grad():
            _, cache = self.lens.run_with_cache(
                tokens, names_filter=list(names), return_cache_object=False
            )
        return {name: cache[name] for name in names}

    def provenance(self) -> dict[str, Any]:
        """Return what a reader needs to get the same model again, as plain data."""
        return {
            "name": self.name,
            "backend": self.decoder.name,
            "revision": self.revision,
            "source": dict(self.source) if self.source else None,
            "fingerprint": self.fingerprint,
            "weight_processing": self.processing,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "prepend_bos": self._prepend_bos(),
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "transformer_lens": version("transformer-lens"),
            "transformers": version("transformers"),
            "torch": str(torch.__version__),
        }

    def _prepend_bos(self) -> bool | None:
        """Return the argument of `load_model` that leads to the same prefix."""
        if not self.prefix_ids:
            return False
        return True if self.prefix_ids == (self.tokenizer.bos_token_id,) else None

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"LanguageModel({self.name!r}: {self.n_layers} layers x {self.d_model}, "
            f"{self.decoder.name}, {dtype}, {self.device})"
        )


def describe_model(
    lens: Any,
    tokenizer: Any,
    *,
    name: str,
    hf: Any,
    prefix: tuple[int, ...],
    processing: str,
    fingerprint: str,
    origin: Callable[[], LanguageModel] | None = None,
    source: Mapping[str, str] | None = None,
    seen: Seen | None = None,
) -> LanguageModel:
    """Read off a TransformerLens object what a `LanguageModel` states.

    Args:
        lens: the `HookedTransformer` or `TransformerBridge`.
        tokenizer: a fast Hugging Face tokenizer.
        name: how to call the model.
        hf: the Hugging Face model behind it, where there is one.
        prefix: the tokens that prompts start with.
        processing: what was done to the weights.
        fingerprint: from `weight_fingerprint`.
        origin: what loads it again.
        source: the file that the weights were dequantized from.
        seen: what its hooks showed when it was checked; unless given, every hook point that has
            a name is taken to be there.
    """
    cfg = lens.cfg
    last = cfg.n_layers - 1
    if seen is None:
        seen = Seen(tuple(kind for kind in KINDS if hook_name(kind, last) in lens.hook_dict))
    n_ctx = [cfg.n_ctx, getattr(getattr(hf, "config", None), "max_position_embeddings", None)]
    generation = getattr(hf, "generation_config", None)
    return LanguageModel(
        name=name,
        lens=lens,
        tokenizer=tokenizer,
        decoder=decoder_for(lens, unembeds=seen.unembeds),
        kinds=seen.kinds,
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        n_ctx=min(n for n in n_ctx if n),
        n_vocab=cfg.d_vocab,
        prefix_ids=prefix,
        eos_token_ids=_eos_token_ids(tokenizer, generation),
        max_new_tokens=getattr(generation, "max_new_tokens", None),
        processing=processing,
        fingerprint=fingerprint,
        revision=getattr(getattr(hf, "config", None), "_commit_hash", None),
        origin=origin,
        source=source,
        absent=seen.absent,
    )


def _eos_token_ids(tokenizer: Any, generation: Any) -> tuple[int, ...]:
    """Return what ends a text: the model's own list, else the tokenizer's one token."""
    declared = getattr(generation, "eos_token_id", None)
    if declared is None:
        declared = tokenizer.eos_token_id
    ids = declared if isinstance(declared, list | tuple) else [declared]
    return tuple(int(i) for i in ids if i is not None)


def weight_fingerprint(module: Any) -> str:
    """Return a hash of every parameter's name, shape and first 256 numbers."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        head = parameter.detach().flatten()[:256].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(head.tobytes())
    return digest.hexdigest()[:16]
