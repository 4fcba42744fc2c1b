"""The tuned lens: the logit lens after a learned affine translator per layer.

Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens":

1. Run texts through the model and keep the output h of every block, at every token but the BOS.
2. Give block l a translator T(h) = h + A·h + b with A = 0 and b = 0, which is the logit lens.
3. Minimise the mean KL(final ‖ unembed(T(h))) over tokens, separately for each block, with Adam and
   a learning rate that decays to 0. The last block's translator stays the identity.
   The loss over a vocabulary of tens of thousands takes most of the time. So a step takes it over
   a sample: the most likely tokens of the final prediction at each of its tokens, those of every
   layer's lens at one of them, and random others, which stand for all that were not drawn (their
   logits are raised by the logarithm of the share). `vocabulary=None` is the exact loss.
4. Save matrices and biases as safetensors. The header holds the model's fingerprint, because the
   translators are meaningless for other weights.

A translator is trained on `resid_post`; the other kinds follow from the block's sum, resid_post =
resid_mid + mlp_out. Terms *added* to the stream (`mlp_out`, `attn_out`) pass the linear part only,
u + A·u; `resid_mid` of block l passes block l's translator, so that T(resid_mid) + (u + A·u) =
T(resid_post). `resid_pre` of block l is the output of block l − 1; in block 0 it is the embedding,
which has no translator. `lens_kl` measures how well the untrained kinds do.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.files import MAX_JSON_BYTES, read_json, reading
from superscopes_tl.model import LanguageModel, Site, check_layers, load_model
from superscopes_tl.neighbours.lenses import (
    STREAM,
    Place,
    check_weights,
    divergence,
    numbers_of,
    read_lens,
    rows_of_blocks,
    state_time,
    token_states,
    write_lens,
)
from superscopes_tl.vectors import opened

FORMAT = "superscopes_tl tuned lens 1"

_TOP = (8, 16)
"""Most likely tokens in the sampled loss: finally, at each token, and by each layer's lens."""

_PARAMETERS = "params.pt"

_FIX = "train one for this model with train_tuned_lens, and save it"


