// One sample.

const detail = byId("detail");
let shown = -1;
let view = "picture";

function decode(code) {
  const raw = atob(code);
  return Float32Array.from(raw, (c) => c.charCodeAt(0) / 255);
}

/** A map as a transparent layer: blue for the dense model, orange for the pruned one. */
function layer(map, which) {
  const [height, width] = map.size;
  const dense = decode(map.dense), pruned = decode(map.pruned);
  const canvas = el("canvas", { width, height, "aria-hidden": "true" });
  const image = new ImageData(width, height);
  for (let k = 0; k < width * height; k++) {
    const value = which === "dense" ? -dense[k] : which === "pruned" ? pruned[k] : pruned[k] - dense[k];
    const [r, g, b] = value < 0 ? [42, 131, 198] : [217, 98, 43];
    image.data.set([r, g, b, Math.min(1, Math.abs(value)) * 205], 4 * k);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** The canvas lies where object-fit puts the picture. */
function fit(box, map) {
  const [w, h] = map.picture;
  const canvas = box.querySelector("canvas");
  if (!canvas) return;
  canvas.style.objectFit = "fill";
  const wide = w >= h;
  canvas.style.width = wide ? "100%" : `${(100 * w) / h}%`;
  canvas.style.height = wide ? `${(100 * h) / w}%` : "100%";
  canvas.style.inset = "0";
  canvas.style.margin = "auto";
}

function drawing(i, which, options) {
  const map = pictures.maps[i];
  const box = picture(i, { large: true, eager: true, ...options });
  if (map && which !== "picture") { box.append(layer(map, which)); fit(box, map); }
  return box;
}

function pictureColumn(i) {
  const map = pictures.maps[i];
  const side = el("div");
  if (!map) {
    side.append(drawing(i, "picture", { class: "stage" }));
    if (pictures.any && pictures.map_note) side.append(el("p", { class: "legend", text: pictures.map_note }));
    return side;
  }
  const stage = el("div");
  const buttons = el("div", { class: "maps", role: "group", "aria-label": "Heat map" });
  const choose = (which) => {
    view = which;
    const said = `${describe(i)}; ${which === "picture" ? "no heat map" : `heat map: ${which}`}`;
    stage.replaceChildren(drawing(i, which, { class: "stage", alt: said }));
    for (const b of buttons.children) b.setAttribute("aria-pressed", String(b.dataset.map === which));
  };
  for (const which of ["picture", "dense", "pruned", "difference"]) {
    const button = el("button", { type: "button", click: () => choose(which) }, drawing(i, which, { alt: "" }), which);
    button.dataset.map = which;
    buttons.append(button);
  }
  choose(view);
  const overlap = map.overlap === null ? "" : ` The maps overlap by ${map.overlap.toFixed(2)} (1: the same places).`;
  side.append(stage, buttons, el("p", { class: "legend" },
    `Where each model looks for ${className(map.class)} (Grad-CAM, pruned at ${map.sparsity}). Difference: dense`,
    el("span", { class: "scale", "aria-hidden": "true" }), `pruned.${overlap}`));
  return side;
}

function probabilityTable(i) {
  const of = data.probabilities && data.probabilities[i];
  if (!of || !of.length) return null;
  const labels = labelsOf(i);
  const head = el("tr", {}, el("th", { class: "left", scope: "col", text: "class" }), el("th", { scope: "col", text: "dense" }),
    ...data.levels.map((l) => el("th", { scope: "col", text: of[0].length === 3 ? `pruned ${l}` : String(l) })));
  const body = of.map(([c, ...values]) => el("tr", {},
    el("th", { scope: "row" }, className(c), labels.includes(c) ? el("span", { class: "tag", text: "label" }) : null),
    ...values.map((v, k) => el("td", { class: k ? "l" : "d", "--p": `${(v ?? 0) / 10}%`, text: percent(v) }))));
  return el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Probabilities" },
    el("table", { class: "probabilities" }, el("thead", {}, head), el("tbody", {}, ...body)));
}

function scoreList(i) {
  const list = el("div", { class: "scores" });
  for (const s of data.scores) {
    const value = s.values[i], rank = s.rank[i];
    if (value === null) continue;
    const bounds = s.key === "hardness" && data.interval && data.interval[i][0] !== null
      ? ` (${digits(data.interval[i][0])} to ${digits(data.interval[i][1])})` : "";
    const above = 1000 - rank;
    const place = rank >= 500 ? `top ${above < 1 ? "0.1" : (above / 10).toFixed(above < 100 ? 1 : 0)} %` : `lowest ${rank < 1 ? "0.1" : (rank / 10).toFixed(rank < 100 ? 1 : 0)} %`;
    list.append(el("span", { text: s.name }), el("span", { text: digits(value) + bounds }),
      el("span", { class: "track", "--p": `${rank / 10}%`, "aria-hidden": "true" }), el("span", { text: place }));
  }
  return list;
}

function factList(i) {
  const rows = [];
  const labels = labelsOf(i);
  if (data.label || data.labels) rows.push([labels.length > 1 ? "labels" : "label", labels.length ? namesOf(labels) : "none"]);
  if (data.dense && data.dense[i] !== null) rows.push(["dense says", className(data.dense[i])]);
  if (highest >= 0 && prunedOf(i) !== null) {
    const words = data.pruned.map((level, k) => [data.levels[k], level[i]]).map(([l, c]) => `${className(c)} at ${l}`);
    const all = new Set(data.pruned.map((level) => level[i]));
    rows.push(["pruned says", all.size === 1 ? `${className(prunedOf(i))}${highest ? " at every level" : ""}` : words.join(", ")]);
  }
  if (data.quadrant && data.quadrant[i] !== null) rows.push(["quadrant", data.quadrants[data.quadrant[i]]]);
  for (const a of data.attributes) if (a.index[i] !== null) rows.push([a.name, a.values[a.index[i]]]);
  if (data.duplicates[i] !== null) rows.push(["duplicate of", data.duplicates[i]]);
  for (const o of data.others) if (o.values[i] !== null) rows.push([o.name, o.values[i]]);
  const list = el("dl", { class: "facts" });
  for (const [name, value] of rows) list.append(el("dt", { text: name }), el("dd", { text: value }));
  return list;
}

function show(i) {
  shown = i;
  const place = order.indexOf(i);
  const go = (step) => { if (order[place + step] !== undefined) { cursor = place + step; show(order[cursor]); } };
  const ticked = el("button", { class: "button", type: "button", "aria-pressed": String(ticks.has(i)), text: ticks.has(i) ? "✓ Ticked" : "Tick", click: () => { tick(i); show(i); } });
  const badges = el("div", { class: "badges" });
  for (const f of data.flags) if (flagged.get(f.key).has(i)) badges.append(el("span", { class: "badge", text: f.name }));
  const right = el("div", {}, el("h3", { text: "What it is" }), factList(i), badges.children.length ? badges : null);
  const table = probabilityTable(i);
  if (table) right.append(el("h3", { text: "Probabilities, dense and pruned at each sparsity" }), table);
  if (data.probability_note) right.append(el("p", { class: "legend", text: data.probability_note }));
  right.append(el("h3", { text: "Scores, and where they lie among all samples" }), scoreList(i));
  const back = el("button", { class: "button", type: "button", text: "←", "aria-label": "Previous sample", disabled: place <= 0, click: () => go(-1) });
  const next = el("button", { class: "button", type: "button", text: "→", "aria-label": "Next sample", disabled: place < 0 || place === order.length - 1, click: () => go(1) });
  detail.replaceChildren(el("div", { class: "head" },
    el("h2", { id: "detail-title", text: data.ids[i], title: data.ids[i] }),
    el("span", { class: "place", text: place < 0 ? "" : `${(place + 1).toLocaleString("en")} of ${order.length.toLocaleString("en")}` }),
    ticked, back, next, el("button", { class: "button", type: "button", text: "Close", id: "close", click: () => detail.close() })),
    el("div", { class: "two" }, pictureColumn(i), right));
  detail.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest(".table")) return;
    if (event.key === "ArrowLeft") go(-1);
    else if (event.key === "ArrowRight") go(1);
    else if (event.key === " " && event.target.tagName !== "BUTTON") { event.preventDefault(); tick(i); show(i); }
  };
  if (!detail.open) detail.showModal();
  detail.scrollTop = 0;
  detail.focus();
  toAddress();
}
detail.addEventListener("close", () => {
  toAddress();
  const box = grid.getBoundingClientRect();
  if (box.top > innerHeight || box.bottom < 0) return; // opened from the top of the page: stay there
  moveTo(cursor);
  grid.focus({ preventScroll: true });
});
for (const dialog of [detail, byId("help")]) dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
