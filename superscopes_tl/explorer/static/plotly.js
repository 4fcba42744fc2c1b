// Starts at once and loads plotly's own script, which is large, once per page for all figures.
// Model and view of one figure share what that script's factory made for it.
const messages = [
  "addTraces", "deleteTraces", "moveTraces", "restyle", "relayout", "update", "animate",
  "removeLayoutProps", "removeTraceProps",
].map((name) => `_py2js_${name}`);
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
  let figure, added, remove;
  async function begin(model) {
    // A change comes as a message that is null again a moment later: those that arrive before
    // plotly does are kept, and delivered in order.
    const missed = [];
    const keepers = messages.map((name) => [`change:${name}`, () => {
      const message = model.get(name);
      if (message) missed.push([name, message]);
    }]);
    for (const [event, keep] of keepers) model.on(event, keep);
    const page = Symbol.for(`superscopes_tl.plotly ${model.get("_version")}`);
    globalThis[page] ??= load(model.get("_script")).catch((error) => {
      delete globalThis[page];  // the next figure tries again
      throw error;
    });
    const loaded = await globalThis[page];
    const widget = typeof loaded === "function" ? await loaded() : loaded;
    remove = (listeners) => listeners.forEach(([event, listener]) => model.off(event, listener));
    const recorded = Object.assign(Object.create(model), {
      on(event, listener) { added?.push([event, listener]); model.on(event, listener); },
    });
    await widget.initialize?.({ model: recorded });
    remove(keepers);
    for (const [name, message] of missed) {
      model.set(name, message);
      model.set(name, null);
    }
    return widget;
  }
  return {
    initialize({ model }) { figure = begin(model); },
    async render(context) {
      const widget = await figure;
      if (context.signal?.aborted) return;  // taken off the page meanwhile
      // Plotly leaves a view's listeners behind, and they would break those of the next view.
      const own = added = [];
      let end;
      try {
        end = widget.render(context);
      } finally {
        added = undefined;
      }
      return () => { remove(own); end?.(); };
    },
  };
};
