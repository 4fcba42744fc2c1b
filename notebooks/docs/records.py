"""Tables and figures of the site that are read from files, so that they say what the files say.

1. `models`: what `superscopes check` found, from `results/*_check.json`.
2. `architectures`: the random-weight models that tests compare with Hugging Face, from the tests.
3. `results`, `pictures`, `stored_notebooks`, `numbers`: what made each file and number, on which
   model, in which time; `pictures` from `images/made.json`, which the scripts that draw them keep.
4. `questions`: the questions that the pages answer, from their headings.
5. `exhibits`: the gallery; `ten_lines`: README's.
"""

from __future__ import annotations

import html
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

from notebooks.docs import gallery, notebook_pages
from superscopes_tl.evaluation import Readability
from superscopes_tl.figures import readability_curve
from superscopes_tl.weights import PACKAGED

FOLDER = Path(__file__).parent.parent
RESULTS, IMAGES, QUESTIONS = (
    FOLDER / "results",
    FOLDER / "images",
    Path(__file__).parent / "pages" / "questions",
)
README = FOLDER.parent / "README.md"
_FIGURES: list[str] = []


def notebooks() -> list[Path]:
    """Return the notebooks, in their order."""
    return sorted(FOLDER.glob("*.ipynb"))


def filled(content: str) -> str:
    """Put figures in their places, after Markdown is done."""
    return re.sub(r"<p>@figure (\d+)@</p>", lambda m: _FIGURES[int(m[1])], content)


def models() -> str:
    """Return what each checked model recovers, with a figure each."""
    parts = []
    for path in sorted(RESULTS.glob("*_check.json"), reverse=True):
        kept = json.loads(path.read_text("utf-8"))
        check, model = Readability.from_json(kept["check"]), kept["model"]
        packaged, source = PACKAGED[model["name"]], model["source"]
        best = check.settings.iloc[0]
        facts = {
            "licence": packaged.licence,
            "size": f"{model['n_layers']} layers of width {model['d_model']}, {model['dtype']}",
            "verdict": check.verdict.removeprefix(f"{model['name']}: "),
            "best setting of a first look": f"the {best['prompt']} prompt, target layer "
            f"{best['target_layer']}, source `{best['source']}`: {best['recovered']:.2f} recovered"
            f", other names' vectors {best['others']:.2f}",
            "its own words": "; ".join(f"{k}: *{v}*" for k, v in list(check.words.items())[:4]),
            "file": f"{source['file']}, SHA-256 {_hash(source['sha256'])}",
            "weights": f"fingerprint {_hash(model['fingerprint'])}",
            "measured by": _made(kept["measured"]),
        }
        head = f"| original | {source['original']}, {source['quantization']} |\n|---|---|"
        lines = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
        curve = readability_curve(check).update_layout(
            title=None, margin={"t": 30}, height=400, legend={"orientation": "h", "y": -0.2}
        )
        _FIGURES.append(notebook_pages.figure(json.loads(curve.to_json())))
        parts.append(f"### {model['name']}\n\n{head}\n{lines}\n\n@figure {len(_FIGURES) - 1}@")
    return "\n\n".join(parts)


def architectures() -> str:
    """Return the random-weight models of the tests."""
    from tests.support.tiny_models import ARCHITECTURES, tiny_hf

    rows = []
    for name in ARCHITECTURES:
        model = tiny_hf(name)
        c = model.config
        rows.append(
            f"| `{type(model).__name__}` | {c.num_hidden_layers} layers of width {c.hidden_size} |"
        )
    return "| architecture | size in the tests |\n|---|---|\n" + "\n".join(rows)


def results() -> str:
    """Return what made each stored result."""
    rows = []
    for path in sorted(RESULTS.glob("*.zip")):
        with zipfile.ZipFile(path) as file:
            kept = json.loads(file.read("provenance.json"))["provenance"]
        rows.append(
            (
                path.name,
                kept.get("measured", {"command": f"make results RESULTS={path.stem}"}),
                kept,
            )
        )
    for path in sorted(RESULTS.glob("*_check.json")):
        kept = json.loads(path.read_text("utf-8"))
        rows.append((path.name, kept["measured"], kept))
    lines = [
        f"| `{name}` | {_made(made)} | {_model(kept)} | {kept.get('created', '')[:10]} |"
        for name, made, kept in rows
    ]
    for path in sorted(RESULTS.glob("*_*.csv")):  # a table to be joined to an evaluation's
        made = {"command": f"make results RESULTS={path.stem}"}
        lines.append(f"| `{path.name}` | {_made(made)} | {path.stem.split('_')[0]} | |")
    return "| file | command and time | model | measured |\n|---|---|---|---|\n" + "\n".join(lines)


