"""Chat templates: the text is found in them by its place, and a sweep in one is what it says."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from superscopes_tl import (
    CHAT_PROMPT,
    Explorer,
    LanguageModel,
    PatchedGenerator,
    Site,
    SweepConfig,
    SweepResult,
    TargetPrompt,
    capture,
    evaluate,
    plan_sweep,
    sweep,
)
from superscopes_tl.cli.main import app
from superscopes_tl.errors import PlaceholderError
from superscopes_tl.experiment import Cell, make_control, make_patches, run_plans
from superscopes_tl.explorer.cell import code_for
from superscopes_tl.model import resolve_positions, tokenize
from superscopes_tl.neighbours import beside, causal_effects, lens_table, sites_of
from superscopes_tl.vectors import MeanActivation, SumOf
from tests.conftest import BACKENDS
from tests.support import plain_hf
from tests.support.hand_tokenizer import by_hand
from tests.support.tiny_models import tiny_hf, tiny_tokenizer

_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": _TURNS,
    "llama-2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "says-x": "x is a word, and x too. " + _TURNS + "x: ",
    "system": "<|im_start|>system\nRed Hot Chili Peppers? The x is unknown.<|im_end|>\n" + _TURNS,
    "bare": "{{ messages[0].content }}{{ messages[1].content if messages[1:] else '' }}",
}
SOURCE = "Red Hot Chili Peppers"
TARGET = TargetPrompt("Country in the Middle East, x is a band", answer="It is")
N_NEW = 4
NEAR_TIE = 5e-5

Tiny = Callable[[str, str], LanguageModel]


def with_template(tokenizer: Any, template: str) -> Any:
    """Return a copy of a tokenizer that has a chat template."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    return copied


def chat_model(model: Any, template: str) -> Any:
    """Return a model, or a stub of one, whose tokenizer has one of the templates."""
    template = TEMPLATES.get(template, template)
    tokenizer = with_template(model.tokenizer, template)
    if dataclasses.is_dataclass(model) and not isinstance(model, type):
        return dataclasses.replace(model, tokenizer=tokenizer)
    copied = copy.copy(model)
    copied.tokenizer = tokenizer
    return copied


def conversation(text: str, answer: str = "") -> tuple[list[dict[str, str]], dict[str, bool]]:
    """Return the messages and options that make Hugging Face's tokenizer render the same."""
    messages = [{"role": "user", "content": text}]
    if not answer:
        return messages, {"add_generation_prompt": True}
    begun = {"role": "assistant", "content": answer}
    return [*messages, begun], {"continue_final_message": True}


def by_hugging_face(tokenizer: Any, text: str, answer: str = "") -> list[int]:
    """Return the ids that Hugging Face's tokenizer makes of the conversation by itself."""
    messages, options = conversation(text, answer)
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, **options)
    return list(encoded["input_ids"])


def place_of(tokenizer: Any, text: str, answer: str, start: int, end: int) -> list[int]:
    """Return the tokens of the characters `[start, end)` of a message, without any offsets.

    Independent of the package: the message is the last occurrence of the text in what Hugging
    Face renders, and a token is where decoding one token more makes the text longer.
    """
    messages, options = conversation(text, answer)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    at = rendered.rindex(text)
    ids = by_hugging_face(tokenizer, text, answer)
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    assert ends[-1] == len(rendered)
    begins = [0, *ends[:-1]]
    return [
        i
        for i, (a, b) in enumerate(zip(begins, ends, strict=True))
        if a < at + end and b > at + start
    ]


HAND = by_hand()


