"""Everything that is a model becomes a `LanguageModel`; everything else is explained."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from superscopes_tl import KINDS, LanguageModel, capture, load_model, plan_sweep
from superscopes_tl.errors import ModelLoadError
from tests.conftest import BACKENDS
from tests.support.tiny_models import ARCHITECTURES, sharp_llama, tiny_hf, tiny_tokenizer

needs_hooked = pytest.mark.skipif(
    "hooked" not in BACKENDS, reason="this TransformerLens has no HookedTransformer"
)
Tiny = Callable[[str, str], LanguageModel]


@pytest.fixture
def directory(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of that directory which a test may spoil."""
    return Path(shutil.copytree(llama_folder, tmp_path / "copy"))


def hf_logits(hf: Any) -> torch.Tensor:
    """Return what the Hugging Face model itself computes for a few tokens."""
    with torch.no_grad():
        return hf(torch.tensor([[0, 100, 200, 300]])).logits


def lens_logits(model: LanguageModel) -> torch.Tensor:
    """Return what the wrapped model computes for the same tokens."""
    with torch.no_grad():
        return model.tl(torch.tensor([[0, 100, 200, 300]]))


def test_a_model_is_described_by_its_own_files(llama_folder: Path, llama: LanguageModel) -> None:
    """The sizes are those of the saved config, and every kind of activation is there."""
    config = json.loads((llama_folder / "config.json").read_text())
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    assert llama.name == "tiny-llama"
    assert (llama.n_layers, llama.d_model) == (layers, width)
    assert llama.n_ctx == config["max_position_embeddings"]
    assert llama.bos_token_id == config["bos_token_id"]
    assert llama.eos_token_ids == (config["eos_token_id"],)
    assert llama.kinds == KINDS
    assert llama.dtype == torch.float32
    assert llama.device == torch.device("cpu")
    expected = f"LanguageModel('tiny-llama': {layers} layers x {width}, bridge, float32, cpu)"
    assert repr(llama) == expected


def test_the_default_is_smollm2_and_has_to_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is not, the error names the command that brings it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"^model: .*superscopes fetch smollm2"):
        load_model()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_directory_is_loaded_with_its_own_weights_and_tokenizer(
    llama_folder: Path, backend: Any
) -> None:
    """A saved model computes what it computed before it was saved."""
    model = load_model(llama_folder, backend=backend, device="cpu")
    assert model.name == "tiny-llama"
    assert model.decoder.name == backend
    assert (model.n_layers, model.d_model, model.n_ctx) == (6, 32, 256)
    assert len(model.tokenizer) == len(tiny_tokenizer())
    torch.testing.assert_close(lens_logits(model), hf_logits(sharp_llama()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_hugging_face_model_with_its_tokenizer_is_wrapped(architecture: str, tiny: Tiny) -> None:
    """A model object keeps its numbers, and its class names it."""
    hf = tiny_hf(architecture)
    model = tiny(architecture, "bridge")
    assert model.name == type(hf).__name__
    assert (model.n_layers, model.d_model, model.n_ctx) == (6, 32, 256)
    torch.testing.assert_close(lens_logits(model), hf_logits(hf), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "tokenizer", [None, "my-tokenizer", SimpleNamespace(is_fast=False)], ids=str
)
def test_a_model_needs_a_fast_tokenizer(tokenizer: Any) -> None:
    """Without character offsets no token can be chosen by its text."""
    with pytest.raises(ModelLoadError, match="^tokenizer:"):
        load_model(tiny_hf("llama"), tokenizer)


def test_a_directory_without_tokenizer_needs_one_as_argument(directory: Path) -> None:
    """Alone it is refused; with a tokenizer beside it, it loads."""
    for file in directory.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelLoadError, match="^model:"):
        load_model(directory)
    model = load_model(directory, tiny_tokenizer(), backend="bridge", device="cpu")
    assert model.tokenizer is tiny_tokenizer()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kept", [None, 1])
def test_an_incomplete_directory_is_refused(directory: Path, file: str, kept: int | None) -> None:
    """A missing or truncated file is a load error that names the directory."""
    content = (directory / file).read_bytes()
    (directory / file).unlink()
    if kept is not None:
        (directory / file).write_bytes(content[:kept])
    with pytest.raises(ModelLoadError, match=r"^model: .*copy"):
        load_model(directory)


@pytest.mark.parametrize("thing", [None, 5, torch.nn.Linear(2, 2), {"config": 1}])
def test_what_is_no_model_is_refused(thing: Any) -> None:
    """The message lists everything that a model can be, and names the class that came."""
    with pytest.raises(ModelLoadError, match=f"^model: .*{type(thing).__name__}"):
        load_model(thing)


def test_an_unknown_hub_name_offline_is_refused_at_once() -> None:
    """Without a hub, a name that is not a directory is refused without waiting for a network."""
    with pytest.raises(ModelLoadError, match=r"^model: .*no-such-org/no-such-model"):
        load_model("no-such-org/no-such-model")


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float32}, {"device": "cpu"}, {"backend": "hooked"}, {"revision": "x"}],
)
@pytest.mark.parametrize("form", ["LanguageModel", "TransformerLens", "Hugging Face"])
def test_load_options_of_a_loaded_model_are_refused(
    form: str, options: dict[str, Any], tiny: Tiny
) -> None:
    """An option that could no longer have an effect is an error, not ignored."""
    model = tiny("llama", "bridge")
    given: dict[str, tuple[Any, ...]] = {
        "LanguageModel": (model,),
        "TransformerLens": (model.tl,),
        "Hugging Face": (tiny_hf("llama"), tiny_tokenizer()),
    }
    (name,) = options
    if (form, name) == ("Hugging Face", "backend"):
        return  # it still has an effect
    with pytest.raises(ValueError, match=f"^{name}:"):
        load_model(*given[form], **options)


