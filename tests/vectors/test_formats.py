"""The formats in which vectors are handed on, folders included, and their refusals."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import save_file

from superscopes_tl import LanguageModel, load_vectors
from superscopes_tl.vectors import formats, vector_names
from tests.support.refusals import refused

DECODER = torch.arange(24, dtype=torch.float32).reshape(6, 4) / 8 - 1
SAE = {
    "W_dec": DECODER,
    "W_enc": DECODER.T.contiguous(),
    "b_enc": DECODER[:, 0].clone(),
    "b_dec": DECODER[0].clone(),
}


def saelens(folder: Path) -> Path:
    """Write a release as SAELens does."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text('{"d_in": 4, "d_sae": 6}')
    save_file(SAE, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.zeros(6)}, folder / "sparsity.safetensors")
    return folder


def sparsify(folder: Path) -> Path:
    """Write a layer as sparsify does."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text('{"d_in": 4}')
    parts = {"W_dec": DECODER, "encoder.weight": DECODER.clone(), "b_dec": DECODER[0].clone()}
    save_file(parts, folder / "sae.safetensors")
    return folder


def gemma_scope(folder: Path) -> Path:
    """Write the file that Gemma Scope has per layer, width and sparsity."""
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{k: v.numpy() for k, v in SAE.items()}, threshold=np.ones(6))
    return folder


RELEASES = [saelens, sparsify, gemma_scope]


@pytest.mark.parametrize("written", RELEASES)
def test_the_folder_of_an_sae_gives_its_decoder(
    written: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Rows of W_dec by default, another matrix by name, from the folder or the one above it."""
    folder = written(tmp_path / "release" / "layers.5")
    for path in (folder, folder.parent, str(folder)):
        assert torch.equal(load_vectors(path), DECODER)
        assert torch.equal(load_vectors(path, rows=[4, -6]), DECODER[[4, 0]])
        assert torch.equal(load_vectors(path, "b_dec"), DECODER[:1])
        assert vector_names(path, rows=[4, -6]) == ("W_dec 4", "W_dec 0")


def test_the_decoder_may_be_written_otherwise(tmp_path: Path) -> None:
    """Gemma Scope 2 writes w_dec; a checkpoint keeps it among others."""
    save_file({name.lower(): v for name, v in SAE.items()}, tmp_path / "params.safetensors")
    assert torch.equal(load_vectors(tmp_path, rows=[2]), DECODER[[2]])
    torch.save({"step": 3, "sae": SAE}, tmp_path / "params.pt")
    assert torch.equal(load_vectors(tmp_path / "params.pt"), DECODER)
    assert vector_names(tmp_path / "params.pt", rows=[1]) == ("sae.W_dec 1",)


