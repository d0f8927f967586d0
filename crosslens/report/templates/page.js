"use strict";
(() => {
  const theme = JSON.parse(document.getElementById("theme").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)").matches;
  const plots = [...document.querySelectorAll(".plot")];
  const specs = new Map(plots.map((plot) => [plot, JSON.parse(document.getElementById(plot.dataset.spec).textContent)]));
  const config = {
    // nothing on the page may lead to a network: newer plotly offers to upload charts
    displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
    displayModeBar: coarse ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  };
  let scale = "log";
  let printing = false;

  // the figure with each colour of the light page replaced by its counterpart on the dark one
  function themed(value, key = "") {
    if (Array.isArray(value)) return /colorscale$/.test(key) ? value.map((part) => themed(part, key)) : value;
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, themed(part, name)]));
    }
    return typeof value === "string" && /color(scale)?$/.test(key) && Object.hasOwn(theme, value) ? theme[value] : value;
  }

  function plain(text) {
    const holder = document.createElement("textarea");
    holder.innerHTML = text;
    return holder.value;
  }

  // which ticks can be read side by side on so many pixels, and at which angle: the last first, then from the right
  function thinned(positions, texts, width, slanting) {
    const low = Math.min(...positions), span = Math.max(...positions) - low || 1;
    const at = positions.map((position) => ((position - low) / span) * 0.88 * width);  // the rest is before and after
    const sizes = texts.map((text) => 7.2 * plain(text).length + 10);
    const fits = (i, j, slanted) => at[j] - at[i] >= (slanted ? 20 : (sizes[i] + sizes[j]) / 2);
    const order = positions.map((_, i) => i).sort((a, b) => positions[a] - positions[b]);
    const keep = (slanted) => {
      const kept = [order[order.length - 1]];
      for (const i of order.slice(0, -1).reverse()) {
        if (fits(i, kept[kept.length - 1], slanted)) kept.push(i);
      }
      return kept.reverse();
    };
    const level = keep(false);
    return slanting && level.length < positions.length ? [keep(true), -45] : [level, 0];
  }

  // x of each snapshot on the chosen scale, and ticks that fit the width
  function along(figure, width) {
    const { meta, xaxis } = figure.layout;
    if (!meta || !xaxis || !xaxis.tickvals) return;
    if (meta.axis === "steps" && scale === "linear") {
      const step = new Map(meta.positions.map((position, i) => [position, meta.steps[i]]));
      for (const trace of figure.data) if (Array.isArray(trace.x)) trace.x = trace.x.map((x) => step.get(x) ?? null);
      delete xaxis.tickvals;
      delete xaxis.ticktext;
      Object.assign(xaxis, { tickmode: "auto", nticks: Math.max(3, Math.floor(width / 90)), title: { ...xaxis.title, text: "training steps" } });
      return;
    }
    const [kept, angle] = thinned(xaxis.tickvals, xaxis.ticktext, width, meta.axis === "labels");
    xaxis.tickvals = kept.map((i) => xaxis.tickvals[i]);
    xaxis.ticktext = kept.map((i) => xaxis.ticktext[i]);
    xaxis.tickangle = angle;
  }

  // the heat map's hover texts, which are the same along rows and columns and so are not in the page
  function spread(figure) {
    const { meta } = figure.layout;
    if (!meta || !meta.rows) return;
    figure.data[0].customdata = meta.rows.map((row) => meta.columns.map(() => row));
    figure.data[0].text = meta.rows.map(() => meta.columns);
  }

  // the figure for this window, its axes on so many pixels
  function prepared(plot, width) {
    const figure = structuredClone(specs.get(plot));
    spread(figure);
    along(figure, width);
    if (coarse) figure.layout.dragmode = false;  // a finger on a figure scrolls the page
    figure.layout.width = plot.clientWidth;
    // a triangle is about as high as it is wide
    if (figure.layout.ternary) figure.layout.height = Math.min(figure.layout.height, Math.round(0.87 * plot.clientWidth) + 20);
    return dark.matches && !printing ? { data: figure.data.map((trace) => themed(trace)), layout: themed(figure.layout) } : figure;
  }

  async function draw(plot) {
    let figure = prepared(plot, plot.clientWidth - 90);
    await Plotly.react(plot, figure.data, figure.layout, config);
    // now that margins and legend have been laid out: ticks for the width that is left, and room for the legend's rows
    const area = plot.querySelector(".nsewdrag"), legend = plot.querySelector(".legend .bg");
    figure = prepared(plot, area ? area.getBBox().width : plot.clientWidth - 90);
    figure.layout.height += legend ? Math.ceil(legend.getBBox().height) : 0;
    await Plotly.react(plot, figure.data, figure.layout, config);
    plot.style.minHeight = `${figure.layout.height}px`;
  }

  async function drawAll(pause = true) {
    for (const plot of plots) {
      try {
        await draw(plot);
      } catch (error) {
        plot.textContent = "This figure could not be drawn; its numbers are in the CSV file.";
        console.error(error);
      }
      if (pause) await new Promise((done) => setTimeout(done, 0));
    }
    document.documentElement.dataset.figures = "drawn";
  }

  // one pass at a time; a change during a pass asks for another
  let running = null, again = false;
  function redraw() {
    if (running) { again = true; return; }
    running = drawAll().finally(() => {
      running = null;
      if (again) { again = false; redraw(); }
    });
  }

  if (!window.Plotly) {
    for (const plot of plots) plot.textContent = "plotly.min.js was not found beside this page, so the figure cannot be drawn.";
    return;
  }
  const switches = document.getElementById("scale");
  switches.hidden = ![...specs.values()].some((spec) => spec.layout.meta && spec.layout.meta.axis === "steps");
  switches.addEventListener("change", (event) => { scale = event.target.value; redraw(); });
  dark.addEventListener("change", redraw);
  let width = window.innerWidth, timer = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;  // a phone's address bar comes and goes
    width = window.innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 150);
  });
  window.addEventListener("beforeprint", () => { printing = true; drawAll(false); });
  window.addEventListener("afterprint", () => { printing = false; redraw(); });
  redraw();
})();
