// The cards: only those in sight exist.

const grid = byId("grid");
const cards = new Map();
const sizes = { s: [92, 0], m: [158, 98], l: [250, 98] };
const GAP = 12;
let across = 1, cardWidth = 0, rowHeight = 1;
if (!pictures.any) grid.classList.add("no-pictures");

function picture(i, options = {}) {
  const uri = (options.large && pictures.large[i]) || pictures.small[i];
  const box = el("div", { class: `pic ${options.class ?? ""}` });
  if (uri) {
    const img = el("img", { alt: options.alt ?? describe(i), loading: options.eager ? "eager" : "lazy", decoding: "async" });
    if (uri.startsWith("data:image/png")) img.className = "coarse";
    img.src = uri;
    box.append(img);
  } else box.append(el("span", { class: "none", text: pictures.missing[i] ?? "no picture" }));
  return box;
}

const SHORT = { wrong: "wrong", changed: "flips", lost: "lost", pie: "PIE", duplicate: "dup", blank: "blank", dark: "dark", bright: "bright", blurred: "blur" };

function says(i) {
  const line = el("div", { class: "says" });
  const dense = data.dense ? data.dense[i] : null, pruned = prunedOf(i);
  if (dense === null) return line;
  line.append(el("span", { class: "d", text: className(dense) }));
  if (pruned !== null && pruned !== dense) line.append(" → ", el("span", { class: "p", text: className(pruned) }));
  return line;
}

function makeCard(i, place) {
  const labels = labelsOf(i);
  const score = columns.get(state.sort);
  const box = picture(i);
  if (score) box.append(el("span", { class: "value", title: score.name, text: digits(score.values[i]) }));
  box.append(el("button", { class: "tick", type: "button", tabindex: "-1", "aria-hidden": "true", title: "Tick", text: "✓" }));
  const name = labels.length ? namesOf(labels) : data.labels ? "no label" : data.dense && data.dense[i] !== null ? className(data.dense[i]) : "";
  const p = reference(i);
  const bars = p && el("div", { class: "bars", title: `${className(p[0])}: dense ${percent(p[1])}, pruned ${percent(p[p.length - 1])}` },
    el("i", { "--p": `${p[1] / 10}%` }), el("i", { "--p": `${p[p.length - 1] / 10}%` }));
  const dots = el("span", { class: "dots" });
  for (const f of data.flags) {
    if (f.key === "changed" && flagged.get("lost")?.has(i)) continue; // it says so too
    if (flagged.get(f.key).has(i) && dots.children.length < 3) dots.append(el("span", { class: "dot", title: f.name, text: SHORT[f.key] }));
  }
  const card = el("div", {
    class: "card", role: "option", id: `card-${i}`, "aria-selected": String(ticks.has(i)),
    "aria-posinset": place + 1, "aria-setsize": order.length, "aria-label": describe(i),
  }, box, el("div", { class: "body" }, el("div", { class: "name", title: name, text: name }), labels.length || prunedOf(i) !== data.dense?.[i] ? says(i) : null, bars,
    el("div", { class: "foot" }, el("span", { class: "id", title: data.ids[i], text: data.ids[i] }), dots)));
  card.dataset.place = place;
  return card;
}

function layout() {
  const [width, below] = sizes[state.size];
  const space = grid.clientWidth;
  const least = !pictures.any ? 158 : space < 420 && state.size === "m" ? 140 : width;
  across = Math.max(1, Math.floor((space + GAP) / (least + GAP)));
  cardWidth = (space - GAP * (across - 1)) / across;
  const body = !pictures.any ? 98 : below;
  rowHeight = (pictures.any ? cardWidth : 30) + body + GAP;
  grid.classList.toggle("small", state.size === "s" && pictures.any);
  grid.style.height = `${Math.ceil(order.length / across) * rowHeight}px`;
}

function draw() {
  const top = -grid.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor((top - 600) / rowHeight)) * across;
  const last = Math.min(order.length, (Math.floor((top + innerHeight + 600) / rowHeight) + 1) * across);
  for (const [place, card] of cards) if (place < first || place >= last) { card.remove(); cards.delete(place); }
  for (let place = first; place < last; place++) {
    let card = cards.get(place);
    if (!card) {
      card = makeCard(order[place], place);
      cards.set(place, card);
      // In the order of the gallery, for those who hear it.
      const next = cards.get(place + 1);
      grid.insertBefore(card, next ?? null);
    }
    card.style.width = `${cardWidth}px`;
    card.style.height = `${rowHeight - GAP}px`;
    card.style.left = `${(place % across) * (cardWidth + GAP)}px`;
    card.style.top = `${Math.floor(place / across) * rowHeight}px`;
    card.classList.toggle("cursor", place === cursor);
  }
  if (cards.has(cursor)) grid.setAttribute("aria-activedescendant", cards.get(cursor).id);
  else grid.removeAttribute("aria-activedescendant");
}

function redraw() {
  for (const card of cards.values()) card.remove();
  cards.clear();
  layout();
  draw();
}

let due = false;
const later = () => {
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; draw(); });
};
addEventListener("scroll", later, { passive: true });
new ResizeObserver(() => { layout(); draw(); }).observe(grid);

function moveTo(place) {
  if (!order.length) return;
  cursor = Math.min(order.length - 1, Math.max(0, place));
  const box = grid.getBoundingClientRect();
  const top = box.top + Math.floor(cursor / across) * rowHeight;
  const bars = byId("filters").getBoundingClientRect().bottom + 8;
  const low = innerHeight - 8;
  if (top < bars) scrollBy({ top: top - bars, behavior: "instant" });
  else if (top + rowHeight > low) scrollBy({ top: Math.min(top + rowHeight - low, top - bars), behavior: "instant" });
  draw();
}

function tick(i) {
  if (ticks.has(i)) ticks.delete(i); else ticks.add(i);
  const card = byId(`card-${i}`);
  if (card) card.setAttribute("aria-selected", String(ticks.has(i)));
  counts();
}

grid.addEventListener("click", (event) => {
  const card = event.target.closest(".card");
  if (!card) return;
  cursor = Number(card.dataset.place);
  if (event.target.closest(".tick")) { tick(order[cursor]); draw(); return; }
  draw();
  show(order[cursor]);
});
grid.addEventListener("keydown", (event) => {
  const page = across * Math.max(1, Math.floor(innerHeight / rowHeight) - 1);
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, PageDown: page, PageUp: -page }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (step !== undefined) { if (cursor + step >= 0 || step === -1) moveTo(Math.min(cursor + step, order.length - 1)); }
  else if (event.key === "Home") moveTo(0);
  else if (event.key === "End") moveTo(order.length - 1);
  else if (event.key === "Enter" && order.length) show(order[cursor]);
  else if (event.key === " " && order.length) tick(order[cursor]);
  else return;
  event.preventDefault();
});