@pytest.mark.parametrize("written", RELEASES)
def test_several_layers_are_listed_in_their_order(
    written: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Of a release with several layers one has to be chosen; the message shows them and how."""
    for layer in (10, 5, 9):
        written(tmp_path / f"layers.{layer}" / "width_16k")
    message = refused(lambda: load_vectors(tmp_path), ValueError, "path")
    assert message.index("layers.5") < message.index("layers.9") < message.index("layers.10")
    assert torch.equal(load_vectors(tmp_path / "layers.9"), DECODER)


def test_other_folders_hold_one_file_of_vectors_or_are_refused(tmp_path: Path) -> None:
    """An empty folder, one of other files, one with a single file of vectors, one with two."""
    refused(lambda: load_vectors(tmp_path), ValueError, "path")
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt" in refused(lambda: load_vectors(tmp_path), ValueError, "path")
    np.save(tmp_path / "v.npy", DECODER.numpy())
    assert torch.equal(load_vectors(tmp_path), DECODER)
    np.save(tmp_path / "w.npy", DECODER.numpy())
    assert "v.npy, w.npy" in refused(lambda: load_vectors(tmp_path), ValueError, "path")


def test_rows_of_a_stored_npz_are_read_without_the_rest(tmp_path: Path) -> None:
    """Three rows of 64 MB take no megabyte."""
    large = np.zeros((16_000, 1_000), np.float32)
    large[[7, 15_999]] = [[1.5], [-2.5]]
    np.savez(tmp_path / "params.npz", W_enc=np.zeros((4, 4), np.float32), W_dec=large)
    tracemalloc.start()
    found = load_vectors(tmp_path / "params.npz", rows=[7, -1, 0])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.tolist() == [[1.5] * 1_000, [-2.5] * 1_000, [0.0] * 1_000]
    assert most < 2**20


def test_a_large_npz_is_read_by_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit counts the rows asked for; of a compressed array it counts all, and says so."""
    monkeypatch.setattr("superscopes_tl.vectors.stored.MAX_BYTES", 4 * 4 * 3)
    path = gemma_scope(tmp_path / "scope") / "params.npz"
    assert torch.equal(load_vectors(path, rows=[3, 1]), DECODER[[3, 1]])
    assert "rows=" in refused(lambda: load_vectors(path), ValueError, "path")
    np.savez_compressed(path, W_dec=DECODER.numpy())
    message = refused(lambda: load_vectors(path, rows=[3]), ValueError, "path")
    assert "uncompressed" in message
    assert "rows=" not in message


@given(st.data())
def test_stored_arrays_of_any_type_and_order_survive_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Both orders of a matrix, every type of real number, an array behind another one."""
    dtype = data.draw(st.sampled_from(["<f4", ">f8", "<f2", "<i8", "|u1"]))
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 4)))
    integer = np.dtype(dtype).kind in "iu"
    elements = st.integers(0, 100) if integer else st.integers(-800, 800).map(lambda n: n / 8)
    matrix = np.asarray(
        data.draw(arrays(dtype, shape, elements=elements)), order=data.draw(st.sampled_from("CF"))
    )
    path = tmp_path_factory.mktemp("npz") / "v.npz"
    np.savez(path, before=np.zeros((3, 1)), v=matrix)
    rows = data.draw(st.lists(st.integers(-shape[0], shape[0] - 1), min_size=1, max_size=4))
    expected = torch.from_numpy(matrix.astype(np.float32))
    assert torch.equal(load_vectors(path, "v", rows=rows), expected[rows])
    assert torch.equal(load_vectors(path, "v"), expected)


@pytest.mark.parametrize("old", [False, True])
def test_tensors_of_torch_save_are_read(old: bool, tmp_path: Path) -> None:
    """One vector, a row per layer in bfloat16, a parameter, in both formats of torch."""

    def saved(thing: Any) -> Path:
        torch.save(thing, tmp_path / "v.pt", _use_new_zipfile_serialization=not old)
        return tmp_path / "v.pt"

    assert torch.equal(load_vectors(saved(DECODER[2])), DECODER[2:3])
    assert torch.equal(load_vectors(saved(DECODER.bfloat16()), rows=[5, 2]), DECODER[[5, 2]])
    assert torch.equal(load_vectors(saved(torch.nn.Parameter(DECODER))), DECODER)
    assert torch.equal(load_vectors(saved(DECODER.T)), DECODER.T)
    loaded = load_vectors(tmp_path / "v.pt")
    loaded.zero_()
    assert torch.equal(load_vectors(tmp_path / "v.pt"), DECODER.T)


def test_one_vector_per_layer_becomes_a_row_per_layer(tmp_path: Path) -> None:
    """The rows of a dictionary from layer to vector are in the order of layers, and named."""
    path = tmp_path / "v.pt"
    for keys in ((12, 3, 7), ("layer_12", "layer_3", "layer_7")):
        torch.save(
            {
                "vectors": {k: DECODER[[i]] if i else DECODER[i] for i, k in enumerate(keys)},
                "note": "x",
            },
            path,
        )
        assert torch.equal(load_vectors(path), DECODER[[1, 2, 0]])
        assert vector_names(path) == tuple(f"vectors.{keys[i]}" for i in (1, 2, 0))
        assert vector_names(path, rows=[-1]) == (f"vectors.{keys[0]}",)
        assert torch.equal(load_vectors(path, f"vectors.{keys[2]}"), DECODER[2:3])
    torch.save([DECODER[1], DECODER[4]], path)
    assert torch.equal(load_vectors(path), DECODER[[1, 4]])


def test_a_dump_of_activations_has_a_row_per_token(llama: LanguageModel, tmp_path: Path) -> None:
    """`torch.save(dict(cache))` of one prompt is read by hook point; of several prompts not."""
    path, name = tmp_path / "cache.pt", "blocks.5.hook_resid_post"
    ids = torch.tensor([[0, 9, 8, 7]])
    names = [name, "blocks.2.hook_resid_post", "blocks.2.hook_mlp_out"]
    cache = llama.activations(ids, names)
    torch.save(dict(cache), path)
    assert torch.equal(load_vectors(path, name, rows=[3]), cache[name][0, 3:].float())
    assert vector_names(path, name)[3] == f"{name} 3"
    assert "blocks.2.hook_mlp_out" in refused(lambda: load_vectors(path), ValueError, "name")
    torch.save({key: value.expand(2, -1, -1) for key, value in cache.items()}, path)
    assert "[2, 4, " in refused(lambda: load_vectors(path, name), ValueError, "name")
    torch.save(cache[name].expand(2, -1, -1), path)
    assert "[2, 4, " in refused(lambda: load_vectors(path), ValueError, "name")


class OpenedError(Exception):
    """Raised if a file's code was run."""


class Trap:
    """An object whose reading runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("__import__('tests.vectors.test_formats').vectors.test_formats.spring()",))


def spring() -> None:
    """Show that code was run."""
    raise OpenedError


@pytest.mark.parametrize("what", [Trap(), {"v": DECODER, "more": Trap()}, {"v": np.ones(3)}])
@pytest.mark.parametrize("old", [False, True])
def test_objects_are_refused_without_running_them(what: Any, old: bool, tmp_path: Path) -> None:
    """Objects are never made; the message says what the file is and how to convert it."""
    torch.save(what, tmp_path / "v.pt", _use_new_zipfile_serialization=not old)
    message = refused(lambda: load_vectors(tmp_path / "v.pt"), ValueError, "path")
    assert "weights_only" in message
    assert "torch.load" in message
    assert "eval" in message or "numpy" in message


def test_files_without_tensors_say_what_they_hold(tmp_path: Path) -> None:
    """Numbers and texts alone, and tensors of no use: complex, boolean, sparse."""
    path = tmp_path / "v.pt"
    torch.save({"alpha": 3.0, "layer": 5}, path)
    assert "alpha, layer" in refused(lambda: load_vectors(path), ValueError, "path")
    for tensor in (
        DECODER.bool(),
        DECODER.to(torch.complex64),
        DECODER.to_sparse(),
        DECODER.to("meta"),
    ):
        torch.save(tensor, path)
        refused(lambda: load_vectors(path), ValueError, "path")


def test_a_tensor_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    """A stride of 0 makes any size of a few bytes: the size is checked before it is written out."""
    torch.save(torch.zeros(1).expand(2**40, 4), tmp_path / "v.pt")
    refused(lambda: load_vectors(tmp_path / "v.pt"), ValueError, "path")
    assert load_vectors(tmp_path / "v.pt", rows=[2**39]).shape == (1, 4)


def test_a_torch_file_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    """Entries of a zip are no larger than the file."""
    torch.save(DECODER, tmp_path / "v.pt")
    with (
        zipfile.ZipFile(tmp_path / "v.pt") as old,
        zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, b"\0" * 10**6 if name.endswith("/0") else old.read(name))
    assert "more than" in refused(lambda: load_vectors(tmp_path / "w.pt"), ValueError, "path")


def test_small_files_that_would_take_gigabytes_or_hours_do_not(tmp_path: Path) -> None:
    """A packed header, a list held a million times, a name of numbers, keys of one object alone."""
    with (
        zipfile.ZipFile(tmp_path / "v.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("v.npy", "w") as entry,
    ):
        entry.write(b"\x93NUMPY\x02\x00" + (2**24).to_bytes(4, "little"))
        entry.write(b" " * 2**24)
    rows = [torch.ones(2)] * 3
    torch.save([[[[rows] * 1000] * 1000] * 1000] * 1000, tmp_path / "v.pt")
    (tmp_path / "v.json").write_text(json.dumps({"1a" * 10_000: [1, 2]}))
    several = [{str(n): [0] for n in range(8_000)}, *[{}] * 8_000]
    (tmp_path / "w.json").write_text(json.dumps(several))
    tracemalloc.start()
    refused(lambda: load_vectors(tmp_path / "v.npz"), ValueError, "path")
    refused(lambda: load_vectors(tmp_path / "w.json"), ValueError, "path")
    assert load_vectors(tmp_path / "v.pt").tolist() == [[1.0, 1.0]] * 3
    assert load_vectors(tmp_path / "v.json").tolist() == [[1.0, 2.0]]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**23


def test_a_vector_of_another_length_is_not_passed_over(tmp_path: Path) -> None:
    """Two of three vectors are no stack of all: the names are listed."""
    path = tmp_path / "v.safetensors"
    save_file({"d.1": torch.ones(4), "d.2": torch.ones(4), "d.3": torch.ones(5)}, path)
    assert "'d.3' [5]" in refused(lambda: load_vectors(path), ValueError, "name")
    assert load_vectors(path, "d.*").shape == (2, 4)


def control_vector(
    path: Path, layers: tuple[int, ...] = (10, 1, 2), dtype: Any = np.float32
) -> Path:
    """Write a control vector as repeng does."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(layers))
    for number, layer in enumerate(layers):
        writer.add_tensor(f"direction.{layer}", DECODER[number].numpy().astype(dtype))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_a_control_vector_has_a_row_per_layer(dtype: Any, tmp_path: Path) -> None:
    """The directions of repeng are read in the order of layers, each also by its name."""
    path = control_vector(tmp_path / "happy.gguf", dtype=dtype)
    assert torch.equal(load_vectors(path), DECODER[[1, 2, 0]])
    assert vector_names(path) == ("direction.1", "direction.2", "direction.10")
    assert torch.equal(load_vectors(path, "direction.10"), DECODER[:1])
    assert torch.equal(load_vectors(path, rows=[1]), DECODER[2:3])


def test_rows_of_a_quantized_tensor_are_dequantized(tmp_path: Path) -> None:
    """A weight of a GGUF model gives the rows that its own dequantization gives."""
    numbers = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = gguf.quants.quantize(numbers, kind)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", stored, raw_dtype=kind)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    expected = torch.from_numpy(gguf.quants.dequantize(stored, kind))
    assert torch.equal(load_vectors(tmp_path / "m.gguf", rows=[4, 1]), expected[[4, 1]])


NEURONPEDIA = {
    "modelId": "gpt2-small", "layer": "6-res-jb", "index": "650",
    "hookName": "blocks.6.hook_resid_pre",
    "vector": DECODER[1].tolist(), "hasVector": True, "vectorLabel": None,
    "pos_values": [1.5, 1.25], "neuron_alignment_indices": [3, 2], "frac_nonzero": 0.01,
}  # fmt: skip


def test_vectors_of_neuronpedia_are_read(tmp_path: Path) -> None:
    """A feature's JSON, the Python package's fields, several in a list; other lists are ignored."""
    path = tmp_path / "v.json"
    path.write_text(json.dumps(NEURONPEDIA))
    assert torch.equal(load_vectors(path), DECODER[1:2])
    assert vector_names(path) == ("gpt2-small/6-res-jb/650",)
    path.write_text(
        json.dumps([NEURONPEDIA, {**NEURONPEDIA, "index": "7", "vector": DECODER[3].tolist()}])
    )
    assert torch.equal(load_vectors(path), DECODER[[1, 3]])
    assert vector_names(path, rows=[1]) == ("gpt2-small/6-res-jb/7",)
    path.write_text(
        json.dumps(
            {
                "label": "dinosaurs",
                "model_id": "gemma-2-2b",
                "values": [1, 2.5],
                "default_steer_strength": 10,
            }
        )
    )
    assert load_vectors(path).tolist() == [[1.0, 2.5]]
    assert vector_names(path) == ("dinosaurs gemma-2-2b",)
    path.write_text(json.dumps(DECODER.tolist()))
    assert torch.equal(load_vectors(path), DECODER)


@pytest.mark.parametrize(
    "content",
    [
        {**NEURONPEDIA, "vector": [], "hasVector": False}, {"alpha": 1}, [], 5, "x",
        {"vector": [True]},
        [{"vector": [1, 2]}, {"vector": [1]}], {"vector": [[1, 2], [1]]}, {"vector": [10**400]},
        {"vector": [1, float("nan")]}, {"a": [1, 2], "b": [3, 4]}, {"vector": ["1", "2"]},
    ],
)  # fmt: skip
def test_other_json_is_refused(content: Any, tmp_path: Path) -> None:
    """No vector, several, one that is no vector: one clear line."""
    (tmp_path / "v.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"^(path|name): expected .*\. Fix: "):
        load_vectors(tmp_path / "v.json")


def test_unknown_arrays_are_shown_with_their_shapes(tmp_path: Path) -> None:
    """A file of another kind is refused with what it holds, or with the endings that are read."""
    save_file({"encoder.0": DECODER, "decoder.0": DECODER.clone()}, tmp_path / "v.safetensors")
    message = refused(lambda: load_vectors(tmp_path / "v.safetensors"), ValueError, "name")
    assert "'decoder.0' [6, 4]" in message
    (tmp_path / "v.csv").write_text("1,2")
    assert ".gguf" in refused(lambda: load_vectors(tmp_path / "v.csv"), ValueError, "path")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small file of every format."""
    folder = tmp_path_factory.mktemp("samples")
    save_file({"v": DECODER}, folder / "v.safetensors")
    np.save(folder / "v.npy", DECODER.numpy())
    np.savez(folder / "v.npz", v=DECODER.numpy())
    torch.save({"v": DECODER}, folder / "v.pt")
    torch.save({"v": DECODER}, folder / "v.pth", _use_new_zipfile_serialization=False)
    control_vector(folder / "v.gguf")
    (folder / "v.json").write_text(json.dumps(NEURONPEDIA))
    assert {p.suffix for p in folder.iterdir()} == set(formats.ENDINGS) - {".bin"}
    return sorted(folder.iterdir())


@given(st.data())
def test_spoilt_files_raise_one_clear_error(
    samples: list[Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut short, or with some bytes changed: vectors, or a `ValueError` in the house's form."""
    path = data.draw(st.sampled_from(samples))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    spoilt = tmp_path_factory.mktemp("spoilt") / path.name
    spoilt.write_bytes(bytes(content))
    with contextlib.suppress(ValueError):
        assert torch.isfinite(load_vectors(spoilt)).all()
        return
    with pytest.raises(ValueError, match=r"(?s)^(path|name): expected .*, got .*\. Fix: "):
        load_vectors(spoilt)
