// A figure shows its picture until it is in sight; then plotly.js, which lies beside this file,
// draws it. Without scripts the picture stays.
(() => {
  const here = new URL(".", document.currentScript.src);
  let library;
  const plotly = () =>
    (library ??= new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = new URL("plotly.min.js", here).href;
      script.onload = () => done(window.Plotly);
      script.onerror = failed;
      document.head.append(script);
    }));
  const draw = async (box) => {
    const { data, layout } = JSON.parse(box.querySelector("script").textContent);
    const target = document.createElement("div");
    const picture = box.querySelector("img");
    try {
      const { newPlot } = await plotly();
      box.append(target);
      await newPlot(target, data, layout, { displaylogo: false, responsive: true });
      picture?.remove();
    } catch (error) {
      target.remove();
      console.warn("The figure stays a picture:", error);
    }
  };
  const seen = new IntersectionObserver(
    (entries) =>
      entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => {
        seen.unobserve(target);
        draw(target);
      }),
    { rootMargin: "200px" },
  );
  document.addEventListener("DOMContentLoaded", () =>
    document.querySelectorAll(".figure[data-plotly]").forEach((box) => seen.observe(box)),
  );
})();
