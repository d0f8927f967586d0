"use strict";
// One feature, by the number in the URL. Its data come from the script of its shard.
(() => {
  const { element, joined, save, visible } = crosslens;
  const byId = (id) => document.getElementById(id);
  const about = JSON.parse(byId("about").textContent), S = about.labels.length;
  const report = document.title;
  const waiting = new Map(), loaded = new Map();
  let feature, words;

  // ------------------------------------------------------------------ loading
  crosslens.load = (shard, data) => {
    loaded.set(shard, data);
    if (loaded.size > 4) loaded.delete(loaded.keys().next().value);
    waiting.get(shard)?.resolve(data);
  };

  function fetchShard(shard) {
    if (loaded.has(shard)) return Promise.resolve(loaded.get(shard));
    if (!waiting.has(shard)) {
      const waited = {};
      waited.promise = new Promise((resolve, reject) => Object.assign(waited, { resolve, reject }));
      waiting.set(shard, waited);
      const script = element("script", { src: `data/features-${String(shard).padStart(5, "0")}.js` });
      script.addEventListener("error", () => waited.reject(new Error(`${script.getAttribute("src")} was not found`)));
      script.addEventListener("load", () => script.remove());
      document.body.append(script);
      waited.promise.catch(() => {}).finally(() => waiting.delete(shard));
    }
    return waiting.get(shard).promise;
  }

  async function open() {
    const asked = location.hash.slice(1) || String(about.first);
    const id = /^\d{1,9}$/.test(asked) ? Number(asked) : -1;
    byId("feature").hidden = true;
    byId("label").textContent = "";
    byId("judged").textContent = "";
    byId("name").textContent = id < 0 ? "Feature" : `Feature ${id}`;
    try {
      if (id < 0) throw new Error(`“${visible(decodeURIComponent(asked))}” is not a feature number`);
      steps(id);
      if (id < about.first || id > about.last) throw new Error(`There is no feature ${id}`);
      const data = await fetchShard(Math.floor(id / about.shard));
      if (byId("name").textContent !== `Feature ${id}`) return;  // another feature was requested meanwhile
      feature = data.features.find((one) => one.id === id);
      words = data.words;
      if (!feature) throw new Error(`There is no feature ${id}`);
    } catch (error) {
      byId("trouble").textContent = `${error.message}. Features are numbered ${about.first} to ${about.last}.`;
      byId("trouble").hidden = false;
      return;
    }
    byId("trouble").hidden = true;
    byId("feature").hidden = false;
    document.title = `${byId("name").textContent}${feature.name ? `: ${visible(feature.name)}` : ""} · ${report.replace(/^Feature · /, "")}`;
    describe();
    begins();
    presence();
    effects();
    bars("read", feature.read && { x: feature.read.map((_, s) => s), y: feature.read }, "It is unknown for this feature.");
    bars("rates", histogram(), "The feature is active on no held-out token.");
    examples();
    lens();
    select(start());
    nearest();
    seeds();
    crosslens.say(`Showing ${byId("name").textContent}.`);
  }

  function steps(id) {
    for (const [name, other] of [["before", id - 1], ["after", id + 1]]) {
      const there = other >= about.first && other <= about.last, place = byId(name);
      if (there) place.href = `#${other}`;
      else place.removeAttribute("href");
    }
    byId("number").value = id;
  }

  // ------------------------------------------------------------------ parts
  function part(name, shown, reason) {
    const place = byId(name), words_ = place.parentElement.querySelector("[data-missing]");
    place.hidden = !shown;
    words_.hidden = shown;
    words_.textContent = shown ? "" : words_.dataset.missing || reason;
    for (const filled of place.querySelectorAll("ol, tbody")) filled.replaceChildren();
    return shown;
  }

  function describe() {
    const label = (snapshot) => (snapshot === null ? null : about.labels[snapshot]);
    const facts = [
      ["class", feature.kind],
      ["complexity (1 to 5)", feature.complexity],
      ["born at", label(feature.birth)],
      ["peak at", label(feature.peak)],
      ["disappears at", label(feature.death)],
      ["snapshots present", feature.lifetime === null ? null : `${feature.lifetime} of ${S}`],
      ["largest R²", feature.r2 ? Math.max(...feature.r2).toFixed(2) : null],
      ["seeds that have it", feature.seeds && `${feature.seeds.n} of ${feature.seeds.of}`],
      ["active on held-out tokens", feature.rate === null ? null : `${Number((100 * feature.rate).toPrecision(3))}%`],
    ].filter(([, value]) => value);
    byId("label").textContent = feature.name ? visible(feature.name) : "";
    if (!feature.name && feature.top) byId("label").replaceChildren("most active at ", element("bdi", { class: "chip", text: visible(feature.top) }));
    byId("judged").textContent = feature.judged ? visible(feature.judged) : "";
    byId("judged").hidden = !feature.judged;
    byId("facts").replaceChildren(...facts.map(([name, value]) => element("div", {}, [element("dt", { text: name }), element("dd", { text: value })])));
    byId("facts").hidden = !facts.length;
    for (const { id } of document.querySelectorAll("#feature figure")) byId(id).dataset.file = `feature-${feature.id}-${id.slice(7)}`;
  }

  // the dates of the feature: a row per task, a mark per date in the column of its snapshot
  function begins() {
    if (!part("dates", feature.dates !== null, "No task dates this feature: it has no large effect, and tells no paired prompts apart.")) return;
    const end = (s) => about.labels[s] ?? "never";
    const said = (kind, [at, low, high]) => `${about.dates[kind]}: ${about.labels[at]}${low === high ? "" : ` (95% interval ${end(low)} to ${end(high)})`}`;
    const cell = (task, dates, s) => element("td", {}, dates.flatMap((date, kind) => date?.[0] !== s ? [] : [
      element("i", { class: `date d${kind}`, role: "img", title: said(kind, date), "aria-label": said(kind, date) }),
    ]));
    const heads = about.labels.map((label) => element("th", { scope: "col", text: label }));
    byId("dates").querySelector("thead").replaceChildren(element("tr", {}, [element("th", { scope: "col", text: "task" }), ...heads]));
    byId("dates").querySelector("tbody").replaceChildren(...feature.dates.map(([task, dates]) => element("tr", {}, [
      element("th", { scope: "row", text: task }), ...about.labels.map((_, s) => cell(task, dates, s)),
    ])));
  }

  // the measures of presence, in the order of the figure's lines
  const measures = () => [["r2", feature.r2], ["within", feature.within], ["norm", feature.norms]];

  function presence() {
    const plot = byId("figure-presence").querySelector(".plot"), spec = crosslens.spec(plot);
    const lines = measures().map(([, values], i) => {
      if (!values) return null;
      const largest = Math.max(...values, 1e-30);
      return { ...spec.data[i], y: values.map((value) => value / largest) };
    });
    crosslens.show(plot, { ...spec, data: [...lines.filter(Boolean), ...spec.data.slice(3)] });
  }

  function effects() {
    const figure = byId("figure-effects"), plot = figure.querySelector(".plot"), missing = figure.querySelector("[data-missing]");
    const there = feature.effects.length > 0;
    for (const one of figure.querySelectorAll(".plot, figcaption")) one.hidden = !there;
    missing.hidden = there;
    missing.textContent = missing.dataset.missing || "The feature is active on no prompt of the attributed tasks.";
    if (!there) return;
    const spec = crosslens.spec(plot), traces = [];
    for (const [task, ie, se] of feature.effects) {
      const [band, line] = spec.data.slice(2 * task, 2 * task + 2);
      line.y = ie;
      if (ie.every((value, s) => value !== null && se[s] !== null)) {
        const low = ie.map((value, s) => value - 2 * se[s]), high = ie.map((value, s) => value + 2 * se[s]);
        traces.push({ ...band, y: [...high, ...low.reverse()] });
      }
      traces.push(line);
    }
    crosslens.show(plot, { ...spec, data: traces });
  }

  // a figure of bars
  function bars(name, drawn, reason) {
    const figure = byId(`figure-${name}`);
    if (!figure) return;
    const there = Boolean(drawn) && drawn.y.some((y) => y !== null), plot = figure.querySelector(".plot"), missing = figure.querySelector("[data-missing]");
    for (const one of figure.querySelectorAll(".plot, figcaption")) one.hidden = !there;
    missing.hidden = there;
    missing.textContent = reason;
    if (!there) return;
    const spec = crosslens.spec(plot);
    if (name === "rates") {
      const powers = [];
      for (let power = Math.ceil(drawn.x[0]); power <= drawn.x.at(-1); power++) powers.push(power);
      Object.assign(spec.layout.xaxis, { tickmode: "array", tickvals: powers, ticktext: powers.map((power) => String(2 ** power)) });
    }
    crosslens.show(plot, { ...spec, data: [{ ...spec.data[0], ...drawn }] });
  }

  // counts of the bins first, first + 1, ..., of which there are 4 per doubling
  function histogram() {
    if (!feature.rates) return null;
    const [first, counts] = feature.rates, total = counts.reduce((a, b) => a + b, 0);
    const edge = (i) => Number((2 ** ((first + i) / 4)).toPrecision(3));
    const customdata = counts.map((n, i) => [`${edge(i)} to ${edge(i + 1)}`, n]);
    return { x: counts.map((_, i) => (first + i + 0.5) / 4), y: counts.map((n) => n / total), customdata };
  }

  // the snapshot shown first: that of the largest effect, or the last
  function start() {
    let best = [0, S - 1];
    for (const [, ie] of feature.effects) ie.forEach((value, s) => { if (Math.abs(value ?? 0) > best[0]) best = [Math.abs(value), s]; });
    return best[1];
  }

  let repaint = [];
  function select(s) {
    for (const id of ["at", "lens-at"]) {
      Object.assign(byId(id), { max: S - 1, value: s });
      byId(id).setAttribute("aria-valuetext", about.labels[s]);
    }
    byId("at-label").textContent = byId("lens-label").textContent = about.labels[s];
    for (const paint of repaint) paint(s);
  }
  for (const id of ["at", "lens-at"]) byId(id).addEventListener("input", (event) => select(Number(event.target.value)));

  // what the feature writes at snapshot s with activation f
  function written(f, s) {
    const strength = f * feature.norms[s];
    return strength > feature.examples.threshold ? strength : 0;
  }

  function strip(name, values, largest) {
    const cells = values.map((value, s) => element("i", {
      class: value < 0 ? "below" : "above",
      style: { "--w": Math.min(1, Math.abs(value) / largest).toFixed(2) },
      title: `${about.labels[s]}: ${name} ${Number(value.toPrecision(3))}`,
    }));
    return element("div", { class: "read" }, [element("span", { text: name }), element("span", { class: "strip", role: "img", "aria-label": `${name}, by snapshot`, style: { "--n": S } }, cells)]);
  }

  const NEAR = 8;  // tokens on each side that are shown before a text is unfolded

  // a text whose tokens are tinted by what the feature writes
  function passage([, position, first, tokens, activations], top) {
    const at = position - first, pieces = joined(tokens.map((token) => words[token]));
    const holds = ([t, n]) => t <= at && at < t + n, far = (piece) => !holds(piece) && Math.abs(piece[0] - at) > NEAR;
    const parts = pieces.map((piece) => element("bdi", { class: `token${holds(piece) ? " peak" : ""}${far(piece) ? " far" : ""}`, text: visible(piece[2]) }));
    const text = element("p", { class: "text", dir: "auto" }, parts);
    if (pieces.some(far)) {
      text.classList.add("folded");
      Object.assign(text, { tabIndex: 0, title: "click for more context" });
      text.setAttribute("role", "button");
      text.setAttribute("aria-expanded", "false");
      const unfold = () => text.setAttribute("aria-expanded", String(!text.classList.toggle("folded")));
      text.addEventListener("click", unfold);
      text.addEventListener("keydown", (event) => { if (event.key === "Enter") unfold(); });
    }
    repaint.push((s) => parts.forEach((part, i) => {
      const [t, n] = pieces[i], activation = Math.max(...activations.slice(t, t + n)), strength = written(activation, s);
      part.style.setProperty("--w", Math.min(1, strength / top).toFixed(3));
      part.title = `activation ${activation}, writes ${Number(strength.toPrecision(3))} at ${about.labels[s]}`;
    }));
    return text;
  }

  function examples() {
    repaint = [];
    const list = feature.examples?.list ?? [], sampled = feature.samples ?? [];
    byId("samples").replaceChildren();
    if (!part("examples", list.length > 0, "The feature is active on no held-out token.")) return;
    const top = Math.max(...list.map(([, , , , activations]) => Math.max(...feature.norms.map((_, s) => written(Math.max(...activations), s)))), 1e-30);
    const reads = Math.max(...list.flatMap(([, , , , , read]) => read.map(Math.abs)), 1e-30);
    byId("examples").querySelector("ol").replaceChildren(...list.map((one) => {
      const [sequence, position, first, , activations, read] = one, at = activations[position - first];
      return element("li", {}, [
        passage(one, top),
        strip("writes", feature.norms.map((_, s) => written(at, s)), top),
        strip("reads", read, reads),
        element("p", { class: "where", text: `sequence ${sequence}, position ${position}, activation ${at}` }),
      ]);
    }));
    const quarters = ["Strongest", "Second", "Third", "Weakest"], n = sampled.length;
    for (const [q, name] of quarters.entries()) {
      const some = sampled.slice(Math.ceil((q * n) / 4), Math.ceil(((q + 1) * n) / 4));
      if (!some.length) continue;
      const strengths = some.map(([, position, first, , activations]) => activations[position - first]);
      const range = `activations ${Math.min(...strengths)} to ${Math.max(...strengths)}`;
      byId("samples").append(element("details", {}, [
        element("summary", { text: `${name} quarter of ${n} random active tokens: ${range}` }),
        element("ol", { class: "examples" }, some.map((one) => element("li", {}, [passage(one, top)]))),
      ]));
    }
  }

  function lens() {
    const there = (feature.lens ?? []).some(([promoted]) => promoted.length);
    if (!part("lens", there, "There is no logit lens for this feature.")) return;
    const largest = Math.max(...feature.lens.flatMap((row) => [...row[1], ...row[3]].map(Math.abs)), 1e-30);
    const width = (logit) => (Math.abs(logit) / largest).toFixed(3);
    const side = (name, tokens, logits, kind) => element("div", {}, [element("h3", { class: "title", text: name }), element("ol", { class: `logits ${kind}` }, tokens.map((token, i) => element("li", {}, [
      element("bdi", { class: "chip", text: visible(words[token]) }), element("i", { style: { "--w": width(logits[i]) } }), element("span", { text: signed(logits[i]) }),
    ])))]);
    repaint.push((s) => {
      const [up, ups, down, downs] = feature.lens[s];
      byId("lens").querySelector(".sides").replaceChildren(side("Promotes", up, ups, "up"), side("Suppresses", down, downs, "down"));
    });
    const chips = (tokens, logits, kind) => element("td", { class: "word", "data-column": kind === "up" ? "promotes" : "suppresses" }, tokens.map((token, i) => element("bdi", {
      class: `chip ${kind}`, style: { "--w": width(logits[i]) }, text: visible(words[token]), title: signed(logits[i]),
    })));
    byId("lens").querySelector("tbody").replaceChildren(...feature.lens.map(([up, ups, down, downs], s) =>
      element("tr", {}, [element("th", { scope: "row", text: about.labels[s] }), chips(up, ups, "up"), chips(down, downs, "down")])).reverse());
  }

  const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value)}`;

  function nearest() {
    if (!part("nearest", (feature.nearest ?? []).length > 0, "There are no other features.")) return;
    byId("nearest").querySelector("ol").replaceChildren(...feature.nearest.map(([id, cosine, name]) => element("li", {}, [
      element("a", { href: `#${id}`, text: `Feature ${id}` }),
      name ? element("bdi", { class: "chip", text: visible(name) }) : "",
      element("span", { text: `cosine ${String(cosine).replace("-", "−")}` }),
    ])));
  }

  function seeds() {
    const found = feature.seeds;
    byId("seeds-section").hidden = !found;
    byId("seeds").replaceChildren(...(found?.partners ?? []).map(([seed, other, correlation]) => element("li", {}, [
      element("span", { text: `seed ${seed}` }),
      element("span", { text: other === null ? "no partner" : `feature ${other}, correlation ${String(correlation).replace("-", "−")}` }),
    ])));
  }

  // ------------------------------------------------------------------ numbers
  const dates = (s) => [s, about.labels[s], about.steps[s], about.tokens[s]];
  const dated = ["snapshot", "label", "step", "tokens"];
  const tables = {
    "figure-presence": () => [[...dated, "r2", "within", "norm"], ...feature.norms.map((norm, s) => [...dates(s), feature.r2?.[s] ?? "", feature.within?.[s] ?? "", norm])],
    "figure-effects": () => [["task", ...dated, "ie", "ie_se"], ...feature.effects.flatMap(([task, ie, se]) => ie.map((value, s) => [about.tasks[task], ...dates(s), value, se[s]]))],
    "figure-read": () => [[...dated, "encoder_share"], ...feature.read.map((share, s) => [...dates(s), share])],
    "figure-rates": () => [["low", "high", "count"], ...feature.rates[1].map((n, i) => [2 ** ((feature.rates[0] + i) / 4), 2 ** ((feature.rates[0] + i + 1) / 4), n])],
    examples: () => [
      ["rank", "sequence", "position", "token", "activation", ...about.labels.map((label) => `writes/${label}`), ...about.labels.map((label) => `reads/${label}`)],
      ...feature.examples.list.flatMap(([sequence, position, first, tokens, activations, read], rank) => tokens.map((token, t) => [
        rank, sequence, first + t, words[token], activations[t], ...feature.norms.map((_, s) => Number(written(activations[t], s).toPrecision(4))), ...(first + t === position ? read : read.map(() => "")),
      ])),
    ],
    lens: () => [[...dated, "rank", "promoted", "promoted_logit", "suppressed", "suppressed_logit"], ...feature.lens.flatMap(([up, ups, down, downs], s) => up.map((token, rank) => [...dates(s), rank, words[token], ups[rank], words[down[rank]], downs[rank]]))],
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-numbers]");
    if (!button) return;
    const name = button.closest("figure, #examples, #lens").id;
    save(`feature-${feature.id}-${name.replace("figure-", "")}.csv`, tables[name]());
  });

  byId("jump").addEventListener("submit", (event) => {
    event.preventDefault();
    location.hash = String(Number(byId("number").value));
  });
  let walking = false;
  for (const id of ["before", "after"]) byId(id).addEventListener("click", () => { walking = true; });
  window.addEventListener("hashchange", () => {
    // keep the focus and the place when stepping through features; go to the top after a link further down
    const stepped = walking || document.activeElement?.closest(".steps");
    walking = false;
    if (!stepped) {
      byId("name").focus({ preventScroll: true });
      window.scrollTo(0, 0);
    }
    open();
  });
  open();
})();
