"""A model as the rest of the package sees it, whichever TransformerLens class is underneath.

`LanguageModel` holds the TransformerLens object with its hook points, the tokenizer, the decoder,
the available kinds of activation, sizes, special tokens and provenance. `load_model` makes one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Self, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from superscopes_tl.errors import UnavailableKindError, bad_type, bad_value, check_choice, describe
from superscopes_tl.model.decoder import Decoder, Hook, hooked, linked
from superscopes_tl.model.sites import EMBED, KINDS, HookKind, PatchedLayer, check_layers
from superscopes_tl.model.verification import Verified

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model with TransformerLens hooks.

    Attributes:
        name: display name.
        tl: the `HookedTransformer` or `TransformerBridge`.
        tokenizer: a fast Hugging Face tokenizer, unaltered (TransformerLens gets a copy).
        decoder: decoding with a KV cache.
        kinds: the kinds of activation that this model computes.
        n_layers: number of blocks.
        d_model: width of the residual stream.
        n_ctx: context length in tokens.
        n_vocab: number of embeddings; the tokenizer may have more tokens.
        prefix_ids: tokens that every prompt starts with: the BOS, or whatever the tokenizer adds by
            itself; may be empty.
        eos_token_ids: any of these ends a generation.
        max_new_tokens: default length of a generation in `generation_config.json`, if stated.
        processing: weight processing applied by TransformerLens; "none" for raw weights.
        fingerprint: hash of every parameter's name, shape and first values.
        revision: hub commit, if any.
        origin: loads the same model in another process; `None` for one made in memory.
        source: file, hash and quantization of dequantized weights.
        absent: why each kind missing from `kinds` is unavailable, where known.
        embeds: whether the input embedding, one vector as wide as the stream per token, has a hook.
    """

    name: str
    tl: Any
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
    embeds: bool = True

    @classmethod
    def of(cls, tl: Any, tokenizer: Any, verified: Verified, hf: Any, **stated: Any) -> Self:
        """Describe a TransformerLens object.

        Args:
            tl: the object.
            tokenizer: its tokenizer.
            verified: what its hooks show, from `verify`.
            hf: the Hugging Face model that it wraps or was converted from, if any.
            stated: the attributes that cannot be read off these.
        """
        config, generation = getattr(hf, "config", None), getattr(hf, "generation_config", None)
        n_ctx = (tl.cfg.n_ctx, getattr(config, "max_position_embeddings", None))
        return cls(
            tl=tl,
            tokenizer=tokenizer,
            decoder=verified.decoder,
            kinds=verified.kinds,
            absent=verified.absent,
            embeds=verified.embeds,
            n_layers=tl.cfg.n_layers,
            d_model=tl.cfg.d_model,
            n_ctx=min(n for n in n_ctx if n),
            n_vocab=tl.cfg.d_vocab,
            eos_token_ids=_eos_token_ids(tokenizer, generation),
            max_new_tokens=getattr(generation, "max_new_tokens", None),
            revision=getattr(config, "_commit_hash", None),
            **stated,
        )

    @property
    def bos_token_id(self) -> int | None:
        """The BOS token, if prompts start with it."""
        bos: int | None = self.tokenizer.bos_token_id
        return bos if bos in self.prefix_ids else None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(iter(self.tl.parameters())).dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Device that token ids must be on."""
        return next(iter(self.tl.parameters())).device  # type: ignore[no-any-return]

    def checked_kinds(self, kinds: str | Iterable[str]) -> tuple[HookKind, ...]:
        """Return `kinds` as a tuple, without duplicates, after checking that the model has them.

        Raises:
            TypeError: not names.
            ValueError: no kind, or an unknown one.
            UnavailableKindError: a kind that this model does not compute.
        """
        if not isinstance(kinds, Iterable):
            raise bad_type("kinds", "names of kinds", kinds, f"choose from {KINDS}")
        names = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        if not names:
            raise bad_value("kinds", "at least one kind", names, f"choose from {KINDS}")
        wanted = [cast("HookKind", check_choice("kinds", name, KINDS)) for name in names]
        for kind in wanted:
            if kind not in self.kinds:
                why = f" ({self.absent[kind]})" if kind in self.absent else ""
                expected = f"kinds of {self.name}, which are {self.kinds}"
                message = describe("kinds", expected, kind, f"leave {kind!r} out{why}")
                raise UnavailableKindError(message)
        return tuple(dict.fromkeys(wanted))

    def checked_targets(self, layers: PatchedLayer | Iterable[PatchedLayer]) -> tuple[int, ...]:
        """Return target layers as numbers from 0, `EMBED` for "embed", without duplicates.

        Raises:
            ValueError, TypeError: as `check_layers`.
            UnavailableKindError: "embed", where the model has no such hook point.
        """
        single = isinstance(layers, str) or not isinstance(layers, Iterable)
        wanted: list[Any] = [layers] if single else list(layers)  # type: ignore[arg-type]
        if "embed" not in wanted:
            return check_layers(wanted, self.n_layers, "target_layer")
        if not self.embeds:
            fix = "choose a block"
            message = describe("target_layer", f"a hook point of {self.name}", "embed", fix)
            raise UnavailableKindError(message)
        blocks = {
            layer: check_layers([layer], self.n_layers, "target_layer")[0]
            for layer in wanted
            if layer != "embed"
        }
        return tuple(dict.fromkeys(blocks.get(layer, EMBED) for layer in wanted))

    @property
    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """Lock for a forward pass: hooks sit on the model, so one thread at a time may run it."""
        lock: contextlib.AbstractContextManager[Any] = _LOCKS.setdefault(self.tl, threading.RLock())
        return lock

    def hooks(self, hooks: Sequence[tuple[str, Hook]]) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the named hook points run the given functions."""
        return hooked(self.tl, hooks)

    def activations(
        self, tokens: Int[Tensor, "batch pos"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Run `tokens` once and return the activations at the named hook points."""
        with self.lock, torch.no_grad():
            _, cache = self.tl.run_with_cache(
                tokens, names_filter=list(names), return_cache_object=False
            )
        return {name: cache[name] for name in names}

    def linked_activations(
        self, tokens: Int[Tensor, "batch pos"], names: Sequence[str]
    ) -> list[Tensor]:
        """Run `tokens` as far as the named hook points, and return activations with gradients.

        `torch.autograd.grad` of a later one reaches back to the one computed first.
        """
        with self.lock:
            return linked(self.tl, lambda: self.tl(tokens), names)

    def provenance(self) -> dict[str, Any]:
        """Return everything needed to reproduce the model, as plain data."""
        # The argument of `load_model` that gives the same prefix.
        only_bos = self.prefix_ids == (self.tokenizer.bos_token_id,)
        prepend_bos = (True if only_bos else None) if self.prefix_ids else False
        return {
            "name": self.name,
            "backend": self.decoder.name,
            "revision": self.revision,
            "source": dict(self.source) if self.source else None,
            "fingerprint": self.fingerprint,
            "weight_processing": self.processing,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self._quantization(),
            "device": str(self.device),
            "prepend_bos": prepend_bos,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "transformer_lens": version("transformer-lens"),
            "transformers": version("transformers"),
            "torch": str(torch.__version__),
        }

    def _quantization(self) -> dict[str, Any]:
        """Return how the weights were quantized when they were loaded, if they were."""
        hf: Any = getattr(self.tl, "original_model", None)
        if not getattr(hf, "is_quantized", False):
            return {}
        config = hf.config.quantization_config
        stated = config if isinstance(config, dict) else config.to_dict()
        return {"quantization": json.loads(json.dumps(stated, default=str))}

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"LanguageModel({self.name!r}: {self.n_layers} layers x {self.d_model}, "
            f"{self.decoder.name}, {dtype}, {self.device})"
        )


def _eos_token_ids(tokenizer: Any, generation: Any) -> tuple[int, ...]:
    """Return the tokens that end a generation: the model's own, else the tokenizer's."""
    declared = getattr(generation, "eos_token_id", None)
    if declared is None:
        declared = tokenizer.eos_token_id
    ids = declared if isinstance(declared, list | tuple) else [declared]
    return tuple(int(i) for i in ids if i is not None)


def weight_fingerprint(module: Any) -> str:
    """Return a hash of every parameter's name, shape and first 256 values."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        for tensor in _plain(parameter):
            head = tensor.detach().flatten()[:256].float().cpu().numpy()
            digest.update(head.tobytes())
    return digest.hexdigest()[:16]


def _plain(tensor: Any) -> Iterator[Tensor]:
    """Yield the tensors that a tensor consists of: a quantized one of torchao holds several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain(getattr(tensor, name))
