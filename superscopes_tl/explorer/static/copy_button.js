// A button that copies the model's text to the clipboard.
function render({ model, el }) {
  const button = document.createElement("button");
  button.className = "jupyter-button widget-button";
  button.textContent = "Copy as Python";
  button.title = "Copy code that reads exactly this cell";
  const status = document.createElement("span");
  status.setAttribute("role", "status");
  status.style.marginLeft = "6px";
  button.addEventListener("click", async () => {
    const text = model.get("text");
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    status.textContent = "copied";
    setTimeout(() => { status.textContent = ""; }, 2000);
  });
  const update = () => { button.disabled = !model.get("text"); };
  model.on("change:text", update);
  update();
  el.append(button, status);
}
export default { render };