@pytest.mark.parametrize("answer", ["", "It is"])
@pytest.mark.parametrize("text", [SOURCE, "x", "x is x", "Syria: Country, x\n\nRed?"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_of_the_tokenizers_own_chat_function(
    template: str, text: str, answer: str
) -> None:
    """One tokenisation of the whole, with the template's special tokens and no others."""
    model = chat_model(HAND, template)
    tokens = tokenize(model, text, chat=True, answer=answer)
    assert list(tokens.ids) == by_hugging_face(model.tokenizer, text, answer)
    assert tokens.ids.count(0) == (template == "llama-2")
    assert tokens.has_bos is (template == "llama-2")
    assert tokens.text == text


@pytest.mark.parametrize("template", TEMPLATES)
@given(text=st.text(min_size=1, max_size=30).map(str.strip).filter(bool))
@example(text="TheMessageOfTheUserStandsHere")
@example(text="<|im_start|>user\nx<|im_end|>")
@example(text="🌶️ שם")
@settings(max_examples=40, deadline=None)
def test_the_texts_own_tokens_hold_the_text(template: str, text: str) -> None:
    """Whatever is typed, its characters are covered by its own tokens and by no other."""
    model = chat_model(HAND, template)
    tokens = tokenize(model, text, chat=True)
    assert list(tokens.ids) == by_hugging_face(model.tokenizer, text)
    assert len(tokens.ids) == len(tokens.spans) == len(tokens.labels)
    assert list(tokens.spans) == sorted(tokens.spans)
    assert all(tokens.labels)
    own = list(dict.fromkeys(tokens.spans[i] for i in tokens.own))
    assert "".join(text[a:b] for a, b in own) == text
    assert all(a == b for i, (a, b) in enumerate(tokens.spans) if i not in tokens.own)
    assert resolve_positions(tokens, slice(None)) == tuple(tokens.own)
    assert resolve_positions(tokens, -1) == (tokens.own.stop - 1,)


def test_the_labels_show_the_template() -> None:
    """A reader of an error's list sees every token, white space included."""
    tokens = tokenize(chat_model(HAND, "llama-2"), "Red Hot", chat=True)
    assert tokens.labels == ("<s>", *"[INST]·", "Red", "·Hot", *"·[/INST]")
    assert tokens.own == range(8, 10)
    assert tokens.spans == (*[(0, 0)] * 8, (0, 3), (3, 7), *[(7, 7)] * 8)


PEPPERS = tokenize(chat_model(HAND, "system"), SOURCE, chat=True)
FIRST = PEPPERS.own.start


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        pytest.param(-1, (FIRST + 5,), id="the-names-last-token"),
        pytest.param(-6, (FIRST,), id="the-names-first-token"),
        pytest.param(-7, (FIRST - 1,), id="the-template-before-it"),
        pytest.param(0, (0,), id="the-templates-first-token"),
        pytest.param(len(PEPPERS) - 1, (len(PEPPERS) - 1,), id="the-templates-last-token"),
        pytest.param("Chili", (FIRST + 3,), id="a-word-that-the-template-has-too"),
        pytest.param(slice(None), tuple(range(FIRST, FIRST + 6)), id="every-token-of-the-text"),
        pytest.param(slice(-2, None), (FIRST + 4, FIRST + 5), id="the-texts-last-two"),
        pytest.param(slice(None, None, -3), (FIRST + 5, FIRST + 2), id="backwards"),
    ],
)
def test_positions_count_from_the_end_of_the_text(
    positions: Any, expected: tuple[int, ...]
) -> None:
    """-1 is where the name has its meaning, not the template's last token."""
    assert PEPPERS.labels[FIRST : FIRST + 6] == ("Red", "·Hot", "·Ch", "ili", "·Pe", "ppers")
    assert resolve_positions(PEPPERS, positions) == expected


def test_positions_out_of_range_say_what_there_is() -> None:
    """The range of legal indices goes from the text's end backwards, and to the last token."""
    end, count = PEPPERS.own.stop, len(PEPPERS)
    assert end < count
    for bad in (count, -end - 1):
        with pytest.raises(ValueError, match="^positions:"):
            resolve_positions(PEPPERS, bad)
    for elsewhere in ("unknown", "im_start"):  # words of the template
        with pytest.raises(ValueError, match="^positions:"):
            resolve_positions(PEPPERS, elsewhere)


@pytest.mark.parametrize("prompt", [TARGET, CHAT_PROMPT, TargetPrompt("x, x and Red x", "x")])
@pytest.mark.parametrize("template", TEMPLATES)
def test_placeholders_are_those_of_the_message(template: str, prompt: TargetPrompt) -> None:
    """A template or an answer that contains the placeholder's word takes no vector."""
    model = chat_model(HAND, template)
    for answer in ("", "x x is"):
        asked = dataclasses.replace(prompt, answer=answer)
        target = asked.locate(model, 3, chat=True)
        expected = [
            position
            for start, end in prompt.spans
            for position in place_of(model.tokenizer, prompt.text, answer, start, end)
        ]
        assert list(target.positions) == expected
        assert [target.tokens.labels[p].strip("·") for p in expected] == ["x"] * len(expected)


