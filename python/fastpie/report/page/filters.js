// Sorting and filtering.

const controls = new Map();
const bar = byId("filters");

function select(name, options, changed) {
  const node = el("select", { "aria-label": name, change: () => changed(node.value) });
  for (const [value, label] of options) node.append(el("option", { value, text: label }));
  return node;
}

function build() {
  const more = byId("more");
  const sort = select("Sort by", [...data.scores.map((s) => [s.key, s.name]), ["id", "Sample"]], (v) => { state.sort = v; update(); });
  controls.set("sort", sort);
  const flip = el("button", { class: "button", type: "button", id: "reverse", "aria-pressed": "false", click: () => { state.reverse = !state.reverse; update(); } });
  controls.set("reverse", flip);
  more.append(el("label", {}, "Sort", sort), flip);
  if (fields.length > 1) {
    const by = select("Class of", fields.map((f) => [f[0], f[1]]), (v) => { state.by = v; update(); });
    controls.set("by", by);
    more.append(by);
  }
  for (const f of facets) {
    const node = select(f.name, [["", `any ${f.name}`], ...f.values], (v) => {
      if (v === "") delete state.chosen[f.key]; else state.chosen[f.key] = v;
      update();
    });
    node.id = `facet-${f.key}`;
    controls.set(f.key, node);
    more.append(node);
  }
  const chips = el("div", { class: "chips", role: "group", "aria-label": "Flags" });
  for (const f of data.flags) {
    const chip = el("button", { class: "chip", type: "button", id: `flag-${f.key}`, "aria-pressed": "false", click: () => {
      if (state.flags.has(f.key)) state.flags.delete(f.key); else state.flags.add(f.key);
      update();
    } }, f.name, el("b"));
    controls.set(`flag ${f.key}`, chip);
    chips.append(chip);
  }
  const ticked = el("button", { class: "chip", type: "button", id: "only-ticked", "aria-pressed": "false", click: () => { state.ticked = !state.ticked; update(); } }, "ticked", el("b"));
  controls.set("ticked", ticked);
  chips.append(ticked);
  more.append(chips);
  if (pictures.any) {
    const size = select("Size of the cards", [["s", "small"], ["m", "medium"], ["l", "large"]], (v) => { state.size = v; update(); });
    controls.set("size", size);
    more.append(size);
  }
  byId("search").addEventListener("input", (event) => { state.q = event.target.value; update(); });
  byId("reset").addEventListener("click", () => { state = fresh(); update(); });
  byId("toggle-filters").addEventListener("click", (event) => {
    event.currentTarget.setAttribute("aria-expanded", String(bar.classList.toggle("open")));
    later();
  });
  byId("export").addEventListener("click", exportSelection);
  byId("copy").addEventListener("click", copyIds);
}

/** The ticked samples if there are any, else those shown. */
const selection = () => (ticks.size ? [...ticks].sort((a, b) => a - b) : order);

function counts() {
  byId("count").replaceChildren(el("b", { text: order.length.toLocaleString("en") }), ` of ${count.toLocaleString("en")}`);
  const n = selection().length;
  byId("export").textContent = ticks.size ? `Export ${n} ticked` : "Export CSV";
  byId("export").disabled = byId("copy").disabled = n === 0;
  const chip = controls.get("ticked");
  chip.querySelector("b").textContent = ticks.size;
  chip.hidden = !ticks.size && !state.ticked;
}

function update(keep) {
  order = sorted();
  cursor = keep ? Math.min(cursor, Math.max(order.length - 1, 0)) : 0;
  const score = columns.get(state.sort);
  controls.get("sort").value = state.sort;
  const flip = controls.get("reverse");
  flip.setAttribute("aria-pressed", String(state.reverse));
  const up = score ? score.low !== state.reverse : !state.reverse;
  flip.textContent = up ? "↑ lowest first" : "↓ highest first";
  if (!score) flip.textContent = up ? "↓ A to Z" : "↑ Z to A";
  if (controls.has("by")) controls.get("by").value = state.by;
  if (controls.has("size")) controls.get("size").value = state.size;
  if (byId("search").value !== state.q) byId("search").value = state.q;
  for (const f of facets) {
    const node = controls.get(f.key);
    const found = new Map();
    for (let i = 0; i < count; i++) if (passes(i, f.key)) for (const v of new Set(f.of(i))) found.set(v, (found.get(v) ?? 0) + 1);
    const names = new Map(f.values);
    for (const option of node.options) {
      if (option.value === "") continue;
      const n = found.get(option.value) ?? 0;
      option.textContent = `${names.get(option.value)} (${n})`;
      option.hidden = n === 0 && state.chosen[f.key] !== option.value;
    }
    node.value = state.chosen[f.key] ?? "";
    node.classList.toggle("active", node.value !== "");
  }
  for (const f of data.flags) {
    const chip = controls.get(`flag ${f.key}`);
    chip.setAttribute("aria-pressed", String(state.flags.has(f.key)));
    chip.querySelector("b").textContent = f.rows.filter((i) => passes(i)).length;
  }
  controls.get("ticked").setAttribute("aria-pressed", String(state.ticked));
  const active = Object.keys(state.chosen).length + state.flags.size + (state.ticked ? 1 : 0);
  byId("toggle-filters").textContent = active ? `Filters (${active})` : "Filters";
  byId("reset").hidden = !active && !state.q && state.sort === fresh().sort && !state.reverse;
  byId("empty").hidden = order.length > 0;
  counts();
  redraw();
  const gone = grid.getBoundingClientRect().bottom < bar.getBoundingClientRect().bottom;
  if (gone) byId("gallery").scrollIntoView({ behavior: "instant" });
  toAddress();
}
