"use strict";
// The table of all features: search, sorting and paging. The URL keeps the state.
(() => {
  const { element, visible } = crosslens;
  const ROWS = 50;
  const byId = (id) => document.getElementById(id);
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const count = (n) => n.toLocaleString("en");
  let data, columns, haystack, found = [];
  const tasks = Object.entries(JSON.parse(byId("about").textContent).pages);
  const state = { q: "", sort: "id", down: false, page: 1 };

  crosslens.index = (loaded) => {
    data = loaded;
    prepare();
  };

  function prepare() {
    const word = (coded) => (i) => coded[1][coded[0][i]];
    const date = (values) => (i) => (values[i] === null ? "" : data.snapshots[values[i]]);
    columns = [
      { name: "id", title: "Feature", value: (i) => data.id[i], cell: link },
      data.label && { name: "label", title: "Label", value: (i) => data.label[i], cell: (i) => data.label[i], words: true },
      data.complexity && { name: "complexity", title: "Complexity", value: (i) => data.complexity[i], cell: (i) => data.complexity[i] ?? "", largest: true },
      { title: byId("features").dataset.measure, cell: strip, words: true },
      data.token && { name: "token", title: "Top token", value: word(data.token), cell: (i) => token(word(data.token)(i)), words: true },
      data.promoted && { name: "promoted", title: "Promotes", value: word(data.promoted), cell: (i) => token(word(data.promoted)(i)), words: true },
      data.kind && { name: "kind", title: "Class", value: word(data.kind), cell: word(data.kind), words: true },
      { name: "birth", title: "Born", value: (i) => data.birth[i], cell: date(data.birth), words: true },
      { name: "peak", title: "Peak", value: (i) => data.peak[i], cell: date(data.peak), words: true },
      { name: "lifetime", title: "Snapshots present", value: (i) => data.lifetime[i], cell: (i) => data.lifetime[i] ?? "" },
      { name: "rate", title: "Active (%)", value: (i) => share(data.rate[i]), cell: (i) => share(data.rate[i]), largest: true },
      { name: "ie", title: "Largest |IE|", value: (i) => data.ie[i], cell: (i) => data.ie[i] ?? "", largest: true },
    ].filter(Boolean);
    if (data.ie.every((value) => value === null)) columns = columns.filter((column) => column.name !== "ie");
    const texts = columns.filter((column) => ["label", "token", "promoted", "kind"].includes(column.name));
    haystack = data.id.map((id, i) => texts.map((column) => column.value(i)).join("\u0000").toLowerCase());
    byId("features").tHead.rows[0].replaceChildren(...columns.map(head));
    byId("trouble").hidden = true;
    byId("finder").hidden = false;
    read();
  }

  // "Promotes" at another snapshot, from the script of that snapshot
  crosslens.promotes = (name, coded) => {
    data.promoted = coded ?? [data.id.map(() => 0), [""]];
    if (name === byId("at").value) prepare();
  };

  byId("at")?.addEventListener("change", () => {
    const script = element("script", { src: `data/promotes-${byId("at").value}.js` });
    script.addEventListener("error", () => crosslens.say(`${script.getAttribute("src")} was not found.`));
    script.addEventListener("load", () => script.remove());
    document.body.append(script);
  });

  function link(i) {
    return element("a", { href: `feature.html#${data.id[i]}`, text: String(data.id[i]) });
  }

  function token(text) {
    return text ? element("bdi", { class: "chip", text: visible(text) }) : "";
  }

  function share(rate) {
    return rate === null ? "" : Number((100 * rate).toPrecision(3));
  }

  // norms as small squares, from the first snapshot to the last
  function strip(i) {
    const S = data.snapshots.length;
    const levels = [...data.heat.slice(i * S, (i + 1) * S)].map((level) => parseInt(level, 36) / 35);
    const peak = data.snapshots[levels.indexOf(Math.max(...levels))];
    const cells = levels.map((level) => element("i", { style: { "--w": level.toFixed(2) } }));
    return element("span", { class: "strip", role: "img", "aria-label": `largest at ${peak}`, style: { "--n": S } }, cells);
  }

  function head(column) {
    const cell = element("th", { scope: "col", ...(column.words ? { class: "word" } : {}) });
    if (!column.name) cell.textContent = column.title;
    else {
      const button = element("button", { type: "button", class: "sort", text: column.title });
      button.addEventListener("click", () => {
        const again = state.sort === column.name;
        change({ sort: column.name, down: again ? !state.down : Boolean(column.largest), page: 1 });
      });
      cell.append(button);
    }
    return cell;
  }

  function matches(words) {
    if (!words.length) return data.id.map((_, i) => i);
    const numbers = words.map((word) => /^\d+$/.test(word));
    const has = (i, word, k) => (numbers[k] && String(data.id[i]).startsWith(word)) || haystack[i].includes(word);
    const kept = [];
    for (let i = 0; i < data.id.length; i++) if (words.every((word, k) => has(i, word, k))) kept.push(i);
    return kept;
  }

  // missing values come last in either direction
  function order(rows) {
    const { value } = columns.find((column) => column.name === state.sort) ?? columns[0];
    const values = new Map(rows.map((i) => [i, value(i)]));
    const empty = (x) => x === null || x === "";
    const sign = state.down ? -1 : 1;
    return rows.sort((i, j) => {
      const a = values.get(i), b = values.get(j);
      if (empty(a) || empty(b)) return empty(a) - empty(b) || i - j;
      return sign * (typeof a === "number" ? a - b : collator.compare(a, b)) || i - j;
    });
  }

  function update() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    found = order(matches(words));
    const named = words.length ? tasks.filter(([task]) => words.every((word) => task.toLowerCase().includes(word))) : [];
    byId("tasks").hidden = !named.length;
    byId("tasks").replaceChildren("Tasks: ", ...named.flatMap(([task, page], i) => [i ? ", " : "", element("a", { href: page, text: visible(task) })]));
    render();
  }

  function render() {
    const pages = Math.max(1, Math.ceil(found.length / ROWS));
    state.page = Math.min(Math.max(1, state.page), pages);
    const first = (state.page - 1) * ROWS, rows = found.slice(first, first + ROWS);
    columns.forEach((column, k) => {
      const cell = byId("features").tHead.rows[0].cells[k];
      if (column.name === state.sort) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    byId("features").tBodies[0].replaceChildren(...rows.map((i) => element("tr", {}, columns.map((column, k) => {
      const content = column.cell(i);
      return element(k ? "td" : "th", { ...(k ? {} : { scope: "row" }), ...(column.words ? { class: "word" } : {}) }, [content instanceof Node ? content : String(content)]);
    }))));
    const what = state.q ? `of ${count(data.id.length)} features match` : "features";
    const range = rows.length ? `; showing ${count(first + 1)} to ${count(first + rows.length)}` : "";
    byId("found").textContent = found.length ? `${count(found.length)} ${what}${range}.` : `No feature matches “${visible(state.q)}”.`;
    byId("page").value = state.page;
    byId("page").max = pages;
    byId("pages").textContent = `of ${count(pages)}`;
    for (const id of ["first", "previous"]) byId(id).disabled = state.page === 1;
    for (const id of ["next", "last"]) byId(id).disabled = state.page === pages;
  }

  function change(changes) {
    Object.assign(state, changes);
    update();
    const { q, sort, down, page } = state;
    const parts = { ...(q && { q }), ...((sort !== "id" || down) && { sort }), ...(down && { down: 1 }), ...(page > 1 && { page }) };
    try {
      history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
    } catch (error) {
      console.info(error.message);  // browsers may forbid this for files; the table works without it
    }
  }

  // read the state from the URL
  function read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const sort = asked.get("sort"), known = columns.some((column) => column.name === sort);
    Object.assign(state, { q: asked.get("q") ?? "", sort: known ? sort : "id", down: asked.has("down"), page: Number(asked.get("page")) || 1 });
    byId("search").value = state.q;
    if (asked.has("focus")) byId("search").focus();
    update();
  }

  // the matching features in the order shown, with snapshots by label
  function numbers() {
    const shown = columns.filter((column) => column.name);
    const cell = (column, i) => (["birth", "peak"].includes(column.name) ? column.cell(i) : column.value(i));
    crosslens.save("features.csv", [shown.map((column) => column.title), ...found.map((i) => shown.map((column) => cell(column, i)))]);
  }

  byId("numbers").addEventListener("click", numbers);
  byId("search").addEventListener("input", (event) => change({ q: event.target.value.trim(), page: 1 }));
  byId("page").addEventListener("change", (event) => change({ page: Math.round(Number(event.target.value)) || 1 }));
  byId("first").addEventListener("click", () => change({ page: 1 }));
  byId("previous").addEventListener("click", () => change({ page: state.page - 1 }));
  byId("next").addEventListener("click", () => change({ page: state.page + 1 }));
  byId("last").addEventListener("click", () => change({ page: Infinity }));
  window.addEventListener("hashchange", () => data && read());
  window.addEventListener("load", () => {
    if (!data) byId("trouble").textContent = "data/features.js was not found next to this page, so the table cannot be shown.";
  });
})();