def test_a_language_model_is_returned_as_it_is(llama: LanguageModel) -> None:
    """Without other arguments, which would have no effect."""
    assert load_model(llama) is llama
    with pytest.raises(ValueError, match="^prepend_bos:"):
        load_model(llama, prepend_bos=False)
    with pytest.raises(ValueError, match="^tokenizer:"):
        load_model(llama, tiny_tokenizer())


def make_lens(backend: str, llama_folder: Path) -> Any:
    """Return a TransformerLens object that the package has not seen."""
    if backend == "bridge":
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(
            str(llama_folder),
            hf_model=tiny_hf("llama"),
            tokenizer=AutoTokenizer.from_pretrained(llama_folder),
            device="cpu",
        )
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=6,
        d_model=32,
        n_ctx=64,
        d_head=8,
        n_heads=4,
        d_vocab=len(tiny_tokenizer()),
        act_fn="gelu",
        normalization_type="LN",
        model_name="hand-made",
        device="cpu",
        default_prepend_bos=True,
    )
    return HookedTransformer(cfg).eval()


@pytest.mark.filterwarnings("ignore")  # these objects are the user's, made by TransformerLens
@pytest.mark.parametrize("backend", ["bridge", pytest.param("hooked", marks=needs_hooked)])
def test_a_transformer_lens_object_is_used_as_it_is(backend: str, llama_folder: Path) -> None:
    """The object that was handed in computes, and nobody copies or converts it."""
    lens = make_lens(backend, llama_folder)
    model = load_model(lens, tiny_tokenizer())
    assert model.tl is lens
    assert model.decoder.name == backend
    assert model.tokenizer is tiny_tokenizer()
    assert (model.n_layers, model.d_model) == (6, 32)
    assert model.n_ctx == {"bridge": 256, "hooked": 64}[backend]
    assert model.processing == {"bridge": "none", "hooked": "as given"}[backend]
    seen = capture(model, "Red Hot", kinds="resid_post", layers=[5, 2])
    with torch.no_grad():
        _, cache = lens.run_with_cache(seen.tokens.tensor(model.device))
    for layer in (5, 2):
        expected = cache[f"blocks.{layer}.hook_resid_post"][0]
        torch.testing.assert_close(seen["resid_post", layer], expected)


