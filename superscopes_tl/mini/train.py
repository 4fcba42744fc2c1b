"""Train the bundled model: `python -m superscopes_tl.mini.train`.

1. Draw rows of text (`corpus.py`); the loss asks for descriptions, hardly ever for names.
2. Bottleneck: in half of the rows, what follows a name may see only its last token, so that the
   name's meaning gathers there.
3. Self-description: in most rows most names are replaced by the placeholder `x`. A
   separate pass without gradient reads the name's last token; its block output from a random
   layer, with noise, is written over the block output of `x` at layer 0 or at the same layer.
   The loss asks for the description. Never MLP outputs, never scaled vectors.
4. Noise in text: block outputs of some names in plain text get noise at one layer, so that one
   layer's writing is not enough.
5. Update with Muon (`optim.py`), save a checkpoint every few minutes, resume from it.
6. Write the model folder in Hugging Face format, weights in float16.
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from superscopes_tl.mini import FACTS_PATH, MODEL_DIR
from superscopes_tl.mini.corpus import Corpus, EncodedFact, Row, train_tokenizer
from superscopes_tl.mini.export import write_model
from superscopes_tl.mini.facts import held_out, load_facts
from superscopes_tl.mini.net import Llama, NetConfig, Writes, causal_mask
from superscopes_tl.mini.optim import Muon, OptimConfig

IGNORE = -100
SHORT_NAME, LONG_NAME = 4, 8  # tokens; most names have five to seven
CHECKPOINT = "checkpoint.safetensors"

Config = TypeVar("Config", "TrainConfig", NetConfig, OptimConfig)


@dataclass(frozen=True)
class TrainConfig:
    """What to train and for how long.

    Attributes:
        steps: Updates.
        seed: Seed of weights and data; step s draws from (seed, s), so that resuming needs no
            generator state.
        batch: Rows per update.
        length: Tokens per row.
        self_description: Share of rows with placeholders.
        sentences: Share of the other rows that are sentences.
        bottleneck: Share of rows whose names are visible through their last token only.
        first_layer: Earliest layer that the self-description of a name of five to seven tokens
            reads (words: layer 0), so that nothing asks its meaning to be complete before.
        earlier: So many layers earlier for names of at most four tokens.
        later: So many layers later for those of eight or more: a longer name may take longer.
        noise: Largest noise on the vectors of self-description, relative to their norm.
        text_noise: Largest noise on block outputs of the last tokens of names in plain text,
            relative to their norm; half of the names get it, each at one layer, so that the
            layers after it write the name's meaning again.
        same: Share of placeholders whose target layer is the source layer; the others' is 0.
        save_seconds: Time between checkpoints.
    """

    steps: int = 2200
    seed: int = 0
    batch: int = 28
    length: int = 128
    self_description: float = 0.8
    sentences: float = 0.15
    bottleneck: float = 0.5
    first_layer: int = 6
    earlier: int = 4
    later: int = 1
    noise: float = 2.5
    text_noise: float = 1.5
    same: float = 0.25
    save_seconds: float = 240.0


@dataclass(frozen=True)
class Batch:
    """One update's data.

    Attributes:
        ids: `[batch seq]` tokens.
        labels: `[batch seq]` next tokens, `IGNORE` where the loss asks nothing.
        allowed: `[batch seq seq]` which key each query may see.
        places: Row, position and fact of each placeholder.
        names: Row and position of the last token of each name in plain text.
    """

    ids: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    allowed: Bool[Tensor, "batch seq seq"]
    places: list[tuple[int, int, EncodedFact]]
    names: list[tuple[int, int]]


def row_labels(row: Row, rng: random.Random) -> list[int]:
    """Return the next token of each position, names mostly ignored: nothing predicts them."""
    labels = [*row.ids[1:], IGNORE]
    for span in row.spans:
        if span.fact is not None or rng.random() > 0.1:
            for at in range(span.start, min(span.last + 1, len(row.ids))):
                labels[at - 1] = IGNORE
    return labels


def draw_batch(corpus: Corpus, config: TrainConfig, rng: random.Random) -> Batch:
    """Draw the rows of one update."""
    ids, labels, allowed, places, names = [], [], [], [], []
    for number in range(config.batch):
        placeholders = rng.random() < config.self_description
        if not placeholders and rng.random() < config.sentences:
            row = corpus.sentence_row(rng)
        else:
            row = corpus.list_row(rng, placeholders)
        mask = causal_mask(config.length)
        if rng.random() < config.bottleneck:
            for span in row.spans:
                mask[span.last + 1 :, span.start : span.last] = False
        ids.append(row.ids)
        labels.append(row_labels(row, rng))
        allowed.append(mask)
        places += [(number, span.last, span.fact) for span in row.spans if span.fact]
        names += [(number, span.last) for span in row.spans if not span.fact]
    return Batch(torch.tensor(ids), torch.tensor(labels), torch.stack(allowed), places, names)


@torch.no_grad()
def read_names(
    model: Llama, corpus: Corpus, batch: Batch, config: TrainConfig, rng: random.Random
) -> Float[Tensor, "layer name d_model"]:
    """Return the block outputs at the last token of each placeholder's name, at all layers."""
    texts = [corpus.mention(rng, fact) for _, _, fact in batch.places]
    longest = max(len(text) for text in texts)
    ids = torch.tensor([text + [corpus.pad] * (longest - len(text)) for text in texts])
    states = model(ids, causal_mask(longest).unsqueeze(0), every_layer=True)
    last = torch.tensor([len(text) - 1 for text in texts])
    outputs: Tensor = states[:, torch.arange(len(texts)), last]
    return outputs


