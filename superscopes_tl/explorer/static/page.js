// Names the sliders' handles for screen readers; lets arrow keys move the map's selection, and a
// right-to-left prompt's tokens run that way; and makes plotly measure its room again when a
// figure or the Explorer's width is new: plotly does so only when the window changes.
const keys = "Map. Up and down change the layer, left and right α, page up and down the kind.";
function move(root, event) {
  const by = { PageUp: -1, PageDown: 1 }[event.key];
  const axis = { ArrowUp: "Layer", ArrowDown: "Layer", ArrowLeft: "α", ArrowRight: "α" }[event.key];
  if (by) {
    const kind = root.querySelector(".ssx-panel select");
    const last = kind.options.length - 1;
    kind.selectedIndex = Math.max(0, Math.min(last, kind.selectedIndex + by));
    kind.dispatchEvent(new Event("change", { bubbles: true }));
  } else if (axis) {
    const slider = root.querySelector(`.ssx-panel [role=slider][aria-label='${axis}']`);
    slider?.dispatchEvent(new KeyboardEvent("keydown", { key: event.key }));
  } else return;
  event.preventDefault();
}
// A list's keys are the browser's own: kept from the notebook, which would go to its next cell.
const list = (event) => { if (event.target.matches?.(".ssx select")) event.stopPropagation(); };
function name(root) {
  addEventListener("keydown", list, true);  // once: the same function is added but once
  root.dataset.lmSuppressShortcuts = "true";  // no key in here is a shortcut of JupyterLab
  const map = root.querySelector(".ssx-map");
  if (map && !map.hasAttribute("tabindex")) {
    map.tabIndex = 0;
    map.setAttribute("role", "application");
    map.setAttribute("aria-label", keys);
    map.addEventListener("keydown", (event) => { if (event.target === map) move(root, event); });
  }
  const tokens = root.querySelector(".ssx-tokens > div");
  if (tokens) {
    tokens.dir = "auto";
    // The BOS is written in Latin letters, whatever comes after it.
    if (tokens.closest(".ssx-bos")) tokens.querySelector("button")?.setAttribute("dir", "ltr");
  }
  for (const slider of root.querySelectorAll(".widget-slider")) {
    const label = slider.querySelector(".widget-label")?.textContent ?? "";
    const handles = [...slider.querySelectorAll("[role=slider]")];
    const names = handles.length > 1 ? [`${label}, first`, `${label}, last`] : [label];
    handles.forEach((handle, i) => handle.setAttribute("aria-label", names[i]));
    const readout = slider.querySelector("[contenteditable=true]");
    if (readout) {
      readout.setAttribute("role", "textbox");
      readout.setAttribute("aria-label", label);
    }
  }
}
function render({ el }) {
  el.style.display = "none";
  const fit = () => requestAnimationFrame(() => window.dispatchEvent(new Event("resize")));
  requestAnimationFrame(() => {
    const root = el.closest(".ssx");
    if (!root) return;
    name(root);
    new ResizeObserver(fit).observe(root);
    new MutationObserver((changes) => {
      name(root);
      const drawn = (node) => node.nodeType === 1
        && (node.matches(".svg-container") || node.querySelector(".svg-container"));
      if (changes.some((change) => [...change.addedNodes].some(drawn))) fit();
    }).observe(root, { childList: true, subtree: true });
  });
}
export default { render };
