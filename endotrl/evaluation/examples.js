"use strict";
// The browser of examples. Text of models and data gets into the page by `textContent` alone.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 100;
const el = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};
const number = (x, digits = 3) => (x === null || x === undefined ? "–" : x.toFixed(digits).replace("-", "−"));
const $ = (id) => document.getElementById(id);
const options = (select, names, first) => {
  if (first) select.append(el("option", { value: "", textContent: first }));
  names.forEach((name, i) => select.append(el("option", { value: String(i), textContent: name })));
};
const text = (e) => (e.text ??= [e.id, e.group, e.prompt, ...e.pieces.map((p) => p.text)].join("\n").toLowerCase());
const mark = (right) => (right === null ? "" : right >= 1 ? "✓" : right <= 0 ? "✗" : number(right, 2));

let shown = PAGE, found = [];

function find() {
  const scorer = +$("scorer").value, other = $("other").value, outcome = $("outcome").value;
  const words = $("search").value.toLowerCase(), group = data.groups[$("group").value];
  const kept = { all: () => true, right: (a) => a > 0, wrong: (a) => a !== null && a < 1,
    differ: (a, b) => other !== "" && a !== b }[outcome];
  found = data.examples.filter((e) => kept(e.right[scorer], other === "" ? null : e.right[+other])
    && (group === undefined || e.group === group) && (!words || text(e).includes(words)));
  const margin = (e) => e.margin[scorer] ?? 0;
  const length = (e) => Math.max(...e.pieces.map((p) => p.text.length));
  const by = { file: null, worst: (a, b) => margin(a) - margin(b), best: (a, b) => margin(b) - margin(a),
    close: (a, b) => Math.abs(margin(a)) - Math.abs(margin(b)), long: (a, b) => length(b) - length(a) }[$("sort").value];
  if (by) found.sort(by);
  shown = PAGE;
  list();
}

function list() {
  const scorer = +$("scorer").value, other = $("other").value;
  const rights = found.map((e) => e.right[scorer]).filter((r) => r !== null);
  const mean = rights.length ? `, ${Math.round((100 * rights.reduce((a, b) => a + b, 0)) / rights.length)}% right` : "";
  $("count").textContent = `${found.length} of ${data.examples.length} examples${mean}`;
  $("list").replaceChildren(...found.slice(0, shown).map((e) => {
    const second = other === "" ? [] : [el("span", { className: "mark", textContent: mark(e.right[+other]) })];
    const row = el("button", { type: "button", className: "example" },
      el("span", { className: "mark", textContent: mark(e.right[scorer]) }), ...second,
      el("span", { className: "margin", textContent: number(e.margin[scorer]) }),
      el("span", { className: "name", dir: "auto", textContent: `${e.prompt} · ${e.id}` }));
    const item = el("li", {}, row);
    row.setAttribute("aria-expanded", "false");
    row.addEventListener("click", () => {
      const open = item.querySelector(".detail");
      row.setAttribute("aria-expanded", String(!open));
      if (open) open.remove(); else item.append(detail(e, scorer, other === "" ? scorer : +other));
    });
    return item;
  }));
  $("more").hidden = shown >= found.length;
}

function detail(e, scorer, other) {
  const [left, right] = e.pair[scorer];
  // Of two scorers, what each of them puts first.
  const second = other === scorer || !e.choice ? right : e.choice[other];
  const first = other === scorer || !e.choice ? left : e.choice[scorer];
  const sides = el("div", { className: "sides" }, side(e, first), ...(e.pieces.length > 1 ? [side(e, second)] : []));
  const images = e.images.map((src, i) => el("figure", {}, el("img", { src, alt: `Image ${i + 1} of the prompt` })));
  const prompt = el("div", { className: "prompt", dir: "auto", textContent: e.prompt });
  return el("div", { className: "detail" }, prompt, ...images,
    ...(e.note ? [el("p", { className: "meta", textContent: e.note })] : []), sides);
}

function side(e, chosen) {
  const select = el("select", { ariaLabel: "which response" });
  options(select, e.pieces.map((p, i) => `${i + 1}: ${p.label}`));
  const body = el("div", { className: "tokens", dir: "auto" });
  const scores = el("tbody");
  const show = () => {
    const piece = +select.value;
    body.textContent = e.pieces[piece].text;
    scores.replaceChildren(...data.scorers.map((name, s) => {
      const row = e.scores[s], rank = 1 + row.filter((x) => x > row[piece]).length;
      const cells = [number(row[piece]), `${rank} of ${row.length}`].map((t) => el("td", { className: "r", textContent: t }));
      return el("tr", {}, el("td", { textContent: name }), ...cells);
    }));
  };
  select.value = String(chosen);
  select.addEventListener("change", show);
  show();
  const head = el("thead", {}, el("tr", {}, ...["scorer", "score", "rank"].map((t, i) =>
    el("th", { className: i ? "r" : "", textContent: t }))));
  return el("div", { className: "side" }, select, body, el("details", {}, el("summary", { textContent: "Scores" }),
    el("div", { className: "scroll" }, el("table", {}, head, scores))));
}

options($("scorer"), data.scorers);
options($("other"), data.scorers, "no other");
options($("group"), data.groups, "all");
for (const id of ["scorer", "other", "outcome", "group", "sort"]) $(id).addEventListener("change", find);
$("search").addEventListener("input", find);
$("more").addEventListener("click", () => { shown += PAGE; list(); });
find();