@needs_hooked
@pytest.mark.parametrize("prepends", [True, False])
def test_a_hooked_transformer_decides_about_the_bos(prepends: bool, llama_folder: Path) -> None:
    """A TransformerLens object's own setting holds unless the argument overrules it."""
    lens = make_lens("hooked", llama_folder)
    with pytest.raises(ModelLoadError, match="^tokenizer:"):
        load_model(lens)
    lens.cfg.default_prepend_bos = prepends
    model = load_model(lens, tiny_tokenizer())
    assert model.bos_token_id == (0 if prepends else None)
    overruled = load_model(lens, tiny_tokenizer(), prepend_bos=not prepends)
    assert overruled.bos_token_id == (None if prepends else 0)


@needs_hooked
def test_a_model_that_hooked_transformer_cannot_hold_is_explained() -> None:
    """A demand for `HookedTransformer` that it cannot meet names the model and the way out."""
    hf = tiny_hf("llama")
    hf.config.num_attention_heads = 5  # the converter splits the weights by this
    with pytest.raises(ModelLoadError, match="^backend:"):
        load_model(hf, tiny_tokenizer(), backend="hooked")


@pytest.mark.parametrize(
    ("prepend_bos", "token", "recorded"), [(True, 0, True), (False, None, False), (None, 0, True)]
)
def test_the_bos_policy_is_recorded(
    prepend_bos: bool | None, token: int | None, recorded: bool
) -> None:
    """Unless told otherwise prompts start as the tokenizer starts them, and results say so."""
    model = load_model(
        tiny_hf("llama"), tiny_tokenizer(), backend="bridge", prepend_bos=prepend_bos
    )
    assert model.bos_token_id == token
    assert model.provenance()["prepend_bos"] is recorded
    plan = plan_sweep(model, "Red Hot", layers=[5, 2], scorer=lambda a, b: [0.0] * len(b))
    assert (plan.source.ids[0] == 0) is recorded
    assert plan.provenance()["model"]["prepend_bos"] is recorded


def test_a_tokenizer_that_adds_no_bos_gets_none() -> None:
    """A BOS token that the tokenizer has but does not use is not used here either."""
    plain = copy.deepcopy(tiny_tokenizer())
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    hf = tiny_hf("llama")
    assert load_model(hf, plain, backend="bridge").bos_token_id is None
    assert load_model(hf, plain, backend="bridge", prepend_bos=True).bos_token_id == 0


@pytest.mark.parametrize(
    ("prepend_bos", "prefix", "recorded"),
    [(None, (1, 0), None), (True, (0,), True), (False, (), False)],
)
def test_the_whole_prefix_of_a_tokenizer_is_kept(
    prepend_bos: bool | None, prefix: tuple[int, ...], recorded: bool | None
) -> None:
    """A tokenizer may put several tokens in front; an argument may ask for the BOS alone."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> <s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    model = load_model(tiny_hf("llama"), tokenizer, backend="bridge", prepend_bos=prepend_bos)
    assert model.prefix_ids == prefix
    assert model.provenance()["prepend_bos"] is recorded
    own = tokenizer("Red", add_special_tokens=False)["input_ids"]
    assert capture(model, "Red", kinds="resid_post").tokens.ids == (*prefix, *own)


def test_a_bos_that_the_tokenizer_does_not_have_is_refused() -> None:
    """A prompt cannot start with a token that does not exist."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="^prepend_bos:"):
        load_model(tiny_hf("llama"), tokenizer, backend="bridge", prepend_bos=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_dtype_is_obeyed_and_recorded(backend: Any, dtype: Any, llama_folder: Path) -> None:
    """A half-precision model has half-precision weights and vectors, and its result says so."""
    model = load_model(llama_folder, backend=backend, dtype=dtype, device="cpu")
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.tl.parameters()} == {torch.bfloat16}
    assert model.provenance()["dtype"] == "bfloat16"
    seen = capture(model, "Red", kinds="resid_post", layers=[5, 2])
    assert seen["resid_post", 5].dtype == torch.bfloat16


