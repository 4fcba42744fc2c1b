r"""The Jacobian lens: the logit lens after the model's mean linear effect, fitted without training.

Gurnee et al. (2026), "Verbalizable Representations Form a Global Workspace in Language Models",
Transformer Circuits (https://transformer-circuits.pub/2026/workspace):

1. Run a text and keep the output h of every block at every token. Valid positions V are those
   after some leading ones (attention sinks) and before the last one.
2. For each block l and output dimension, a vector-Jacobian product gives one row of

       J_l = mean over texts and t in V of  sum over t' >= t in V of  d h_final,t' / d h_l,t

   since no token depends on a later one. One backward pass gives the row for all blocks at once;
   `batch_size` rows share a pass. J of the last block is the identity.
3. The lens reads W_U norm(J_l h): what a vector makes the model say, now or later in the text, to
   first order and on average over contexts.
4. `rows` divides the rows between texts: each text gives the next `rows` of them, in turn, so that
   every row is the exact mean over as many texts, or one more. With as few rows as cover all, more
   texts cost only their forward passes more, and what is peculiar to one does not reach all rows.

A linear map needs no α, and takes a term of the stream as it takes the stream: an MLP output u of
block l is read as J_l u, so that J_l resid_mid + J_l mlp_out = J_l resid_post. `resid_pre` of block
l is the output of block l - 1. J of the embedding is not fitted: `resid_pre` of block 0 is read as
it is.

TransformerLens has a class of the same estimator (`tools.analysis.JacobianLens`), with which the
fit agrees and whose files are read. It is not driven here because it takes a raw
`TransformerBridge` alone: no `HookedTransformer`, no processed weights. It also tokenizes by
itself, without the prefix and chat template of a sweep, computes logits that a fit does not use,
and cannot divide the rows.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from superscopes_tl.errors import bad_type, bad_value, check_count
from superscopes_tl.files import reading
from superscopes_tl.model import (
    LanguageModel,
    Site,
    TokenizedText,
    check_layers,
    hook_name,
    load_model,
    tokenize,
)
from superscopes_tl.neighbours.lenses import (
    check_weights,
    logit_lens,
    numbers_of,
    read_lens,
    rows_of_blocks,
    state_time,
    write_lens,
)
from superscopes_tl.vectors import opened

FORMAT = "superscopes_tl Jacobian lens 1"

_FIX = "fit one for this model with fit_jacobian_lens, and save it"


@dataclass(frozen=True, eq=False)
class JacobianLens:
    """J of some blocks; a `Lens` for `lens_table` and `lens_kl`.

    Attributes:
        model: the name of the model.
        fingerprint: the hash of the model's weights.
        matrices: J by block. The last block, whose J is the identity, has none.
        training: settings of the fit, as plain data.
    """

    model: str
    fingerprint: str
    matrices: Mapping[int, Float[Tensor, "d_model d_model"]]
    training: Mapping[str, Any]

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.matrices))
        return f"JacobianLens(of {self.model}, layers {layers}, {dict(self.training)})"

    def __call__(
        self, model: LanguageModel, vectors: Float[Tensor, "sites d_model"], sites: Sequence[Site]
    ) -> Float[Tensor, "sites d_model"]:
        """Return J_l v of every vector.

        Raises:
            ValueError: a model of other weights, or a layer that was not fitted.
        """
        check_weights(model, self.model, self.fingerprint, "Jacobian lens", _FIX)
        result = vectors.float().cpu().clone()
        for layer, rows in rows_of_blocks(sites, model.n_layers).items():
            if 0 <= layer < model.n_layers - 1:
                if layer not in self.matrices:
                    expected = f"layers that were fitted, which are {sorted(self.matrices)}"
                    fix = "read those, or fit it with fit_jacobian_lens(layers=...)"
                    raise bad_value("Jacobian lens", expected, layer, fix)
                result[rows] = result[rows] @ self.matrices[layer].T
        return result

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the lens to a safetensors file, atomically; return the path."""
        tensors = {str(layer): matrix for layer, matrix in self.matrices.items()}
        return write_lens(path, FORMAT, self, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: LanguageModel) -> Self:
        """Read a file that `save` wrote, or a published `.pt` file.

        A `.pt` file is one of TransformerLens or of the paper's authors, with the matrices under
        `J`. It does not say of which weights it is, but that they are raw.

        Raises:
            FileNotFoundError: there is no such file.
            RunFileError: no Jacobian lens, or a corrupt one.
            ValueError: a lens of another model.
        """
        if Path(path).suffix == ".pt":
            training = {"file": Path(path).name}
            return cls(model.name, model.fingerprint, _published(Path(path), model), training)

        def shapes(names: list[str]) -> dict[str, tuple[int, ...]]:
            known = set(map(str, range(model.n_layers - 1)))
            return {name: (model.d_model, model.d_model) for name in names if name in known}

        training, tensors = read_lens(path, FORMAT, model, shapes, _FIX)
        matrices = {int(name): tensors[name] for name in sorted(tensors, key=int)}
        return cls(model.name, model.fingerprint, matrices, training)


def _published(path: Path, model: LanguageModel) -> dict[int, Tensor]:
    """Return the matrices of a file of TransformerLens or of the reference implementation."""
    if model.processing not in ("none", "as given"):
        expected = "a model of raw weights, of which such files are"
        raise bad_value("model", expected, f"processing {model.processing!r}", _FIX)
    like = torch.empty(model.d_model, model.d_model)
    fix = f"load the model that it was fitted on, or {_FIX}"
    expected = f"a Jacobian lens of {model.name}, with the matrices J"
    with reading(path, expected, fix), opened(path) as arrays:
        matches = [re.fullmatch(r"J\.(\d{1,4})", name) for name in arrays]
        layers = sorted(int(match[1]) for match in matches if match)
        if not layers or layers[-1] >= model.n_layers - 1:
            shown = f"of layers {layers}" if layers else f"but {sorted(arrays)[:9]}"
            raise ValueError(f"no matrices J of {model.n_layers - 1} layers, {shown}")
        return {layer: numbers_of(arrays, f"J.{layer}", like) for layer in layers}


