"""Read vectors with the model's own unembedding: the logit lens and translated lenses.

1. The *logit lens* (nostalgebraist, 2020, "interpreting GPT: the logit lens") treats a vector as
   the last block's output: final norm, W_U, softmax. It predicts tokens and generates no text.
2. A `Lens` translates vectors before they are unembedded: the logit lens is the identity, a
   `TunedLens` and a `JacobianLens` map them to the last block's output, each block by its own
   matrix (`rows_of_blocks`). Such a lens is kept in a safetensors file with the fingerprint of the
   model's weights, without which its matrices mean nothing (`write_lens`, `read_lens`).
3. `lens_table` reads all sites of a prompt through several lenses in one batch; `lens_kl` measures
   over texts how far a lens is from the model's final prediction.
4. The control of both is the same lens on a random direction of equal norm.

α does not change a lens's prediction: the final norm removes any positive scale.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from superscopes_tl.engine import site_vectors
from superscopes_tl.errors import bad_type, bad_value, check_count
from superscopes_tl.files import reading, write_tensors
from superscopes_tl.model import (
    HookKind,
    LanguageModel,
    Site,
    TokenizedText,
    check_layers,
    hook_name,
    load_model,
    tokenize,
)
from superscopes_tl.vectors import Arrays, RandomDirection

Place: TypeAlias = tuple[HookKind, int]
"""A kind and a layer."""

Lens: TypeAlias = Callable[
    [LanguageModel, Float[Tensor, "sites d_model"], Sequence[Site]], Float[Tensor, "sites d_model"]
]
"""Translates the vectors of some sites before they are unembedded."""

LOGIT_LENS = "logit lens"
"""The name of the logit lens in tables (nostalgebraist, 2020)."""
SEED = 0
"""Selects the random directions."""

_ROWS = 256
"""Rows unembedded together: each has a logit per vocabulary token."""


def _untranslated(
    model: LanguageModel, vectors: Float[Tensor, "sites d_model"], sites: Sequence[Site]
) -> Float[Tensor, "sites d_model"]:
    """Return the vectors as they are: the logit lens."""
    return vectors


LENSES: Mapping[str, Lens] = MappingProxyType({LOGIT_LENS: _untranslated})
"""The lenses that need no training, by name."""


def logit_lens(
    model: LanguageModel, vectors: Float[Tensor, "... d_model"]
) -> Float[Tensor, "... vocab"]:
    """Return the log-probabilities of the next token as if `vectors` were the last block's output.

    Args:
        model: from `load_model`.
        vectors: states of the residual stream, or outputs added to it.

    Returns:
        In nats, float32, on the CPU.

    Raises:
        TypeError: `vectors` is no tensor.
        ValueError: the vectors do not have the model's width.
    """
    if not isinstance(vectors, Tensor):
        raise bad_type("vectors", "a tensor", vectors, "capture(...)['mlp_out', 5]")
    if vectors.shape[-1:] != (model.d_model,):
        raise bad_value(
            "vectors", f"vectors of {model.d_model} numbers, the width of {model.name}",
            tuple(vectors.shape), "read the vectors from the same model",
        )  # fmt: skip
    rows = vectors.reshape(-1, model.d_model)
    with model.lock, torch.no_grad():
        likely = [model.decoder.unembed(part).log_softmax(dim=-1).cpu() for part in parts_of(rows)]
    return torch.cat(likely).reshape(*vectors.shape[:-1], -1)


def parts_of(rows: Float[Tensor, "rows d_model"]) -> list[Float[Tensor, "part d_model"]]:
    """Return rows in parts of `_ROWS`, at least one."""
    return [rows[start : start + _ROWS] for start in range(0, max(1, len(rows)), _ROWS)]


def sites_of(table: pd.DataFrame) -> tuple[Site, ...]:
    """Return the sites of a table with the columns `kind`, `source_layer` and `position`.

    `lens_table(model, prompt, sites_of(result.table))` reads what a sweep has read.
    """
    places = table[["kind", "source_layer", "position"]].drop_duplicates()
    return tuple(Site(kind, int(layer), int(at)) for kind, layer, at in places.to_numpy())


def lens_table(
    model: LanguageModel | Any,
    prompt: str | TokenizedText,
    sites: Iterable[Site],
    *,
    lenses: Mapping[str, Lens] = LENSES,
    top_k: int = 5,
    control: bool = True,
    chat: bool = False,
) -> pd.DataFrame:
    """Read sites of one prompt through lenses, in one forward pass and one batch per lens.

    Args:
        model: from `load_model`, or anything that it accepts.
        prompt: the source prompt.
        sites: `plan.sites`, `sites_of(result.table)`, or your own.
        lenses: by name, such as `{**LENSES, "tuned lens": tuned}`.
        top_k: tokens per site.
        control: whether each lens also reads a random direction of equal norm.
        chat: whether to put the prompt into the model's chat template, as a sweep with `chat` does.

    Returns:
        One row per lens, site and rank: `prompt`, `position`, `token`, `kind`, `source_layer` (as
        in `SweepResult.table`), `lens`, `control` (whether the vector is a random direction),
        `rank` (1 is the most likely), `top_token` (with its leading space), `top_token_id` and
        `probability`.

    Raises:
        ValueError: no site, a site that the model or the prompt does not have, a bad `top_k`, or
            a lens that cannot read a kind.
    """
    model = load_model(model)
    places = tuple(dict.fromkeys(sites))
    check_count("top_k", top_k, least=1, fix="5 is the usual choice")
    model.checked_kinds(site.kind for site in places)
    check_layers((site.layer for site in places), model.n_layers, "sites")
    tokens = tokenize(model, prompt, chat=chat) if isinstance(prompt, str) else prompt
    vectors = site_vectors(model, tokens, places)
    rows = []
    for name, random, moved in through(model, lenses, vectors, places, control):
        likely = logit_lens(model, moved)
        top = likely.topk(min(top_k, likely.shape[-1]), dim=-1)
        for site, values, ids in zip(
            places, top.values.exp().tolist(), top.indices.tolist(), strict=True
        ):
            position = site.position % len(tokens)
            place = (tokens.text, position, tokens.labels[position], site.kind)
            for rank, (probability, token_id) in enumerate(zip(values, ids, strict=True), start=1):
                top_token = token_text(model, token_id)
                found = (name, random, rank, top_token, token_id, probability)
                rows.append((*place, site.layer % model.n_layers, *found))
    columns = ["prompt", "position", "token", "kind", "source_layer", "lens", "control", "rank"]
    return pd.DataFrame(rows, columns=[*columns, "top_token", "top_token_id", "probability"])


def through(
    model: LanguageModel,
    lenses: Mapping[str, Lens],
    vectors: Float[Tensor, "sites d_model"],
    sites: Sequence[Site],
    control: bool,
) -> Iterator[tuple[str, bool, Float[Tensor, "sites d_model"]]]:
    """Yield each lens's name, whether it reads random directions, and the translated vectors."""
    if not isinstance(lenses, Mapping):
        raise bad_type("lenses", "lenses by name", lenses, 'pass {**LENSES, "tuned lens": tuned}')
    for name, lens in lenses.items():
        yield name, False, lens(model, vectors, sites)
        if control:
            random = RandomDirection(SEED)(1.0)(vectors)
            yield name, True, lens(model, random, sites)


