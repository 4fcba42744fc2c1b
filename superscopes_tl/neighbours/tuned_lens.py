"""The tuned lens: the logit lens after a learned affine translator per layer.

Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens":

1. Run texts through the model and keep the output h of every block, at every token but the BOS.
2. Give block l a translator T(h) = h + A·h + b with A = 0 and b = 0, which is the logit lens.
3. Minimise the mean KL(final ‖ unembed(T(h))) over tokens, separately for each block, with Adam and
   a learning rate that decays to 0. The last block's translator stays the identity.
4. Save matrices and biases as safetensors. The header holds the model's fingerprint, because the
   translators are meaningless for other weights.

A translator is trained on `resid_post`; the other kinds follow from the block's sum, resid_post =
resid_mid + mlp_out. Terms *added* to the stream (`mlp_out`, `attn_out`) pass the linear part only,
u + A·u; `resid_mid` of block l passes block l's translator, so that T(resid_mid) + (u + A·u) =
T(resid_post). `resid_pre` of block l is the output of block l − 1; in block 0 it is the embedding,
which has no translator. `lens_kl` measures how well the untrained kinds do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from superscopes_tl.errors import bad_value, check_count
from superscopes_tl.files import reading, write_tensors
from superscopes_tl.model import LanguageModel, Site, load_model
from superscopes_tl.neighbours.lenses import Place, divergence, token_states

FORMAT = "superscopes_tl tuned lens 1"

_STREAM = ("resid_pre", "resid_mid", "resid_post")
"""States of the residual stream; all other kinds are added to it."""


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
        self._check_model(model, "tuned lens")
        moved = vectors.float().cpu()
        rows_of: dict[int, list[int]] = {}
        for row, site in enumerate(sites):
            layer = site.layer % model.n_layers - (site.kind == "resid_pre")
            if layer >= 0:  # the embedding has no translator
                rows_of.setdefault(layer, []).append(row)
        in_stream = torch.tensor([site.kind in _STREAM for site in sites])
        result = moved.clone()
        for layer, rows in rows_of.items():
            result[rows] += moved[rows] @ self.matrices[layer].T
            result[rows] += in_stream[rows, None] * self.biases[layer]
        return result

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the lens to a safetensors file, atomically; return the path."""
        target = Path(path)
        header = {"model": self.model, "fingerprint": self.fingerprint}
        header |= {"format": FORMAT, "training": json.dumps(dict(self.training))}
        write_tensors(target, {"matrices": self.matrices, "biases": self.biases}, header)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: LanguageModel) -> Self:
        """Read a file that `save` wrote, for the model that it was trained on.

        Raises:
            FileNotFoundError: there is no such file.
            RunFileError: no tuned lens, or a corrupt one.
            ValueError: a lens of another model.
        """
        from safetensors import safe_open

        lens = cls.untrained(model)
        expected = "a safetensors file that TunedLens.save wrote"
        with (
            reading(path, expected, "train one with train_tuned_lens and save it"),
            safe_open(path, framework="pt") as file,
        ):
            header, names = file.metadata() or {}, sorted(file.keys())
            if header.get("format") != FORMAT or names != ["biases", "matrices"]:
                raise ValueError(f"format {header.get('format')!r}, tensors {names}")
            about, training = header["model"], json.loads(header["training"])
            if not isinstance(training, dict):
                raise TypeError(f"training {training!r}")
            lens = replace(lens, model=about, fingerprint=header["fingerprint"], training=training)
            if lens.fingerprint == model.fingerprint:  # otherwise no tensor is read
                matrices = _numbers(file, "matrices", lens.matrices)
                biases = _numbers(file, "biases", lens.biases)
                lens = replace(lens, matrices=matrices, biases=biases)
        lens._check_model(model, "path")
        return lens

    def _check_model(self, model: LanguageModel, argument: str) -> None:
        if self.fingerprint != model.fingerprint:
            raise bad_value(
                argument,
                f"a lens of {model.name} (weights {model.fingerprint})",
                f"one of {self.model} (weights {self.fingerprint})",
                "train one for this model with train_tuned_lens",
            )


def _numbers(file: Any, name: str, like: Tensor) -> Tensor:
    """Return a finite float32 array of an open file, of the shape of `like`."""
    shape = tuple(file.get_slice(name).get_shape())
    if shape != like.shape:
        raise ValueError(f"{name} of shape {shape}, where the model has {tuple(like.shape)}")
    numbers: Tensor = file.get_tensor(name)
    if numbers.dtype != torch.float32 or not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} that are not finite float32 numbers")
    return numbers


def train_tuned_lens(
    model: LanguageModel | Any,
    texts: Sequence[str],
    *,
    steps: int = 500,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    """Train translators from the output of every block to that of the last one.

    All blocks are trained on the same tokens, each translator on its own loss. Measure the result
    by `lens_kl` on held-out texts.

    Args:
        model: from `load_model`, or anything that it accepts.
        texts: at least thousands of tokens, similar to the texts on which the lens will be used.
        steps: steps of Adam.
        batch_size: tokens per step.
        learning_rate: of the first step; it decays linearly to 0. Biases are learned in units of
            their block's mean activation, so the same rate suits small and large streams.
        seed: samples the tokens of each step.
        progress: whether to show a progress bar.

    Raises:
        ValueError, TypeError: bad texts, or a bad number.
    """
    model = load_model(model)
    check_count("steps", steps, least=1, fix="500 is the default")
    check_count("batch_size", batch_size, least=1, fix="128 is the default")
    places: list[Place] = [("resid_post", layer) for layer in range(model.n_layers)]
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
    for _ in bar:
        rows = torch.randint(len(last), (batch_size,), generator=generator)
        h = hidden[rows].float().to(model.device)
        with torch.enable_grad():
            moved = h + torch.einsum("nld,led->nle", h, matrices) + size * biases
            with model.lock:
                final = model.decoder.unembed(last[rows]).log_softmax(dim=-1).detach()
                lens = model.decoder.unembed(moved).log_softmax(dim=-1)
            losses = divergence(final[:, None], lens).mean(dim=0)
            # Not backward(): the model's weights must not get gradients.
            gradients = torch.autograd.grad(losses.sum(), learned)
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        slower.step()
        bar.set_postfix_str(f"{losses.mean():.3f} nats", refresh=False)
    training: dict[str, Any] = {"texts": len(texts), "tokens": len(last), "steps": steps}
    training |= {"batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    untrained = TunedLens.untrained(model)
    return replace(
        untrained,
        matrices=torch.cat([matrices.detach().cpu(), untrained.matrices[-1:]]),
        biases=torch.cat([(size * biases).detach().cpu(), untrained.biases[-1:]]),
        training=training,
    )