def fit_jacobian_lens(
    model: LanguageModel | Any,
    texts: Sequence[str | TokenizedText],
    *,
    layers: int | Sequence[int] | None = None,
    rows: int | None = None,
    skip_first: int = 16,
    max_tokens: int = 128,
    batch_size: int = 16,
    progress: bool = True,
) -> JacobianLens:
    """Fit J of some blocks from vector-Jacobian products.

    A text of n tokens costs about as much as `rows` forward and backward passes of n tokens through
    the blocks after the lowest of `layers`. The first pass is measured, and the progress bar says
    how long all of them will take.

    Args:
        model: from `load_model`, or anything that it accepts.
        texts: ordinary texts, or already tokenized ones, such as with a chat template.
        layers: defaults to every layer; fewer save memory, later ones also time.
        rows: rows of J that a text gives, of `model.d_model`; all by default. At least d_model /
            texts, so that every row has a text.
        skip_first: leading tokens, the BOS included, that are no valid position (the paper's 16).
        max_tokens: longer texts are cut.
        batch_size: rows per backward pass.
        progress: whether to show a progress bar.

    Raises:
        ValueError, TypeError: no text with a valid position, a bad number, or a model whose logits
            its last block's output does not make.
    """
    model = load_model(model)
    width = model.d_model
    chosen = sorted(set(check_layers(layers, model.n_layers)) - {model.n_layers - 1})
    check_count("skip_first", skip_first, least=0, fix="16 is the default")
    check_count("max_tokens", max_tokens, least=2, fix="128 is the default")
    check_count("batch_size", batch_size, least=1, fix="16 is the default")
    if not chosen:
        raise bad_value("layers", "a layer before the last one", layers, "its J is the identity")
    logit_lens(model, torch.zeros(1, width))  # what could not be read need not be fitted
    sources = _sources(model, texts, skip_first, max_tokens)
    rows = width if rows is None else min(rows, width)
    least = -(-width // len(sources))
    check_count("rows", rows, least=least, fix=f"{least} is the fewest for {len(sources)} texts")
    sums = torch.zeros(len(chosen), width, width)
    counts = torch.zeros(width)
    passes = -(-rows // batch_size)
    total = passes * sum(ids.shape[1] for ids in sources)
    with tqdm(total=total, desc="Jacobian lens", unit="token", disable=not progress) as bar:
        for number, ids in enumerate(sources):
            dims = torch.arange(number * rows, (number + 1) * rows) % width
            times = [time.perf_counter()]
            for part, found in _gradients(model, ids, chosen, dims, skip_first, batch_size):
                sums[:, part] += found
                times.append(time.perf_counter())
                bar.update(ids.shape[1])
                if number == 0 and len(times) == min(passes, 2) + 1:
                    last = times[-1] - times[-2]
                    whole = times[1] - times[0] + (passes - 1) * last  # the first one runs forward
                    state_time(bar, "Jacobian lens", whole * total / passes / ids.shape[1])
            counts[dims] += 1
    means = sums / counts[:, None]
    training = {"texts": len(sources), "left_out": len(texts) - len(sources), "rows": rows}
    training |= {"skip_first": skip_first, "max_tokens": max_tokens}
    matrices = {layer: matrix.clone() for layer, matrix in zip(chosen, means, strict=True)}
    return JacobianLens(model.name, model.fingerprint, matrices, training)


def _sources(
    model: LanguageModel, texts: Sequence[str | TokenizedText], skip_first: int, max_tokens: int
) -> list[Int[Tensor, "1 pos"]]:
    """Return the tokens of the texts that have a valid position."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise bad_type("texts", "a list of texts", texts, "pass texts=[...]")
    tokens = [tokenize(model, t, argument="texts") if isinstance(t, str) else t for t in texts]
    sources = [text.tensor(model.device)[:, :max_tokens] for text in tokens]
    longest = max((ids.shape[1] for ids in sources), default=0)
    sources = [ids for ids in sources if ids.shape[1] > skip_first + 1]
    if not sources:
        expected = f"texts of more than {skip_first + 1} tokens"
        raise bad_value(
            "texts", expected, f"at most {longest}", "pass longer texts, or a smaller skip_first"
        )
    return sources


def _gradients(
    model: LanguageModel,
    ids: Int[Tensor, "1 pos"],
    layers: Sequence[int],
    dims: Int[Tensor, " rows"],
    skip_first: int,
    batch_size: int,
) -> Iterator[tuple[Int[Tensor, " part"], Float[Tensor, "layers part d_model"]]]:
    """Yield rows of J of one text, some output dimensions at a time."""
    names = [hook_name("resid_post", layer) for layer in (*layers, model.n_layers - 1)]
    batch_size = min(batch_size, len(dims))
    *hidden, last = model.linked_activations(ids.expand(batch_size, -1), names)
    valid = slice(skip_first, ids.shape[1] - 1)
    for part in torch.split(dims, batch_size):
        batch = torch.arange(len(part))
        wanted = torch.zeros_like(last)
        wanted[batch, valid, part] = 1  # of every valid t': those before t have no gradient
        found = torch.autograd.grad(last, hidden, wanted, retain_graph=True)
        yield part, torch.stack([g[: len(part), valid].float().mean(dim=1).cpu() for g in found])