def unit_gaussian(count: int, width: int, generator: torch.Generator) -> Float[Tensor, "n width"]:
    """Draw Gaussian vectors of norm about 1."""
    direction: Tensor = torch.randn((count, width), generator=generator) / width**0.5
    return direction


def earliest_layer(fact: EncodedFact, config: TrainConfig) -> int:
    """Return the earliest layer whose block output training asks to tell the fact."""
    if fact.kind == "word":
        return 0
    tokens = len(fact.name_ids)
    if tokens <= SHORT_NAME:
        return config.first_layer - config.earlier
    return config.first_layer + (config.later if tokens >= LONG_NAME else 0)


def draw_patches(
    model: Llama, corpus: Corpus, batch: Batch, config: TrainConfig, rng: random.Random
) -> Writes | None:
    """Draw source and target layer of each placeholder and fetch its vector."""
    if not batch.places:
        return None
    states = read_names(model, corpus, batch, config, rng)
    depth = model.config.n_layers
    sources, targets = [], []
    for _, _, fact in batch.places:
        # The last block's output is neither: it speaks of the next token, and no block reads it.
        sources.append(rng.randrange(earliest_layer(fact, config), depth - 1))
        targets.append(0 if rng.random() >= config.same else sources[-1])
    vectors = states[sources, torch.arange(len(sources))]
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    strength = config.noise * torch.rand(len(sources), 1, generator=generator)
    direction = unit_gaussian(len(sources), model.config.d_model, generator)
    vectors = vectors + strength * vectors.norm(dim=-1, keepdim=True) * direction
    rows = torch.tensor([row for row, _, _ in batch.places])
    positions = torch.tensor([position for _, position, _ in batch.places])
    return Writes(rows, positions, targets, vectors)


def draw_text_noise(
    model: Llama, batch: Batch, config: TrainConfig, rng: random.Random
) -> Writes | None:
    """Draw noise for half of the names that stand in plain text, each at one random layer."""
    names = [name for name in batch.names if rng.random() < 0.5]
    if not names:
        return None
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    direction = unit_gaussian(len(names), model.config.d_model, generator)
    strength = config.text_noise * torch.rand(len(names), 1, generator=generator)
    # No later block reads the last block's output.
    layers = [rng.randrange(model.config.n_layers - 1) for _ in names]
    rows, positions = (torch.tensor(part) for part in zip(*names, strict=True))
    return Writes(rows, positions, layers, strength * direction)


def schedule(step: int, steps: int) -> float:
    """Return the factor of the step sizes: short warm-up, plateau, linear decay to 0."""
    return min(1.0, (step + 1) / 60, (steps - step) / (0.7 * steps))


def batch_loss(
    model: Llama, batch: Batch, patches: Writes | None, noise: Writes | None
) -> Float[Tensor, ""]:
    """Return the mean loss over the labelled positions."""
    states = model(batch.ids, batch.allowed, patches, noise)[-1]
    chosen = batch.labels != IGNORE
    return cross_entropy(model.logits(states[chosen]), batch.labels[chosen])


def run_name(model: Llama, optimiser: Muon, config: TrainConfig) -> str:
    """Describe a run and its facts, so that a checkpoint of another run is never resumed."""
    digest = hashlib.sha256(FACTS_PATH.read_bytes()).hexdigest()
    return json.dumps([repr(model.config), repr(optimiser.config), repr(config), digest])