def lens_label(lens: str, control: bool) -> str:
    """Return the display name of a lens, or of the same lens on a random direction."""
    return f"{lens}, random direction" if control else lens


def token_text(model: LanguageModel, token_id: int) -> str:
    """Return a token's text with its leading space, which some tokenizers drop on decoding."""
    text = str(model.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
    piece = model.tokenizer.convert_ids_to_tokens(token_id) or ""
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def lens_kl(
    model: LanguageModel | Any,
    texts: Sequence[str],
    *,
    lenses: Mapping[str, Lens] = LENSES,
    kinds: str | Iterable[str] = "resid_post",
    layers: int | Iterable[int] | None = None,
    control: bool = True,
) -> pd.DataFrame:
    """Measure the divergence of each lens from the model's final prediction over some texts.

    KL(final ‖ lens), the loss that a tuned lens is trained on (Belrose et al., 2023, section 2).

    Args:
        model: from `load_model`, or anything that it accepts.
        texts: held-out texts, on which no lens was trained.
        lenses: by name.
        kinds: out of `KINDS`.
        layers: defaults to every layer.
        control: whether each lens also reads random directions of equal norm.

    Returns:
        One row per lens, kind and layer: `lens`, `control`, `kind`, `source_layer`, `kl` (mean
        nats per token without the BOS), `tokens` (their number).

    Raises:
        ValueError, TypeError: bad texts, kinds or layers, or a lens that cannot read a kind.
    """
    model = load_model(model)
    chosen = model.checked_kinds(kinds)
    numbers = check_layers(layers, model.n_layers)
    last: Place = ("resid_post", model.n_layers - 1)
    places: list[Place] = [(kind, layer) for kind in chosen for layer in numbers]
    states = token_states(model, texts, [*places, last])
    rows = []
    for kind, layer in places:
        vectors = states[kind, layer].float()
        sites = [Site(kind, layer, 0)] * len(vectors)
        for name, random, moved in through(model, lenses, vectors, sites, control):
            total = sum(
                float(divergence(logit_lens(model, final), logit_lens(model, part)).sum())
                for final, part in zip(parts_of(states[last]), parts_of(moved), strict=True)
            )
            rows.append((name, random, kind, layer, total / len(vectors), len(vectors)))
    table = pd.DataFrame(rows, columns=["lens", "control", "kind", "source_layer", "kl", "tokens"])
    return table.sort_values(["lens", "control", "kind"], kind="stable", ignore_index=True)


def divergence(
    final: Float[Tensor, "*batch vocab"], lens: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """Return KL(final ‖ lens) in nats, from log-probabilities."""
    final, lens = final.clamp_min(-1e30), lens.clamp_min(-1e30)  # 0 · -inf is no number
    return (final.exp() * (final - lens)).sum(dim=-1)


def token_states(
    model: LanguageModel, texts: Sequence[str], places: Sequence[Place]
) -> dict[Place, Float[Tensor, "tokens d_model"]]:
    """Return the activations at every token of some texts but the BOS, on the CPU.

    Texts of equal length share a batch, so that no padding is needed.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise bad_type("texts", "a list of texts", texts, "pass texts=[...]")
    if not texts:
        raise bad_value("texts", "at least one text", texts, "pass texts=[...]")
    of_length: dict[int, list[TokenizedText]] = {}
    for text in texts:
        tokens = tokenize(model, text, argument="texts")
        of_length.setdefault(len(tokens), []).append(tokens)
    names = {place: hook_name(*place) for place in places}
    seen: dict[Place, list[Tensor]] = {place: [] for place in places}
    for same in of_length.values():
        for start in range(0, len(same), 64):
            batch = same[start : start + 64]
            ids = torch.tensor([tokens.ids for tokens in batch], device=model.device)
            found = model.activations(ids, list(names.values()))
            for place, name in names.items():
                states = found[name][:, batch[0].prefix :]
                seen[place].append(states.reshape(-1, model.d_model).cpu().clone())
    return {place: torch.cat(states) for place, states in seen.items()}


def state_time(bar: Any, name: str, seconds: float) -> None:
    """Say in a progress bar, after its first step, how long all of its steps take."""
    shown = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    bar.set_description(f"{name}, about {shown}")


STREAM = ("resid_pre", "resid_mid", "resid_post")
"""States of the residual stream; all other kinds are added to it."""


def rows_of_blocks(sites: Sequence[Site], n_layers: int) -> dict[int, list[int]]:
    """Return the rows of each block whose output they are, or are a part of.

    `resid_pre` of block l is the output of block l - 1; the embedding is -1. `attn_out`,
    `resid_mid` and `mlp_out` belong to their own block: a linear map of its output then maps the
    terms of resid_post = resid_mid + mlp_out so that their sum stays the same.
    """
    rows: dict[int, list[int]] = {}
    for row, site in enumerate(sites):
        rows.setdefault(site.layer % n_layers - (site.kind == "resid_pre"), []).append(row)
    return rows


def check_weights(
    model: LanguageModel, about: str, fingerprint: str, argument: str, fix: str
) -> None:
    """Raise a `ValueError` unless a lens of the model `about` belongs to these weights."""
    if fingerprint != model.fingerprint:
        expected = f"a lens of {model.name} (weights {model.fingerprint})"
        raise bad_value(argument, expected, f"one of {about} (weights {fingerprint})", fix)


def write_lens(
    path: str | os.PathLike[str], format_: str, lens: Any, tensors: Mapping[str, Tensor]
) -> Path:
    """Write a lens with `model`, `fingerprint` and `training`, atomically; return the path."""
    target = Path(path)
    header = {"format": format_, "model": lens.model, "fingerprint": lens.fingerprint}
    header["training"] = json.dumps(dict(lens.training))
    write_tensors(target, tensors, header)
    return target


def read_lens(
    path: str | os.PathLike[str],
    format_: str,
    model: LanguageModel,
    shapes: Callable[[list[str]], Mapping[str, tuple[int, ...]]],
    fix: str,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_lens` wrote, for the model that it belongs to.

    Args:
        path: the file.
        format_: the format that it must have.
        model: no tensor is read if the file belongs to another one.
        shapes: from the names in the file to the tensors that must be there, with their shapes.
        fix: how to get such a file.

    Returns:
        The settings of the training, and the tensors: finite, in float32.

    Raises:
        FileNotFoundError: there is no such file.
        RunFileError: no such lens, or a corrupt one.
        ValueError: a lens of another model.
    """
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    with (
        reading(path, f"a {format_} in a safetensors file", fix),
        safe_open(path, framework="pt") as file,
    ):
        header, names = file.metadata() or {}, sorted(file.keys())
        if header.get("format") != format_:
            raise ValueError(f"format {header.get('format')!r}, tensors {names}")
        about, fingerprint = header["model"], header["fingerprint"]
        training = json.loads(header["training"])
        if not isinstance(training, dict):
            raise TypeError(f"training {training!r}")
        if fingerprint == model.fingerprint:
            wanted = shapes(names)
            if sorted(wanted) != names:
                raise ValueError(f"tensors {names}")
            tensors = {name: _numbers(file, name, shape) for name, shape in wanted.items()}
    check_weights(model, about, fingerprint, "path", fix)
    return training, tensors


def _numbers(file: Any, name: str, expected: tuple[int, ...]) -> Tensor:
    """Return a finite float32 tensor of an open file, of the expected shape."""
    shape = tuple(file.get_slice(name).get_shape())
    if shape != expected:
        raise ValueError(f"{name} of shape {shape}, where the model has {expected}")
    numbers: Tensor = file.get_tensor(name)
    if numbers.dtype != torch.float32 or not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} that are not finite float32 numbers")
    return numbers


def numbers_of(arrays: Arrays, name: str, like: Tensor) -> Tensor:
    """Return a finite array of an open file of another package, in float32, shaped as `like`."""
    if name not in arrays or arrays[name].shape != tuple(like.shape):
        shown = arrays[name].shape if name in arrays else "not there"
        raise ValueError(f"{name} {shown}, where the model has {tuple(like.shape)}")
    numbers = arrays[name].take(None).float()
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} that is not finite")
    return numbers
