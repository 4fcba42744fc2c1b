// Names the sliders' handles for screen readers, and makes plotly measure its room again when a
// figure or the Explorer's width is new: plotly does so only when the window changes.
function name(root) {
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