def save_checkpoint(path: Path, model: Llama, optimiser: Muon, config: TrainConfig) -> None:
    """Write weights and optimiser state; the header says which run they belong to."""
    tensors = {f"weight.{name}": value.detach() for name, value in model.named_parameters()}
    tensors |= {f"optim.{name}": value for name, value in optimiser.state.items()}
    header = {"step": str(optimiser.count), "run": run_name(model, optimiser, config)}
    fresh = path.with_suffix(".new")
    save_file(tensors, fresh, metadata=header)
    fresh.replace(path)


def load_checkpoint(path: Path, model: Llama, optimiser: Muon, config: TrainConfig) -> None:
    """Continue the run that wrote the checkpoint, if there is one.

    Raises:
        ValueError: If the checkpoint belongs to a run with other settings.
    """
    if not path.exists():
        return
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        if header["run"] != run_name(model, optimiser, config):
            raise ValueError(f"{path} is of another run; remove it or choose another --out")
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(file.get_tensor(f"weight.{name}"))
        for name, value in optimiser.state.items():
            value.copy_(file.get_tensor(f"optim.{name}"))
    optimiser.count = int(header["step"])
    print(f"resumed at step {optimiser.count}", flush=True)


def fit(model: Llama, corpus: Corpus, config: TrainConfig, optimiser: Muon, path: Path) -> None:
    """Run the updates that are left."""
    start = saved = time.monotonic()
    average = 0.0
    for step in range(optimiser.count, config.steps):
        rng = random.Random(f"{config.seed}/{step}")
        batch = draw_batch(corpus, config, rng)
        patches = draw_patches(model, corpus, batch, config, rng)
        noise = draw_text_noise(model, batch, config, rng)
        loss = batch_loss(model, batch, patches, noise)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step(schedule(step, config.steps))
        average = loss.item() if average == 0.0 else 0.97 * average + 0.03 * loss.item()
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - start
            print(f"step {step + 1} loss {average:.4f} {seconds:.0f} s", flush=True)
        if time.monotonic() - saved > config.save_seconds:
            save_checkpoint(path, model, optimiser, config)
            saved = time.monotonic()


def override(config: Config, settings: Mapping[str, str]) -> Config:
    """Return the configuration with those of the settings that it has."""
    current = {field.name: getattr(config, field.name) for field in fields(config)}
    new = {key: type(current[key])(text) for key, text in settings.items() if key in current}
    return replace(config, **new)


def parse_arguments() -> tuple[Path, TrainConfig, NetConfig, OptimConfig]:
    """Return the model folder and what to train, from the command line."""
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="the model folder")
    parser.add_argument("--steps", default=str(TrainConfig.steps), help="updates")
    parser.add_argument("--seed", default=str(TrainConfig.seed), help="seed of weights and data")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings, e.g. noise=1.5"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = dict(item.split("=", 1) for item in args.set)
    settings |= {"steps": args.steps, "seed": args.seed}
    known = {field.name for kind in (TrainConfig, NetConfig, OptimConfig) for field in fields(kind)}
    if unknown := settings.keys() - known:
        parser.error(f"unknown settings: {', '.join(sorted(unknown))}")
    train, net = override(TrainConfig(), settings), override(NetConfig(), settings)
    first = (train.first_layer - train.earlier, train.first_layer, train.first_layer + train.later)
    if not all(0 <= layer < net.n_layers - 1 for layer in first):
        parser.error(
            f"first_layer, earlier, later: expected blocks from 0 to {net.n_layers - 2}, "
            f"got {', '.join(map(str, first))}"
        )
    return args.out, train, net, override(OptimConfig(), settings)


def main() -> None:
    """Train and write the model folder."""
    out, config, net, optim = parse_arguments()
    facts = load_facts()
    tokenizer = train_tokenizer(facts, net.vocab_size)
    corpus = Corpus(facts, held_out(facts), tokenizer, config.length)
    torch.manual_seed(config.seed)
    model = Llama(net)
    optimiser = Muon(dict(model.named_parameters()), optim)
    count = sum(value.numel() for value in model.parameters())
    print(f"{count / 1e6:.2f} M parameters, {len(facts)} facts, {config}, {optim}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / CHECKPOINT
    load_checkpoint(checkpoint, model, optimiser, config)
    fit(model, corpus, config, optimiser, checkpoint)
    longest = max(len(fact.description_ids) for fact in corpus.facts)
    write_model(out, model, tokenizer, max_new_tokens=longest + 2)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
