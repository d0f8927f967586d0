"use strict";
// Shared by all pages: figures drawn when they come into view or the browser is idle, axis scales, image export, and safe text.
window.crosslens = (() => {
  const theme = JSON.parse(document.getElementById("theme").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)").matches;
  const specs = new Map();  // by plot
  const config = {
    // pages stay offline: newer plotly offers to upload charts
    displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
    displayModeBar: coarse ? false : "hover",
    modeBarButtonsToRemove: ["toImage", "select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  };
  const chosen = { unit: "steps", scale: "log" };
  let printing = false;

  // the figure with every light colour replaced by its dark counterpart
  function themed(value, key = "") {
    if (Array.isArray(value)) return /colorscale$|^annotations$|^shapes$/.test(key) ? value.map((part) => themed(part, key)) : value;
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

  // which ticks fit in so many pixels, and at which angle; picked from right to left
  function thinned(positions, texts, width, slanting) {
    const low = Math.min(...positions), span = Math.max(...positions) - low || 1;
    const at = positions.map((position) => ((position - low) / span) * 0.88 * width);  // the rest is padding
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

  // 1, 512, 1k, 143k, 4.2M
  function short(value) {
    for (const [size, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(4))}${suffix}`;
    }
    return String(Number(value.toPrecision(4)));
  }

  // log10 of each value, with 0 set apart on the left
  function logarithms(values) {
    const logs = values.filter((value) => value > 0).map(Math.log10);
    const low = logs.length ? Math.min(...logs) : 0, high = logs.length ? Math.max(...logs) : 0;
    const zero = low - Math.max(0.15, 0.1 * (high - low));
    return values.map((value) => (value > 0 ? Math.log10(value) : zero));
  }

  // x of each snapshot on the selected scale, and ticks that fit the width
  function along(figure, width) {
    const { meta, xaxis } = figure.layout;
    if (!meta || !xaxis || !xaxis.tickvals) return;
    if (meta.axis === "steps") {
      const unit = chosen.unit === "tokens" && meta.tokens ? "tokens" : "steps", values = meta[unit];
      const linear = chosen.scale === "linear";
      const positions = linear ? values : logarithms(values);
      const moved = new Map(meta.positions.map((position, i) => [position, positions[i]]));
      for (const trace of figure.data) if (Array.isArray(trace.x)) trace.x = trace.x.map((x) => moved.get(x) ?? null);
      const apart = values.length > 1 && values.includes(0) ? ", 0 set apart" : "";
      xaxis.title = { ...xaxis.title, text: `training ${unit}${linear ? "" : ` (log scale${apart})`}` };
      if (linear) {
        delete xaxis.tickvals;
        delete xaxis.ticktext;
        Object.assign(xaxis, { tickmode: "auto", nticks: Math.max(3, Math.floor(width / 90)) });
        return;
      }
      const full = (step) => (step < 1e6 ? String(step) : short(step));  // as in labels such as step1300
      Object.assign(xaxis, { tickvals: positions, ticktext: values.map(unit === "steps" ? full : short) });
    }
    const [kept, angle] = thinned(xaxis.tickvals, xaxis.ticktext, width, meta.axis === "labels");
    xaxis.tickvals = kept.map((i) => xaxis.tickvals[i]);
    xaxis.ticktext = kept.map((i) => xaxis.ticktext[i]);
    xaxis.tickangle = angle;
  }

  // several panels stand below each other on narrow screens
  function stacked(layout, width) {
    if (width > 600 || !layout.grid) return;
    const n = layout.grid.columns;
    layout.grid = { ...layout.grid, rows: n, columns: 1, ygap: 0.5 };
    layout.height = Math.round(layout.height * 0.7 * n);
    for (const name of Object.keys(layout)) {
      if (/^[xy]axis/.test(name)) delete layout[name].domain;
      if (/^yaxis\d/.test(name)) layout[name].title = { ...layout[name].title, text: layout[name].title.text || layout.yaxis.title.text };
    }
  }

  // shorter labels of colour bars and panels on narrow screens
  function shortened(layout, width) {
    if (width > 480) return;
    for (const name of Object.keys(layout)) {
      const part = layout[name];
      if (/^coloraxis/.test(name)) {
        const bar = part.colorbar;
        Object.assign(bar, { ticktext: bar.ticktext.map((text) => text.replace(/(, | of ).*/, "")), tickangle: 0 });
        bar.tickfont = { ...bar.tickfont, size: 10 };
      } else if (/^xaxis/.test(name) && part.domain && part.ticktext) {
        const numbers = part.ticktext.every((text) => /^step ?[\d.]+\w?$/.test(text));
        if (numbers) part.ticktext = part.ticktext.map((text) => text.replace(/^step ?/, ""));
        const room = (part.domain[1] - part.domain[0]) * width;
        if (part.ticktext.reduce((sum, text) => sum + 7 * plain(text).length, 10) > room) {
          Object.assign(part, { tickvals: part.tickvals.slice(-1), ticktext: part.ticktext.slice(-1) });
        }
        part.tickangle = 0;
      }
    }
    for (const note of layout.annotations ?? []) {
      note.text = note.text.replace(/^decoder | [/(].*/g, "");
    }
  }

  // expand the heat map's tooltips, which the page stores by row and column
  function spread(figure) {
    const { meta } = figure.layout;
    if (!meta || !meta.rows) return;
    figure.data[0].customdata = meta.rows.map((row) => meta.columns.map(() => row));
    figure.data[0].text = meta.names.map((name) => meta.columns.map((column) => `${name}<br>${column}`));
  }

  // the width of a figure; on paper that of a page, on which what is wider would be cut off
  const wide = (plot) => Math.min(plot.clientWidth, printing ? 670 : Infinity);

  // the figure for this window, with axes so many pixels wide
  function prepared(plot, width) {
    const figure = structuredClone(specs.get(plot));
    spread(figure);
    stacked(figure.layout, wide(plot));
    along(figure, width);
    shortened(figure.layout, width);
    if (coarse) figure.layout.dragmode = false;  // a finger on a figure scrolls the page
    figure.layout.width = wide(plot);
    // a ternary plot is about as high as it is wide
    if (figure.layout.ternary) figure.layout.height = Math.min(figure.layout.height, Math.round(0.87 * wide(plot)) + 20);
    return dark.matches && !printing ? { data: figure.data.map((trace) => themed(trace)), layout: themed(figure.layout) } : figure;
  }

  // at once, since a page that is about to be printed waits for nothing: plotly has drawn when `react` returns
  function draw(plot) {
    stale.delete(plot);
    try {
      let figure = prepared(plot, wide(plot) - 90);
      Plotly.react(plot, figure.data, figure.layout, config);
      // with margins and legend laid out: ticks for the remaining width, and height for the legend's rows
      const area = plot.querySelector(".nsewdrag"), legend = plot.querySelector(".legend .bg");
      const [left, right] = figure.layout.xaxis?.domain ?? [0, 1];  // the first of several panels
      figure = prepared(plot, area ? area.getBBox().width / (right - left) : wide(plot) - 90);
      figure.layout.height += legend ? Math.ceil(legend.getBBox().height) : 0;
      Plotly.react(plot, figure.data, figure.layout, config);
      if (!linked.has(plot)) plot.on("plotly_click", openFeature);
      linked.add(plot);
      plot.style.minHeight = `${figure.layout.height}px`;
    } catch (error) {
      plot.textContent = "This figure could not be drawn. Its numbers are in the CSV file.";
      console.error(error);
    }
  }

  // a click on a feature or a task opens its page
  const linked = new WeakSet();
  function openFeature({ points: [{ data, customdata }] }) {
    const feature = data.meta === "features" ? [customdata].flat()[0] : data.meta?.feature;
    const page = feature === undefined ? data.meta?.page : `feature.html#${feature}`;
    if (page) location.href = page;
  }

  // figures are drawn one at a time: first those in view or close to it, then the others while nothing else is to be done,
  // so that printing, or a picture of the whole page, finds them drawn
  const stale = new Set(), near = new Set();
  const idle = window.requestIdleCallback ?? ((next) => setTimeout(next, 200));
  let running = false, resting = false;
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) near[entry.isIntersecting ? "add" : "delete"](entry.target);
    drawNear();
  }, { rootMargin: "600px 0px" });
  const next = (among) => [...stale].find((plot) => (!among || among.has(plot)) && plot.clientWidth > 0);

  async function drawNear() {
    if (running || !window.Plotly) return;
    running = true;
    delete document.documentElement.dataset.figures;
    for (let plot; (plot = next(near)); ) {
      draw(plot);
      await new Promise((done) => setTimeout(done, 0));
    }
    running = false;
    document.documentElement.dataset.figures = "drawn";
    drawRest();
  }

  function drawRest() {
    if (resting || !next()) return;
    resting = true;
    idle(() => {
      resting = false;
      const plot = next();
      if (plot && !running) draw(plot);
      drawRest();
    });
  }

  function redraw() {
    for (const plot of specs.keys()) stale.add(plot);
    drawNear();
  }

  function drawAll() {
    if (window.Plotly) for (const plot of specs.keys()) if (plot.clientWidth > 0) draw(plot);
  }

  // show the switches that have an effect
  function offer() {
    const steps = [...specs.values()].map((spec) => spec.layout.meta).filter((meta) => meta && meta.axis === "steps");
    document.getElementById("switches").hidden = !steps.length;
    document.getElementById("unit").hidden = !steps.some((meta) => meta.tokens);
  }

  // draw a figure, or replace it
  function show(plot, spec) {
    specs.set(plot, spec);
    stale.add(plot);
    watcher.observe(plot);
    offer();
    drawNear();
  }

  // the page can be read while plotly, which is large, is loading
  function await_(script) {
    if (window.Plotly) return drawNear();
    script.addEventListener("load", drawNear);
    script.addEventListener("error", () => {
      for (const plot of specs.keys()) plot.textContent = "assets/plotly.min.js was not found next to this page, so the figure cannot be drawn.";
    });
  }

  const spec = (plot) => JSON.parse(document.getElementById(plot.dataset.spec).textContent);

  async function picture(button) {
    const figure = button.closest("figure"), plot = figure.querySelector(".plot");
    if (stale.has(plot)) draw(plot);
    const paper = getComputedStyle(document.body).backgroundColor;
    const layout = { ...plot.layout, paper_bgcolor: paper, plot_bgcolor: paper };
    const format = button.dataset.picture, filename = figure.dataset.file || figure.id.replace(/^figure-/, "");
    const size = { width: plot.clientWidth, height: plot.layout.height };
    await Plotly.downloadImage({ data: plot.data, layout }, { format, filename, ...size, scale: format === "png" ? 2 : 1 });
    say(`Saved ${filename}.${format}.`);
  }

  // rows of cells as a CSV file
  function save(filename, rows) {
    const cell = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
    const text = rows.map((row) => row.map((value) => cell(String(value ?? ""))).join(",")).join("\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text, "\n"], { type: "text/csv;charset=utf-8" }));
    link.download = filename;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    say(`Saved ${filename}.`);
  }

  const say = (words) => { document.getElementById("said").textContent = words; };

  // invisible and direction-changing characters, by name
  function visible(text) {
    const names = { "\n": "↵", "\r": "␍", "\t": "⇥", "\u007f": "␡" };
    return text.replace(/[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, (character) => {
      const code = character.codePointAt(0);
      if (Object.hasOwn(names, character)) return names[character];
      return code < 32 ? String.fromCodePoint(0x2400 + code) : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
    });
  }

  // the bytes of a token that is written in the byte alphabet of GPT-2 or as <0xE2>; null for other tokens
  const byteOf = new Map();
  for (let byte = 0, above = 256; byte < 256; byte++) {
    const shown = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    byteOf.set(String.fromCharCode(shown ? byte : above++), byte);
  }
  function bytes(token) {
    const named = /^<0x([0-9A-F]{2})>$/.exec(token);
    const found = named ? [parseInt(named[1], 16)] : [...token].map((character) => byteOf.get(character));
    return found.length && !found.includes(undefined) ? found : null;
  }

  function decoded(found) {
    try {
      return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(found));
    } catch {
      return null;
    }
  }

  // tokens as [first, how many, text]: those whose bytes are characters only together are one
  function joined(tokens) {
    const pieces = [];
    for (let first = 0, n; first < tokens.length; first += n) {
      let text = tokens[first], sum = bytes(text);
      n = 1;
      for (let last = first; sum && last < tokens.length && last < first + 6; last++) {
        const next = last > first ? bytes(tokens[last]) : [];
        if (!next) break;
        sum = [...sum, ...next];
        const whole = decoded(sum);
        if (whole === null) continue;
        if (last > first) [n, text] = [last - first + 1, whole];
        break;
      }
      pieces.push([first, n, text]);
    }
    return pieces;
  }

  // an element with text, attributes and style properties
  function element(tag, { text, style, ...attributes } = {}, children = []) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    for (const [name, value] of Object.entries(style ?? {})) made.style.setProperty(name, value);
    if (text !== undefined) made.textContent = text;
    made.append(...children);
    return made;
  }

  document.addEventListener("keydown", (event) => {
    const link = document.getElementById({ ArrowLeft: "before", ArrowRight: "after" }[event.key]);
    if (!(event.key === "/" || link?.href) || event.ctrlKey || event.metaKey || event.altKey || typing(event)) return;
    if (link && event.shiftKey) return;  // selects text; some keyboards need it for "/"
    event.preventDefault();
    const search = document.getElementById("search");
    if (link) link.click();
    else if (search) search.focus();
    else location.href = "features.html#focus=1";
  });
  // whether a key belongs to the element that has the focus
  const typing = ({ target }) => target.matches("input, select, textarea, summary");

  // a text with a word tinted by its effect, from -1 to 1
  function word(text, weight, title) {
    return element("bdi", { class: `token ${weight < 0 ? "down" : "up"}`, style: { "--w": Math.abs(weight).toFixed(3) }, text: visible(text), title });
  }

  // next tokens with their probabilities
  function following(heading, words, tokens) {
    return element("span", { class: "answers next" }, [heading, ...tokens.map(([token, p]) => element("span", {}, [
      element("bdi", { class: "chip up", style: { "--w": p.toFixed(3) }, text: visible(words[token]) }), ` ${(100 * p).toFixed(p < .1 ? 1 : 0)}%`]))]);
  }

  // effects of features at every snapshot, by the snapshot from which they matter
  function through(rows, labels, names, s, text) {
    const head = element("thead", {}, [element("tr", {}, ["matters from", "feature", "effect by snapshot", "strongest on", "readable", `at ${labels[s]}`].map((name) => element("th", { scope: "col", text: name })))]);
    const body = element("tbody", {}, rows.map(({ feature, on, matters, readable, effects, later }, i) => {
      const most = Math.max(...effects.map(Math.abs));
      const strip = element("span", { class: "strip", style: { "--n": labels.length } }, effects.map((effect, at) => element("i", {
        class: [effect < 0 ? "below" : "", at === s ? "now" : ""].join(" "), style: { "--w": (Math.abs(effect) / most).toFixed(3) },
        title: `${effect > 0 ? "+" : ""}${effect}${later[at] ? "†" : ""} logits at ${labels[at]}` })));
      return element("tr", {}, [
        element("td", { text: i && rows[i - 1].matters === matters ? "" : matters ?? "–" }),
        element("th", { scope: "row" }, [element("a", { href: `feature.html#${feature}`, text: visible(names[feature] ?? String(feature)) })]),
        element("td", {}, [strip]),
        element("td", {}, [element("bdi", { class: "chip", text: visible(on) })]),
        element("td", { text: readable ?? "–" }),
        element("td", { class: "number", text: `${effects[s] > 0 ? "+" : ""}${effects[s]}${later[s] ? "†" : ""}` }),
      ]);
    }));
    return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Effects in ${visible(text)}` }, [element("table", { class: "through" }, [head, body])]);
  }

  // prompts, whose words are tinted by their effects at the selected snapshot
  for (const place of document.querySelectorAll(".prompts")) {
    const { labels, words, names, largest, prompts } = JSON.parse(document.getElementById(place.dataset.spec).textContent);
    const slider = place.querySelector("input");
    const show = () => {
      const s = Number(slider.value);
      place.querySelector("output").textContent = labels[s];
      slider.setAttribute("aria-valuetext", labels[s]);
      place.querySelector("ol").replaceChildren(...prompts.map(({ id, tokens, effects, features, answers: [correct, wrong], ...traced }) => element("li", {}, [
        element("span", { class: "where", text: `prompt ${id}` }),
        element("span", { class: "text", dir: "auto" }, tokens.map((token, t) => {
          const effect = effects[s][t], feature = features[s][t];
          const told = feature < 0 ? "no feature" : `feature ${visible(names[feature] ?? String(feature))}`;
          const made = word(words[token], Math.sign(effect) * Math.sqrt(Math.abs(effect) / largest), `${effect > 0 ? "+" : ""}${effect} logits, most by ${told}${traced.fires?.[t].length ? `; fires: ${traced.fires[t].map(([f, value]) => `${visible(names[f] ?? String(f))} (${value})`).join(", ")}` : ""}`);
          return feature < 0 ? made : element("a", { href: `feature.html#${feature}` }, [made]);
        })),
        ...(correct === undefined ? [] : [element("span", { class: "answers" }, [["correct", correct], ["wrong", wrong]].map(([kind, text]) =>
          element("span", {}, [`${kind}: `, element("bdi", { class: "chip", text: visible(text) })])))]),
        ...(traced.next === undefined ? [] : [
          element("span", { class: "answers", text: `logit difference ${traced.metric[s]}${traced.pairedMetric ? `; after the other prompt ${traced.pairedMetric[s]}` : ""}${traced.chosen ? " (answers of the last snapshot)" : ""}` }),
          following("next: ", words, traced.next[s]),
          ...(traced.paired === undefined ? [] : [
            element("span", { class: "answers" }, ["against: ", element("bdi", { text: visible(traced.paired) })]),
            following("next there: ", words, traced.pairedNext[s]),
          ]),
          through(traced.map, labels, names, s, traced.text),
        ]),
      ])));
    };
    slider.oninput = show;
    show();
  }

  for (const plot of document.querySelectorAll(".plot")) if (!plot.closest("[data-later]")) show(plot, spec(plot));
  if (!specs.size) document.documentElement.dataset.figures = "drawn";
  // the URL holds the page's state, so a jump must not change it
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    document.getElementById("main").focus();
  });
  document.getElementById("switches").addEventListener("change", (event) => {
    chosen[event.target.name] = event.target.value;
    redraw();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-picture]");
    if (button) picture(button);
  });
  dark.addEventListener("change", redraw);
  let width = window.innerWidth, timer = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;  // phones show and hide the address bar
    width = window.innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 150);
  });
  window.addEventListener("beforeprint", () => { printing = true; drawAll(); });
  window.addEventListener("afterprint", () => { printing = false; redraw(); });
  return { await: await_, element, joined, save, say, show, spec, visible };
})();
