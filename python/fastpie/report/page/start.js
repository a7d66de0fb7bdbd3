// Tables, keys, colours, and the beginning.

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((th, column) => {
    const button = el("button", { type: "button" });
    button.append(...th.childNodes);
    th.append(button);
    button.addEventListener("click", () => {
      const falling = th.getAttribute("aria-sort") === "descending" || (!th.hasAttribute("aria-sort") && th.classList.contains("left"));
      heads.forEach((h) => h.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", falling ? "ascending" : "descending");
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.v;
      const numeric = !th.classList.contains("left");
      const rows = [...body.rows].sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // unknown last
        const difference = numeric ? Number(x) - Number(y) : x.localeCompare(y);
        return falling ? difference : -difference;
      });
      body.append(...rows);
    });
  });
}
document.querySelectorAll("table.sortable").forEach(sortable);
for (const th of document.querySelectorAll("#class-table th[data-class]")) {
  const index = th.dataset.class;
  if (!(index in data.classes) || !fields.length) continue;
  const button = el("button", { type: "button", title: "Show its samples", text: th.textContent, click: () => {
    state = fresh();
    state.chosen.class = index;
    update();
    byId("gallery").scrollIntoView();
  } });
  th.replaceChildren(button);
}

const help = byId("help");
const openHelp = () => help.showModal();
byId("help-button").addEventListener("click", openHelp);
byId("help-close").addEventListener("click", () => help.close());
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
    if (event.key === "Escape" && event.target.id === "search") { state.q = ""; update(); grid.focus({ preventScroll: true }); }
    return;
  }
  if (event.key === "?" && !help.open) openHelp();
  else if (event.key === "/" && !detail.open && !help.open) byId("search").focus();
  else if (event.key === "g" && !detail.open && !help.open) { byId("gallery").scrollIntoView({ behavior: "instant" }); grid.focus({ preventScroll: true }); draw(); }
  else return;
  event.preventDefault();
});

const themes = ["auto", "light", "dark"];
const themeButton = byId("theme");
function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = name;
  themeButton.textContent = { auto: "◐", light: "○", dark: "●" }[name];
  themeButton.title = `Colours: ${name}`;
  themeButton.setAttribute("aria-label", `Colours: ${name}`);
  try { localStorage.setItem("fastpie-theme", name); } catch { /* not kept, then */ }
}
let chosen = "auto";
try { chosen = localStorage.getItem("fastpie-theme") ?? "auto"; } catch { /* as the system says */ }
theme(themes.includes(chosen) ? chosen : "auto");
themeButton.addEventListener("click", () => {
  theme(themes[(themes.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3]);
});

function strip() {
  const box = byId("strip");
  if (!box || !pictures.any) return;
  const room = Math.max(4, Math.floor((box.clientWidth + 7) / 97));
  for (let i = 0; i < Math.min(count, room, 24); i++) {
    const labels = labelsOf(i);
    box.append(el("button", { type: "button", "aria-label": `Open ${describe(i)}`, click: () => { if (!order.includes(i)) { state = fresh(); update(); } cursor = order.indexOf(i); show(i); } },
      picture(i, { alt: "" }), el("small", { text: labels.length ? namesOf(labels) : data.dense && data.dense[i] !== null ? className(data.dense[i]) : data.ids[i] })));
  }
}

function start() {
  const open = fromAddress();
  update();
  if (open !== null) {
    const i = data.ids.indexOf(open);
    if (i >= 0) { cursor = Math.max(order.indexOf(i), 0); show(i); }
  }
}
if (count) {
  build();
  strip();
  start();
  addEventListener("hashchange", () => {
    if (!location.hash.includes("=")) return;
    if (detail.open) detail.close();
    start();
  });
} else {
  bar.hidden = true;
  grid.hidden = true;
}
