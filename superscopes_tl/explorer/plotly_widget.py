"""Plotly's widget, loaded once per page instead of once per figure.

1. Plotly's own `FigureWidget` sends its script of 5 MB with every figure, and a page imports it
   for every figure: seconds each on a slow machine, and anywidget gives up a widget that takes
   longer than two seconds to begin.
2. `SharedFigureWidget` sends the same script compressed, beside a short one that begins at once.
3. The short one unpacks and imports the long one when the page learns of the first figure; all
   figures of the page, of the same plotly, wait for that one import.
4. What Python changes meanwhile is kept and done when the long one is there.
5. When a view of a figure is taken off the page, so is what it listens to: plotly leaves it, and
   the next view would never hear of a change because the old one fails at it.

In Python it is a `FigureWidget`.
"""

from __future__ import annotations

import gzip
from functools import cache
from importlib.resources import files

import plotly
import traitlets
from plotly.graph_objects import FigureWidget  # here, not at the first display: it is slow

# Model and view of one figure share what the long script's factory made for it. Plotly's model
# hears of a change as a message, which is null again a moment later: those that come before there
# is a model are noted and handed to it, in their order.
_BEGIN = """
const messages = [
  "addTraces", "deleteTraces", "moveTraces", "restyle", "relayout", "update", "animate",
  "removeLayoutProps", "removeTraceProps",
].map((name) => `_py2js_${name}`);
const page = Symbol.for("superscopes_tl.plotly VERSION");
function unpacked(packed) {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}
async function load(packed) {
  const script = new Blob([await unpacked(packed)], { type: "text/javascript" });
  const url = URL.createObjectURL(script);
  try {
    return (await import(url)).default;
  } finally {
    URL.revokeObjectURL(url);
  }
}
export default () => {
  let figure, heard, forget;
  async function begin(model) {
    const missed = [];
    const notes = messages.map((name) => [`change:${name}`, () => {
      const message = model.get(name);
      if (message) missed.push([name, message]);
    }]);
    for (const [event, note] of notes) model.on(event, note);
    globalThis[page] ??= load(model.get("_script")).catch((error) => {
      delete globalThis[page];  // the next figure tries again
      throw error;
    });
    const found = await globalThis[page];
    const made = typeof found === "function" ? await found() : found;
    forget = (listeners) => listeners.forEach(([event, listener]) => model.off(event, listener));
    const listened = Object.assign(Object.create(model), {
      on(event, listener) { heard?.push([event, listener]); model.on(event, listener); },
    });
    await made.initialize?.({ model: listened });
    forget(notes);
    for (const [name, message] of missed) {
      model.set(name, message);
      model.set(name, null);
    }
    return made;
  }
  return {
    initialize({ model }) { figure = begin(model); },
    async render(context) {
      const made = await figure;
      if (context.signal?.aborted) return;  // taken off the page meanwhile
      const own = heard = [];
      let end;
      try {
        end = made.render(context);
      } finally {
        heard = undefined;
      }
      return () => { forget(own); end?.(); };
    },
  };
};
""".replace("VERSION", plotly.__version__)


@cache
def packed_script() -> bytes:
    """Return plotly's script for widgets, compressed with gzip; the same bytes every time."""
    script = files("plotly").joinpath("package_data", "widgetbundle.js").read_bytes()
    return gzip.compress(script, compresslevel=6, mtime=0)


class SharedFigureWidget(FigureWidget):  # type: ignore[misc]  # plotly's widgets are untyped
    """A plotly figure as a widget, quick to begin on the page."""

    _esm = _BEGIN
    _script = traitlets.Bytes().tag(sync=True)

    @traitlets.default("_script")  # type: ignore[untyped-decorator]  # traitlets is untyped
    def _packed(self) -> bytes:
        return packed_script()