def test_a_placeholder_that_is_joined_with_the_template_is_refused() -> None:
    """A token of placeholder and template is no place of its own; white space does no harm."""
    joined = by_hand((":x", "\nx", "  y"), words=False)
    with pytest.raises(PlaceholderError, match="^target_prompt:"):
        TargetPrompt("x Red").locate(
            chat_model(joined, "ask:{{ messages[0].content }}"), 1, chat=True
        )
    for template, text, label in (
        ("ask\n{{ messages[0].content }}!", "x", "⏎x"),
        ("ask  {{ messages[0].content }}!", "y", "··y"),
    ):
        model = chat_model(joined, template)
        target = TargetPrompt(text, text).locate(model, 1, chat=True)
        assert [target.tokens.labels[p] for p in target.positions] == [label]
        assert target.tokens.spans[target.positions[0]] == (0, 1)


def test_blanks_that_a_template_trims_move_no_token() -> None:
    """The template leaves blanks out; spans still count the characters as they were typed."""
    model = chat_model(HAND, "llama-2")
    tokens = tokenize(model, "  Red Hot\n", chat=True)
    plain = tokenize(model, "Red Hot", chat=True)
    assert tokens.ids == plain.ids
    assert tokens.own == plain.own
    assert [tokens.spans[i] for i in tokens.own] == [(2, 5), (5, 9)]
    assert resolve_positions(tokens, "Hot") == resolve_positions(plain, "Hot")


