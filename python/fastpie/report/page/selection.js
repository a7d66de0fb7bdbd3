// Which samples are shown, in which order; the address keeps it.

const fields = [];
if (data.labels || (data.label && data.label.some((v) => v !== null))) fields.push(["label", "label", labelsOf]);
if (data.dense) fields.push(["dense", "dense says", (i) => (data.dense[i] === null ? [] : [data.dense[i]])]);
if (highest >= 0) fields.push(["pruned", "pruned says", (i) => (prunedOf(i) === null ? [] : [prunedOf(i)])]);
const facets = [];
if (fields.length) facets.push({
  key: "class", name: "class",
  values: Object.keys(data.classes).map((c) => [c, className(c)]).sort((a, b) => a[1].localeCompare(b[1])),
  of: (i) => fields.find((f) => f[0] === state.by)[2](i).map(String),
});
if (data.quadrants) facets.push({
  key: "quadrant", name: "quadrant", values: data.quadrants.map((q, k) => [String(k), q]),
  of: (i) => [text(data.quadrant[i])],
});
for (const a of data.attributes) facets.push({
  key: `a.${a.key}`, name: a.name, values: a.values.map((v, k) => [String(k), v]), of: (i) => [text(a.index[i])],
});

const fresh = () => ({
  q: "", sort: data.scores.length ? data.scores[0].key : "id", reverse: false, by: fields.length ? fields[0][0] : "",
  chosen: {}, flags: new Set(), ticked: false, size: "m",
});
let state = fresh();
const ticks = new Set();
let order = [];
let cursor = 0;

function passes(i, except) {
  if (state.ticked && !ticks.has(i)) return false;
  if (state.q && !data.ids[i].toLowerCase().includes(state.q.toLowerCase())) return false;
  for (const key of state.flags) if (!flagged.get(key).has(i)) return false;
  for (const f of facets) {
    const wanted = state.chosen[f.key];
    if (wanted !== undefined && f.key !== except && !f.of(i).includes(wanted)) return false;
  }
  return true;
}

function sorted() {
  const rows = [];
  for (let i = 0; i < count; i++) if (passes(i)) rows.push(i);
  const score = columns.get(state.sort);
  if (!score) {
    rows.sort((a, b) => (data.ids[a] < data.ids[b] ? -1 : 1));
    return state.reverse ? rows.reverse() : rows;
  }
  const up = score.low !== state.reverse;
  const values = score.values;
  return rows.sort((a, b) => {
    const x = values[a], y = values[b];
    if (x === null || y === null) return (x === null) - (y === null) || a - b; // unknown last
    return (up ? x - y : y - x) || a - b;
  });
}

function toAddress() {
  const first = fresh();
  const p = new URLSearchParams();
  for (const key of ["q", "sort", "by", "size"]) if (state[key] !== first[key]) p.set(key, state[key]);
  if (state.reverse) p.set("reverse", "1");
  if (state.ticked) p.set("ticked", "1");
  if (state.flags.size) p.set("flags", [...state.flags].join("."));
  for (const [key, value] of Object.entries(state.chosen)) p.set(key, value);
  if (detail.open) p.set("sample", data.ids[shown]);
  const hash = p.toString();
  if (hash || location.hash.includes("=")) history.replaceState(null, "", hash ? `#${hash}` : "#gallery");
}

function fromAddress() {
  if (!location.hash.includes("=")) return null;
  const p = new URLSearchParams(location.hash.slice(1));
  state = fresh();
  state.q = p.get("q") ?? "";
  if (columns.has(p.get("sort")) || p.get("sort") === "id") state.sort = p.get("sort");
  if (fields.some((f) => f[0] === p.get("by"))) state.by = p.get("by");
  if (["s", "m", "l"].includes(p.get("size"))) state.size = p.get("size");
  state.reverse = p.has("reverse");
  state.ticked = p.has("ticked");
  for (const key of (p.get("flags") ?? "").split(".")) if (flagged.has(key)) state.flags.add(key);
  for (const f of facets) {
    const value = p.get(f.key);
    if (value !== null && f.values.some((v) => v[0] === value)) state.chosen[f.key] = value;
  }
  return p.get("sample");
}