def pictures() -> str:
    """Return what drew each picture of README and site."""
    made = (
        json.loads((IMAGES / "made.json").read_text("utf-8"))
        if (IMAGES / "made.json").is_file()
        else {}
    )
    images = sorted(p for p in IMAGES.iterdir() if p.suffix in (".png", ".gif", ".webp"))
    lines = []
    for path in images:
        record = made.get(path.name, {})
        lines.append(
            f"| [`{path.name}`](images/{path.name}) | {_made(record)} | {record.get('from', '')} |"
        )
    return "| picture | command and time | from |\n|---|---|---|\n" + "\n".join(lines)


def stored_notebooks() -> str:
    """Return what ran each notebook, and how many figures it shows."""
    lines = []
    for path in notebooks():
        book = nbformat.read(path, as_version=4)
        outputs = [o for c in book.cells for o in c.get("outputs", [])]
        figures = sum(notebook_pages.PNG in o.get("data", {}) for o in outputs)
        code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
        used = [f"{name} {_hash(PACKAGED[name].sha256[:16])}" for name in PACKAGED if name in code]
        seconds = book.metadata.get("superscopes_tl", {}).get("seconds")
        made = {"command": f"make notebooks NOTEBOOKS={path.stem}", "seconds": seconds}
        name = f"[{path.stem}](notebooks/{path.stem}.md)"
        lines.append(f"| {name} | {figures} | {_made(made)} | {', '.join(used)} |")
    head = "| notebook | figures | command and time | models that it names |\n|---|---|---|---|\n"
    return head + "\n".join(lines)


def questions() -> str:
    """Return every question with the page that answers it."""
    parts = []
    for path in QUESTION_PAGES:
        text = (QUESTIONS / path).read_text("utf-8")
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        asked = re.findall(r"^## (.+?) \{#([\w-]+)\}$", text, re.MULTILINE)
        lines = "\n".join(f"- [{question}]({path}#{anchor})" for question, anchor in asked)
        parts.append(f"**{title[1] if title else path}**\n\n{lines}")
    return "\n\n".join(parts)


QUESTION_PAGES = ("first.md", "real.md", "vectors.md", "compare.md", "practical.md")


def exhibits() -> str:
    """Return the gallery: each page in a frame, with what made it."""
    parts = []
    for name, exhibit in gallery.there().items():
        with zipfile.ZipFile(RESULTS / f"{name}.zip") as file:
            kept = json.loads(file.read("provenance.json"))["provenance"]
        page = f'src="gallery/{name}.html" title="{exhibit.title}"'
        _FIGURES.append(f'<iframe class="exported" {page} loading="lazy"></iframe>')
        parts.append(
            f"## {exhibit.title}\n\n{exhibit.about}\n\n@figure {len(_FIGURES) - 1}@\n\n"
            f"[Open the page alone](gallery/{name}.html). Model: {_model(kept)}; "
            f"sweep: {_made(kept['measured'])}; page: `{exhibit.code}`."
        )
    return "\n\n".join(parts)


def numbers() -> str:
    """Return what prints the numbers of each part of README."""
    timed = re.search(r"ends with \(one run, shortened; ([^)]+?) after the set-up\)", _readme())
    rows = (
        ("Two commands", "`make demo`", timed[1] if timed else "time not recorded"),
        ("Ten lines", "the code above them", "seconds; a test runs it"),
        (
            "The paper's claims",
            "`make results`, from the stored results",
            "see above; tests recompute",
        ),
        ("Which score agrees with judged readings?", "`notebooks/judging.py`", "a test recomputes"),
        ("Models", "`superscopes check`, from the stored checks", "see above"),
        (
            "Models, speed",
            "`superscopes bench --model smollm2`, `--size gpt2`",
            "minutes; two runs",
        ),
    )
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"| part of README | command | time |\n|---|---|---|\n{lines}"


def ten_lines() -> str:
    """Return README's ten lines with what they print."""
    found = re.search(r"^## Ten lines\n(.*?)^`result\.table`", _readme(), re.DOTALL | re.MULTILINE)
    if not found:
        raise ValueError("README has no part Ten lines before `result.table`")
    return found[1].strip()


def _readme() -> str:
    return README.read_text("utf-8")


def _model(kept: dict[str, Any]) -> str:
    """Return a model's name with the hash of its weights."""
    return f"{kept['model']['name']} {_hash(kept['model']['fingerprint'])}"


def _made(record: dict[str, Any]) -> str:
    """Return a command and its time."""
    if not record:
        return "not recorded"
    seconds = record.get("seconds")
    took = "time not recorded" if seconds is None else _time(seconds)
    return f"`{record['command']}`, {took}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _hash(value: str) -> str:
    return f'<code class="hash">{html.escape(value)}</code>'


def _cell(value: str) -> str:
    return value.replace("|", r"\|").replace("\n", " ")


TABLES: dict[str, Callable[[], str]] = {
    "models": models,
    "architectures": architectures,
    "results": results,
    "pictures": pictures,
    "notebooks": stored_notebooks,
    "questions": questions,
    "exhibits": exhibits,
    "numbers": numbers,
    "ten_lines": ten_lines,
}
