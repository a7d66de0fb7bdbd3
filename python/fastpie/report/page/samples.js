// What the page knows of its samples. It fetches nothing, and whatever a run says (ids, names,
// values) reaches the page as text only (textContent, attributes), never as markup.

const byId = (id) => document.getElementById(id);
const read = (id) => JSON.parse(byId(id).textContent);
const data = read("data");
const pictures = read("pictures");
const count = data.ids.length;
const columns = new Map(data.scores.map((s) => [s.key, s]));
const text = (value) => (value === null || value === undefined ? "" : String(value));
const className = (index) => data.classes[index] ?? text(index);
const flagged = new Map(data.flags.map((f) => [f.key, new Set(f.rows)]));
const highest = data.pruned.length - 1;
document.documentElement.classList.add("js");

/** An element; `class`, `text` and attributes by name, functions as listeners. */
function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "class") node.className = value;
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

const labelsOf = (i) => data.labels ? data.labels[i] : data.label && data.label[i] !== null ? [data.label[i]] : [];
const namesOf = (classes) => classes.map(className).join(", ");
const prunedOf = (i, level = highest) => (level < 0 ? null : data.pruned[level][i]);
const percent = (perMille) => (perMille === null ? "–" : `${(perMille / 10).toFixed(perMille < 1000 ? 1 : 0)} %`);

function digits(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

/** The class whose probability stands for a sample: its label, else the dense prediction. */
function reference(i) {
  const of = data.probabilities && data.probabilities[i];
  if (!of || !of.length) return null;
  const labels = labelsOf(i);
  return of.find((p) => labels.includes(p[0])) ?? of[0];
}

function describe(i) {
  const words = [`Sample ${data.ids[i]}`];
  const labels = labelsOf(i);
  if (labels.length) words.push(`label ${namesOf(labels)}`);
  if (data.dense && data.dense[i] !== null) words.push(`dense ${className(data.dense[i])}`);
  if (prunedOf(i) !== null) words.push(`pruned ${className(prunedOf(i))}`);
  if (data.scores.length) words.push(`${data.scores[0].name.toLowerCase()} ${digits(data.scores[0].values[i])}`);
  for (const f of data.flags) if (flagged.get(f.key).has(i)) words.push(f.name);
  return words.join(", ");
}
