// CSV files, and the clipboard.

/** A cell of a CSV file. A text that a spreadsheet would compute begins with an apostrophe. */
function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number" || typeof value === "boolean") return String(value);
  const safe = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function save(name, rows) {
  const blob = new Blob([rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n"], { type: "text/csv;charset=utf-8" });
  const link = el("a", { download: name });
  link.href = URL.createObjectURL(blob);
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function exportSelection() {
  const head = ["sample"];
  if (data.label || data.labels) head.push("label");
  if (data.dense) head.push("prediction_dense");
  data.pruned.forEach((_, k) => head.push(`prediction_pruned@${data.levels[k]}`));
  head.push(...data.scores.map((s) => s.key));
  if (data.quadrants) head.push("quadrant");
  head.push("flags", ...data.attributes.map((a) => a.name));
  const name = (c) => (c === null ? null : className(c));
  const rows = selection().map((i) => {
    const row = [data.ids[i]];
    if (data.label || data.labels) row.push(labelsOf(i).map(className).join("; "));
    if (data.dense) row.push(name(data.dense[i]));
    data.pruned.forEach((level) => row.push(name(level[i])));
    row.push(...data.scores.map((s) => s.values[i]));
    if (data.quadrants) row.push(data.quadrant[i] === null ? null : data.quadrants[data.quadrant[i]]);
    row.push(data.flags.filter((f) => flagged.get(f.key).has(i)).map((f) => f.key).join("; "));
    row.push(...data.attributes.map((a) => (a.index[i] === null ? null : a.values[a.index[i]])));
    return row;
  });
  save("fastpie-selection.csv", [head, ...rows]);
  say(`${rows.length} samples exported.`);
}

async function copyIds() {
  const ids = selection().map((i) => data.ids[i]).join("\n");
  try {
    await navigator.clipboard.writeText(ids);
  } catch {
    // No clipboard for pages opened from a file in some browsers.
    const area = el("textarea", { class: "visually-hidden" });
    area.value = ids;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say(`${selection().length} ids copied.`);
}

function say(words) {
  byId("status").textContent = words;
  const button = words.endsWith("copied.") ? byId("copy") : null;
  if (!button) return;
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1200);
}

for (const button of document.querySelectorAll(".csv")) button.addEventListener("click", () => {
  const of = data.tables[button.dataset.table];
  save(`${button.dataset.table}.csv`, [of.columns, ...of.rows]);
});