def test_float32_is_the_default_whatever_the_file_holds(llama_folder: Path, tmp_path: Path) -> None:
    """Weights that are stored in half precision are still computed with in float32."""
    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    model = load_model(folder, tiny_tokenizer(), backend="bridge", device="cpu")
    assert model.provenance()["dtype"] == "float32"


@pytest.mark.parametrize(
    "parameter", [None, "model.norm.weight", "model.layers.5.mlp.up_proj.weight"]
)
def test_the_fingerprint_is_that_of_the_weights(parameter: str | None, tiny: Tiny) -> None:
    """It is the same on both backends, and another one after a change of one number."""
    hf = tiny_hf("llama")
    if parameter:
        with torch.no_grad():
            hf.get_parameter(parameter).view(-1)[3] += 0.5
    changed = load_model(hf, tiny_tokenizer(), backend="bridge", check=False).fingerprint
    for backend in BACKENDS:
        assert (changed == tiny("llama", backend).fingerprint) is (parameter is None)


def test_provenance_is_plain_data_that_names_versions(llama: LanguageModel) -> None:
    """What a reader needs to get the same model again survives JSON."""
    provenance = llama.provenance()
    assert json.loads(json.dumps(provenance)) == provenance
    assert provenance["name"] == "tiny-llama"
    assert provenance["backend"] == "bridge"
    assert provenance["weight_processing"] == "none"
    assert provenance["device"] == "cpu"
    assert provenance["torch"] == torch.__version__
    assert (provenance["n_layers"], provenance["d_model"]) == (llama.n_layers, llama.d_model)
    assert {"transformer_lens", "transformers", "fingerprint", "revision"} <= set(provenance)


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Return what a user could notice of a tokenizer."""
    return {
        "special": dict(tokenizer.special_tokens_map),
        "pad": tokenizer.pad_token,
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "path": tokenizer.name_or_path,
        "side": tokenizer.padding_side,
        "length": len(tokenizer),
        "ids": tokenizer("Red Hot")["input_ids"],
        "backend": tokenizer.backend_tokenizer.to_str(),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_tokenizer_that_was_handed_in_is_not_altered(architecture: str, backend: Any) -> None:
    """TransformerLens changes tokenizers; it gets a copy, and the user's stays as it was."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    before = tokenizer_state(tokenizer)
    model = load_model(tiny_hf(architecture), tokenizer, backend=backend)
    assert tokenizer_state(tokenizer) == before
    assert model.tokenizer is tokenizer
    assert before["pad"] is None  # TransformerLens would have set it


@pytest.mark.parametrize("backend", BACKENDS)
def test_loading_leaves_the_libraries_as_they_were(backend: Any) -> None:
    """Progress bars and the log level are only silenced while a model loads."""
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        load_model(tiny_hf("llama"), tiny_tokenizer(), backend=backend)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    """A checkpoint without one matrix would run with random numbers in its place."""
    from safetensors.torch import load_file, save_file

    tiny_hf("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.3.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"^model: .*layers\.3\.mlp\.down"):
        load_model(tmp_path)


def test_a_model_in_training_mode_is_read_without_dropout() -> None:
    """Dropout would make two captures of one prompt differ."""
    model = load_model(tiny_hf("gpt2").train(), tiny_tokenizer(), backend="bridge")
    one, other = (capture(model, "Red Hot", layers=5)["mlp_out", 5] for _ in range(2))
    assert torch.equal(one, other)


def test_a_device_beside_a_device_map_is_refused() -> None:
    """Two answers to one question are an error, not a silent choice."""
    with pytest.raises(ValueError, match="^device:"):
        load_model("smollm2", device="cpu", device_map="auto")