REFUSED = {
    "upper-case": ("[{{ messages[0].content | upper }}]", "", "chat"),
    "twice": ("{{ messages[0].content }} {{ messages[0].content }}", "", "chat"),
    "another-word": ("[{{ messages[0].content | replace('Hot', 'Cold') }}]", "", "prompt"),
    "depends": ("{{ messages[0].content | length }}: {{ messages[0].content }}", "", "prompt"),
    "refuses": ("{{ raise_exception('roles, please') }}", "", "chat"),
    "no-answers": ("[{{ messages[0].content }}]", "It is", "chat"),
    "trims": (
        "{{ messages[0].content }}|{{ messages[1].content | trim }}", " It is", r"prompt\.answer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("template", "answer", "argument"), REFUSED.values(), ids=REFUSED)
def test_a_template_that_changes_a_text_is_refused(
    template: str, answer: str, argument: str
) -> None:
    """Where the model would not read what was typed, an error instead of a wrong token."""
    with pytest.raises(ValueError, match=f"^{argument}:"):
        tokenize(chat_model(HAND, template), "Red Hot", chat=True, answer=answer)


def test_a_model_without_a_template_is_refused(llama: LanguageModel) -> None:
    """A model that is no chat model says so before anything is run."""
    with pytest.raises(ValueError, match="^chat:"):
        plan_sweep(llama, SOURCE, chat=True)
    with pytest.raises(ValueError, match="^chat:"):
        PatchedGenerator(llama, chat=True)
    with pytest.raises(TypeError, match="^chat:"):
        plan_sweep(llama, SOURCE, chat="yes")


def test_an_answer_needs_the_template() -> None:
    """Without one nobody knows where answers begin; said before a model is loaded."""
    message = r"^target_prompt\.answer:"
    with pytest.raises(ValueError, match=message):
        plan_sweep("no/such-model", SOURCE, target_prompt=TARGET)
    with pytest.raises(ValueError, match=message):
        TARGET.locate(HAND, 1)
    with pytest.raises(ValueError, match=r"^prompt\.answer:"):
        tokenize(HAND, "Red", answer="It")
    with pytest.raises(ValueError, match=r"^target_prompt\.answer:"):
        TargetPrompt("x", answer=" ")
    with pytest.raises(TypeError, match=r"^target_prompt\.answer:"):
        TargetPrompt("x", answer=3)  # type: ignore[arg-type]


def test_the_template_counts_towards_the_context() -> None:
    """What does not fit is refused with the number of tokens that the model would get."""
    model = chat_model(by_hand(n_ctx=20), "llama-2")
    assert len(tokenize(model, "Red", chat=True, room=3)) == 17
    with pytest.raises(ValueError, match="^prompt:"):
        tokenize(model, "Red", chat=True, room=4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_cell_of_a_chat_sweep_equals_plain_hugging_face(
    template: str, backend: str, tiny: Tiny, word_overlap: Any
) -> None:
    """The ids of Hugging Face's chat function, one forward pass at a time: the same numbers."""
    model, hf = chat_model(tiny("llama", backend), template), tiny_hf("llama")
    plan = plan_sweep(
        model,
        SOURCE,
        layers=(5, 2),
        kinds=("mlp_out", "resid_post"),
        alphas=(1, 6),
        positions=(-1, "Hot"),
        target_layer=(3, 0),
        target_prompt=TARGET,
        chat=True,
        max_new_tokens=N_NEW,
        scorer=word_overlap,
    )
    table = SweepResult.from_readings([r for batch in run_plans([plan]) for r in batch], {}).table
    source = by_hugging_face(model.tokenizer, SOURCE)
    ids = by_hugging_face(model.tokenizer, TARGET.text, TARGET.answer)
    start = TARGET.text.index("x")
    at = tuple(place_of(model.tokenizer, TARGET.text, TARGET.answer, start, start + 1))
    ends = (len(SOURCE), len("Red Hot"))
    read = [place_of(model.tokenizer, SOURCE, "", end - 1, end)[-1] for end in ends]
    assert list(dict.fromkeys(table["position"])) == read
    likely = plan.generator.next_token(make_patches(plan))
    # Cells that are all alike would prove nothing: they differ by much more than is allowed below.
    assert likely.std(dim=0).max() > 2e-3
    sure = 0
    for row, got in zip(table.to_dict("records"), likely, strict=True):
        vectors = plain_hf.source_vectors(hf, source, row["kind"], row["source_layer"])
        new, logits = plain_hf.generate(
            hf, ids, at, row["alpha"] * vectors[row["position"]], row["target_layer"],
            n_new=N_NEW, eos=1,
        )  # fmt: skip
        torch.testing.assert_close(got, logits[0].log_softmax(-1), rtol=0, atol=1e-4)
        if row["margin"] > NEAR_TIE:
            sure += 1
            assert row["text"] == model.tokenizer.decode(new, skip_special_tokens=True), row
        assert row["prompt"] == SOURCE
    assert sure >= len(table) - 1 == 2 * 2 * 2 * 2 * 2 - 1
    provenance = plan.provenance()
    assert provenance["config"]["chat"] is True
    assert provenance["tokens"]["ids"] == source
    assert provenance["target_prompt"] == {
        "text": TARGET.text, "placeholder": "x", "answer": "It is", "ids": ids,
        "positions": list(at),
    }  # fmt: skip


FAST: dict[str, Any] = {
    "layers": (5, 2),
    "kinds": "resid_post",
    "alphas": (1, 3),
    "target_prompt": TARGET,
    "max_new_tokens": 3,
    "chat": True,
}


@pytest.fixture
def model(tiny: Tiny) -> LanguageModel:
    """A tiny model whose template has a system prompt with the words of the source prompt."""
    return chat_model(tiny("llama", "bridge"), "system")


def test_another_prompt_is_read_in_the_template_too(
    model: LanguageModel, word_overlap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both `at_prompt` and the control of another prompt read the last token of its name."""
    monkeypatch.setattr("superscopes_tl.experiment.controls.OTHER_PROMPTS", (SOURCE, "Pearl Jam"))
    plan = plan_sweep(model, SOURCE, scorer=word_overlap, **FAST)
    there = plan.at_prompt("Syria")
    assert list(there.source.ids) == by_hugging_face(model.tokenizer, "Syria")
    assert {site.position for site in there.sites} == {there.source.own.stop - 1}
    cell = plan.all_cells[1]
    only = plan.only([cell])
    patch = make_control("other_prompt", plan, [cell], make_patches(only))[0]
    kind, layer, alpha = cell.kind, cell.source_layer, cell.alpha
    other = "Pearl Jam"
    ids = by_hugging_face(model.tokenizer, other)
    last = place_of(model.tokenizer, other, "", len(other) - 1, len(other))[-1]
    expected = plain_hf.source_vectors(tiny_hf("llama"), ids, kind, layer)[last]
    torch.testing.assert_close(patch.vector, alpha * expected, rtol=1e-4, atol=1e-4)


def test_a_mean_over_texts_is_that_of_their_own_last_tokens(model: LanguageModel) -> None:
    """The base of a chat sweep is read where its source prompts are read."""
    texts = ("Syria", "Red Hot")
    plan = plan_sweep(model, SOURCE, scorer=lambda r, c: [0.0] * len(c), **FAST)
    base = MeanActivation(texts, chat=True)
    found = base(plan, [(site, 0) for site in plan.sites])
    for row, site in zip(found, plan.sites, strict=True):
        vectors = []
        for text in texts:
            last = place_of(model.tokenizer, text, "", len(text) - 1, len(text))[-1]
            ids = by_hugging_face(model.tokenizer, text)
            vectors.append(
                plain_hf.source_vectors(tiny_hf("llama"), ids, site.kind, site.layer)[last]
            )
        torch.testing.assert_close(row, torch.stack(vectors).mean(dim=0), rtol=1e-4, atol=1e-4)
    names = {repr(f) for f in (base, MeanActivation(texts))}
    assert len(names) == 2


def test_a_tokenised_chat_can_be_captured(model: LanguageModel) -> None:
    """`capture` takes the tokens, so that nothing has to be passed on twice."""
    tokens = tokenize(model, SOURCE, chat=True)
    seen = capture(model, tokens, kinds="resid_post", layers=(5, 2))
    expected = plain_hf.source_vectors(tiny_hf("llama"), list(tokens.ids), "resid_post", 2)
    torch.testing.assert_close(seen["resid_post", 2], expected, rtol=1e-4, atol=1e-4)


def test_a_file_holds_one_experiment(
    model: LanguageModel, word_overlap: Any, tmp_path: Path
) -> None:
    """With and without a template, or with another answer, are different experiments."""
    path = tmp_path / "found.sqlite"
    options: dict[str, Any] = {"progress": False, "scorer": word_overlap, "draws": 0}
    assert evaluate(model, [SOURCE], path, **FAST, **options).provenance["config"]["chat"] is True
    assert len(evaluate(model, [SOURCE, "Syria"], path, **FAST, **options)) == 2 * 2 * 2
    other_answer = {**FAST, "target_prompt": dataclasses.replace(TARGET, answer="A")}
    plain = {**FAST, "chat": False, "target_prompt": TargetPrompt(TARGET.text)}
    for other in (other_answer, plain):
        with pytest.raises(ValueError, match="^path:"):
            evaluate(model, [SOURCE], path, **other, **options)


def test_the_code_of_a_cell_says_chat(model: LanguageModel, word_overlap: Any) -> None:
    """The printed call has the template and the beginning of the answer, and only where used."""
    result = sweep(model, SOURCE, scorer=word_overlap, progress=False, **FAST)
    code = code_for(result, Cell.of(result.table.iloc[0]))
    compile(code, "code", "exec")
    assert "    chat=True,\n" in code
    assert f"target_prompt=TargetPrompt({TARGET.text!r}, 'x', 'It is')," in code
    plain = {**FAST, "chat": False, "target_prompt": TargetPrompt(TARGET.text)}
    result = sweep(model, SOURCE, scorer=word_overlap, progress=False, **plain)
    code = code_for(result, Cell.of(result.table.iloc[0]))
    assert "chat" not in code
    assert f"target_prompt=TargetPrompt({TARGET.text!r}, 'x')," in code


def test_the_explorer_keeps_the_template(model: LanguageModel, word_overlap: Any) -> None:
    """Template and answer stay as given; the chips are the chat's tokens."""
    config = SweepConfig(scorer=word_overlap, **{**FAST, "layers": (2, 3), "alphas": (1.0, 3.0)})
    explorer = Explorer(model, SOURCE, config)
    tokens = tokenize(model, SOURCE, chat=True)
    assert [label for label, _ in explorer.view.tokens.options] == list(tokens.labels)
    assert explorer.config.positions == explorer.view.tokens.value == tokens.own.stop - 1
    assert explorer.config.chat
    assert explorer.config.target_prompt == TARGET
    explorer.run()
    assert explorer.wait(120)
    expected = sweep(model, SOURCE, config, progress=False)
    pairs = [r.table[["source_layer", "alpha", "text"]] for r in (explorer.result, expected)]
    assert pairs[0].equals(pairs[1])
    explorer.view.prompt.value = "Syria"
    there = tokenize(model, "Syria", chat=True)
    assert explorer.view.tokens.value == there.own.stop - 1
    explorer.config = dataclasses.replace(
        config, chat=False, target_prompt=TargetPrompt(TARGET.text)
    )
    assert [label for label, _ in explorer.view.tokens.options] == ["<s>", "Sy", "ria"]
    assert not explorer.config.chat


@pytest.mark.parametrize("answer", ["", "It is"])
def test_the_command_takes_chat(answer: str, tmp_path: Path) -> None:
    """--chat and --answer reach the sweep; an answer alone is bad input."""
    folder, out = tmp_path / "model", tmp_path / "run.zip"
    tiny_hf("llama").save_pretrained(folder)
    with_template(tiny_tokenizer(), TEMPLATES["chatml"]).save_pretrained(folder)
    options = ["sweep", SOURCE, "--model", str(folder), "--layers", "5,2", "--alphas", "3",
               "--kinds", "resid_post", "--backend", "bridge", "--max-new-tokens", "3",
               "--out", str(out), "--answer", answer]  # fmt: skip
    done = CliRunner().invoke(app, [*options, "--chat"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.stderr
    result = SweepResult.load(out)
    assert result.provenance["config"]["chat"] is True
    assert result.provenance["target_prompt"]["answer"] == (answer or CHAT_PROMPT.answer)
    if answer:
        refused = CliRunner().invoke(app, options, env={"COLUMNS": "160"})
        assert refused.exit_code == 2
        assert "without chat=True" in refused.stderr


def test_effects_are_those_of_the_chats_tokens(model: LanguageModel, word_overlap: Any) -> None:
    """In a chat a sweep, its effects and a lens name one token; effects without it are refused."""
    asked: dict[str, Any] = {"layers": [5, 2], "kinds": "resid_post", "positions": [-1, -2]}
    read = sweep(model, SOURCE, chat=True, scorer=word_overlap, progress=False, **asked)
    effects = causal_effects(model, SOURCE, chat=True, continuation=2, **asked)
    joined = beside(read.best(), effects)
    assert joined["effect"].notna().all()
    assert joined["token"].tolist() == read.best()["token"].tolist()
    lens = lens_table(model, SOURCE, sites_of(read.table), chat=True)
    assert set(lens["token"]) == set(read.table["token"])
    with pytest.raises(ValueError, match="^effects:"):
        beside(read.best(), causal_effects(model, SOURCE, **asked))


def test_an_effect_in_a_chat_equals_plain_hugging_face(model: LanguageModel) -> None:
    """Ablation behind a template: the answer's tokens, weighed with and without the vector."""
    answer = "It is"
    effect = causal_effects(
        model, SOURCE, kinds="resid_post", layers=2, chat=True, continuation=answer
    ).iloc[0]
    ids = by_hugging_face(model.tokenizer, SOURCE, answer)
    start = len(by_hugging_face(model.tokenizer, SOURCE))
    at = tokenize(model, SOURCE, chat=True).own.stop - 1
    hf = tiny_hf("llama")

    def likely(vector: Any) -> float:
        logits = plain_hf.patched_logits(hf, ids, (at,), vector, 2)
        rows = logits.log_softmax(dim=-1)[start - 1 : len(ids) - 1]
        return float(rows.gather(1, torch.tensor(ids[start:])[:, None]).mean())

    own = plain_hf.source_vectors(hf, ids, "resid_post", 2)[at]
    assert len(ids) > start
    assert effect["clean_log_probability"] == pytest.approx(likely(own), abs=1e-4)
    expected = likely(torch.zeros_like(own)) - likely(own)
    assert effect["effect"] == pytest.approx(expected, abs=1e-4)


def test_a_sum_counts_from_the_end_of_the_text(model: LanguageModel, word_overlap: Any) -> None:
    """The last token of a sum of sites is the text's, as a sweep's is."""
    settings: dict[str, Any] = {"layers": 5, "kinds": "mlp_out", "alphas": 2, "chat": True}
    plain = plan_sweep(model, SOURCE, scorer=word_overlap, **settings)
    same = SumOf([Site("mlp_out", 5, -1)])
    summed = plan_sweep(model, SOURCE, scorer=word_overlap, vectors=same, **settings)
    one, other = make_patches(plain)[0].vector, make_patches(summed)[0].vector
    assert torch.equal(one, other)