@dataclass(frozen=True, eq=False)
class TunedLens:
    """A translator for the output of every block; a `Lens` for `lens_table` and `lens_kl`.

    Attributes:
        model: the name of the model.
        fingerprint: the hash of the model's weights.
        matrices: A of each block.
        biases: b of each block.
        training: settings of the training, as plain data.
    """

    model: str
    fingerprint: str
    matrices: Float[Tensor, "n_layers d_model d_model"]
    biases: Float[Tensor, "n_layers d_model"]
    training: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"TunedLens(of {self.model}, {len(self.biases)} layers, {dict(self.training)})"

    @classmethod
    def untrained(cls, model: LanguageModel) -> Self:
        """Return the lens before training: the logit lens."""
        shape = (model.n_layers, model.d_model)
        matrices = torch.zeros(*shape, model.d_model)
        return cls(model.name, model.fingerprint, matrices, torch.zeros(shape), {"steps": 0})

    def __call__(
        self, model: LanguageModel, vectors: Float[Tensor, "sites d_model"], sites: Sequence[Site]
    ) -> Float[Tensor, "sites d_model"]:
        """Return the vectors, each translated by its site's block and kind.

        Raises:
            ValueError: a model of other weights.
        """
        check_weights(model, self.model, self.fingerprint, "tuned lens", _FIX)
        moved = vectors.float().cpu()
        in_stream = torch.tensor([site.kind in STREAM for site in sites])
        result = moved.clone()
        for layer, rows in rows_of_blocks(sites, model.n_layers).items():
            if layer >= 0:  # the embedding has no translator
                result[rows] += moved[rows] @ self.matrices[layer].T
                result[rows] += in_stream[rows, None] * self.biases[layer]
        return result

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the lens to a safetensors file, atomically; return the path."""
        tensors = {"matrices": self.matrices, "biases": self.biases}
        return write_lens(path, FORMAT, self, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: LanguageModel) -> Self:
        """Read a file that `save` wrote, or a folder of the tuned-lens package.

        Such a folder (https://github.com/AlignmentResearch/tuned-lens) holds `config.json` and
        `params.pt`, and says only of which shape its model is, not of which weights.

        Raises:
            FileNotFoundError: there is no such file.
            RunFileError: no tuned lens, or a corrupt one.
            ValueError: a lens of another model.
        """
        lens = cls.untrained(model)
        folder = Path(path)
        if (folder / _PARAMETERS).is_file():
            _fill(lens, folder, model)
            return replace(lens, training={"folder": folder.name})
        shapes = {name: tuple(getattr(lens, name).shape) for name in ("matrices", "biases")}
        training, tensors = read_lens(path, FORMAT, model, lambda names: shapes, _FIX)
        matrices, biases = tensors["matrices"], tensors["biases"]
        return replace(lens, training=training, matrices=matrices, biases=biases)


def _fill(lens: TunedLens, folder: Path, model: LanguageModel) -> None:
    """Copy the translators of a folder of the tuned-lens package into an untrained lens.

    Translator i is for `hidden_states[i]`, the output of block i - 1. That of the embedding, 0, is
    dropped: here it is the blocks that have translators, and the embedding is read as it is.
    """
    config, parameters = folder / "config.json", folder / _PARAMETERS
    with reading(config, "the settings of a tuned lens, as JSON", _FIX, most=MAX_JSON_BYTES):
        found = read_json(config.read_bytes())
    about = found.get("base_model_name_or_path")
    sizes = (found.get("num_hidden_layers"), found.get("d_model"))
    if sizes != (model.n_layers, model.d_model):
        expected = f"a lens of {model.name}, {model.n_layers} layers x {model.d_model}"
        got = f"{folder.name}, one of {about}, {sizes[0]} layers x {sizes[1]}"
        raise bad_value("path", expected, got, "load the model that it was trained on")
    with reading(parameters, "the translators of a tuned lens", _FIX), opened(parameters) as arrays:
        for layer in range(model.n_layers - 1):
            lens.matrices[layer] = numbers_of(arrays, f"{layer + 1}.weight", lens.matrices[layer])
            if found.get("bias", True):
                lens.biases[layer] = numbers_of(arrays, f"{layer + 1}.bias", lens.biases[layer])


def train_tuned_lens(
    model: LanguageModel | Any,
    texts: Sequence[str],
    *,
    layers: int | Sequence[int] | None = None,
    vocabulary: int | None = 1024,
    steps: int = 500,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    """Train translators from the output of every block to that of the last one.

    All blocks are trained on the same tokens, each translator on its own loss. The first step is
    measured, and the progress bar says how long all of them will take. Measure the result by
    `lens_kl` on held-out texts.

    Args:
        model: from `load_model`, or anything that it accepts.
        texts: at least thousands of tokens, similar to the texts on which the lens will be used.
        layers: the blocks to train, by default all; the others keep the logit lens.
        vocabulary: tokens of the vocabulary in the loss of a step, sampled as the module says;
            `None` for all of them, the exact loss, which takes many times as long.
        steps: steps of Adam.
        batch_size: tokens per step.
        learning_rate: of the first step; it decays linearly to 0. Biases are learned in units of
            their block's mean activation, so the same rate suits small and large streams.
        seed: samples the tokens of each step.
        progress: whether to show a progress bar.

    Raises:
        ValueError, TypeError: bad texts or layers, or a bad number.
    """
    model = load_model(model)
    check_count("steps", steps, least=1, fix="500 is the default")
    check_count("batch_size", batch_size, least=1, fix="128 is the default")
    if vocabulary is not None:
        check_count("vocabulary", vocabulary, least=64, fix="1024 is the default")
    chosen = sorted(set(check_layers(layers, model.n_layers)) - {model.n_layers - 1})
    if not chosen:
        raise bad_value("layers", "a layer before the last one", layers, "its lens is exact")
    places: list[Place] = [("resid_post", layer) for layer in (*chosen, model.n_layers - 1)]
    states = torch.stack(list(token_states(model, texts, places).values()), dim=1)
    hidden, last = states[:, :-1], states[:, -1]
    size = hidden.float().pow(2).mean(dim=(0, 2)).sqrt()[:, None].to(model.device)
    matrices = torch.zeros(len(size), model.d_model, model.d_model, device=model.device)
    biases = torch.zeros(len(size), model.d_model, device=model.device)
    learned = [matrices.requires_grad_(), biases.requires_grad_()]
    adam = torch.optim.Adam(learned, lr=learning_rate)
    slower = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc="tuned lens", unit="step", disable=not progress)
    for step in bar:
        start = time.perf_counter()
        rows = torch.randint(len(last), (batch_size,), generator=generator)
        h = hidden[rows].float().to(model.device)
        with torch.enable_grad(), model.lock:
            moved = h + torch.einsum("nld,led->nle", h, matrices) + size * biases
            losses = _losses(model, last[rows], moved, vocabulary, generator)
            # Not backward(): the model's weights must not get gradients.
            gradients = torch.autograd.grad(losses.sum(), learned)
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        slower.step()
        if step == 0:
            state_time(bar, "tuned lens", (time.perf_counter() - start) * steps)
        bar.set_postfix_str(f"{losses.mean():.3f} nats", refresh=False)
    training: dict[str, Any] = {"texts": len(texts), "tokens": len(last), "steps": steps}
    training |= {"batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    training |= {"layers": chosen, "vocabulary": vocabulary}
    lens = TunedLens.untrained(model)
    lens.matrices[chosen] = matrices.detach().cpu()
    lens.biases[chosen] = (size * biases).detach().cpu()
    return replace(lens, training=training)


def _losses(
    model: LanguageModel,
    last: Float[Tensor, "rows d_model"],
    moved: Float[Tensor, "rows layers d_model"],
    vocabulary: int | None,
    generator: torch.Generator,
) -> Float[Tensor, " layers"]:
    """Return KL(final ‖ lens) of each layer, over the vocabulary or a sample of it."""
    unembed = model.decoder.unembed
    with torch.no_grad():
        final = unembed(last)
        tokens, shift = None, torch.zeros(1, device=final.device)
        if vocabulary is not None and vocabulary < final.shape[-1]:
            # What a layer's lens wrongly prefers is much the same at every token: one row tells.
            ends = moved[int(torch.randint(len(moved), (1,), generator=generator))]
            likely = [final.topk(_TOP[0]).indices, unembed(ends).topk(_TOP[1]).indices]
            top = torch.unique(torch.cat([found.flatten() for found in likely]))
            tokens, shift = _sampled(top, final.shape[-1], vocabulary, generator)
            final = final[:, tokens]
        final = (final + shift).log_softmax(dim=-1)
    lens = (unembed(moved, tokens) + shift).log_softmax(dim=-1)
    return divergence(final[:, None], lens).mean(dim=0)


def _sampled(
    top: Int[Tensor, " top"], n_vocab: int, size: int, generator: torch.Generator
) -> tuple[Int[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Return `top` and as many random other tokens as make `size`, with log-weights.

    A random token stands for all that were not drawn. At least a quarter of the tokens is random.
    """
    others = torch.ones(n_vocab, dtype=torch.bool)
    others[top.cpu()] = False
    order = torch.randperm(n_vocab, generator=generator)
    drawn = order[others[order]][: max(size - len(top), size // 4)].to(top.device)
    # Of a small vocabulary all may be `top`: then none is left.
    weight = max(1, n_vocab - len(top)) / max(1, len(drawn))
    shift = torch.cat([torch.zeros(len(top)), torch.full((len(drawn),), math.log(weight))])
    return torch.cat([top, drawn]), shift.to(top.device)
