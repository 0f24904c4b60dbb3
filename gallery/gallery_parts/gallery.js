"use strict";
const find = (within, what) => within.querySelector(what);
const filters = find(document, "#filters"), main = find(document, "#results"), chosenBar = find(document, "#chosen");
const EVERY = 5000; // milliseconds between checks for new results
const STEP = 200; // results that are put on the page at a time
let results = [], stamp = "", chosen = [], shown = [], drawn = 0;

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const image = (address, alt) => make("img", { src: address, alt, loading: "lazy", decoding: "async" });
const title = (one) => `${one.prompt}${one.seed === null || one.seed === undefined ? "" : `, seed ${one.seed}`}`;

function galleryData(found) {
  const now = JSON.stringify(found);
  if (now === stamp) return;
  stamp = now;
  results = found;
  chosen = chosen.filter((folder) => results.some((one) => key(one) === folder));
  for (const name of ["lens", "model", "seed"]) fill(filters.elements[name], name);
  draw();
}
const key = (one) => `${one.folder}/${one.record}`;

function fill(select, name) {
  const kept = select.value;
  const values = [...new Set(results.map((one) => one[name]).filter((value) => value !== "" && value !== null && value !== undefined))];
  values.sort((a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b))));
  select.replaceChildren(make("option", { value: "", textContent: "all" }), ...values.map((value) => make("option", { value, textContent: value })));
  select.value = kept;
  if (select.selectedIndex < 0) select.value = "";
}

function chosenBy(one) {
  const wanted = Object.fromEntries(new FormData(filters));
  const text = [one.prompt, ...Object.values(one.settings)].join("\n").toLowerCase();
  return (
    wanted.prompt.toLowerCase().split(/\s+/).every((word) => text.includes(word)) &&
    ["lens", "model", "seed"].every((name) => wanted[name] === "" || String(one[name]) === wanted[name]) &&
    (!wanted.from || one.date.slice(0, 10) >= wanted.from) &&
    (!wanted.to || one.date.slice(0, 10) <= wanted.to)
  );
}

function draw() {
  const sort = filters.elements.sort.value, name = sort.replace("-", ""), sign = sort.startsWith("-") ? -1 : 1;
  shown = results.filter(chosenBy).sort((a, b) => sign * String(a[name]).localeCompare(String(b[name]), undefined, { numeric: true }));
  find(document, "#count").textContent = `${shown.length} of ${results.length} results`;
  main.replaceChildren();
  drawn = 0;
  const isSheet = filters.elements.view.value === "sheet";
  if (isSheet) {
    const columns = [...new Set(shown.flatMap((one) => Object.keys(one.images)))].sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
    const head = make("tr", {}, make("th", { scope: "col", textContent: "result" }), ...columns.map((column) => make("th", { scope: "col", textContent: column })));
    main.append(make("div", { className: "scroll sheet", tabIndex: 0 }, make("table", {}, make("thead", {}, head), make("tbody"))));
    more = () => append(find(main, "tbody"), (one) => row(one, columns));
  } else {
    main.append(make("div", { className: "cards" }));
    more = () => append(find(main, ".cards"), card);
  }
  main.append(end);
  more();
  drawChosen();
}
let more = () => {};
function append(place, make) {
  place.append(...shown.slice(drawn, drawn + STEP).map(make));
  drawn = Math.min(drawn + STEP, shown.length);
  end.hidden = drawn >= shown.length;
}
const end = make("p", { className: "muted", textContent: "…" });
new IntersectionObserver((seen) => { if (seen.some((one) => one.isIntersecting)) more(); }, { rootMargin: "1500px" }).observe(end);

function choice(one) {
  const box = make("input", { type: "checkbox", checked: chosen.includes(key(one)) });
  box.addEventListener("change", () => {
    chosen = chosen.filter((other) => other !== key(one));
    if (box.checked) chosen = [...chosen.slice(-1), key(one)];
    draw.boxes();
    drawChosen();
  });
  box.dataset.key = key(one);
  return make("label", {}, box, " compare");
}
draw.boxes = () => { for (const box of main.querySelectorAll("input[data-key]")) box.checked = chosen.includes(box.dataset.key); };

function links(one) {
  const found = make("div", { className: "links" });
  if (one.page) found.append(make("a", { href: one.base + one.page, textContent: "page" }));
  found.append(make("a", { href: one.base + one.record, textContent: "record" }), make("a", { href: one.base || ".", textContent: "folder" }), choice(one));
  return found;
}

function card(one) {
  const cover = make("a", { className: "cover", href: one.base + (one.page || one.record) });
  cover.append(one.cover ? image(one.cover, `${one.lens}: ${title(one)}`) : make("span", { textContent: one.lens }));
  const facts = [one.lens, one.model, one.date.replace("T", " ")].filter(Boolean).join(" · ");
  const body = make("div", { className: "body" }, make("h2", { textContent: title(one) }), make("p", { className: "muted", textContent: facts }), make("p", { className: "muted", textContent: one.folder }), links(one));
  return make("article", {}, cover, body);
}

function row(one, columns) {
  const head = make("th", { scope: "row" }, title(one), make("p", { className: "muted", textContent: `${one.lens} · ${one.folder}` }), links(one));
  const cells = columns.map((name) => {
    const cell = make("td");
    if (name in one.images) cell.append(make("a", { href: one.base + one.images[name] }, image(one.base + one.images[name], `${name}, ${title(one)}`)));
    return cell;
  });
  return make("tr", {}, head, ...cells);
}

// ---- comparing two

const dialog = find(document, "#comparison");
function drawChosen() {
  chosenBar.hidden = !chosen.length;
  find(chosenBar, ".compare").disabled = chosen.length < 2;
  find(chosenBar, "span").textContent = chosen.length < 2 ? "Choose another result to compare with." : "Two results chosen.";
}
find(chosenBar, ".clear").addEventListener("click", () => { chosen = []; draw.boxes(); drawChosen(); });
find(chosenBar, ".compare").addEventListener("click", () => {
  const two = chosen.map((wanted) => results.find((one) => key(one) === wanted));
  const names = Object.keys(two[0].images).filter((name) => name in two[1].images);
  const slider = find(dialog, ".which"), mode = find(dialog, ".mode"), amount = find(dialog, ".amount");
  const [one, other] = dialog.querySelectorAll("figure");
  slider.max = Math.max(0, names.length - 1);
  slider.value = 0;
  const show = () => {
    const name = names[slider.value], blends = mode.value === "blend";
    find(dialog, "output").textContent = name || "they have no image of the same name";
    slider.setAttribute("aria-valuetext", name || "");
    amount.hidden = !blends;
    other.hidden = blends;
    const over = find(one, ".over");
    over.hidden = !blends;
    over.style.opacity = find(amount, "input").value / 100;
    for (const [side, target, result] of [[one, find(one, "img"), two[0]], [other, find(other, "img"), two[1]], [null, over, two[1]]]) {
      target.hidden = !name || (target === over && !blends);
      if (name) Object.assign(target, { src: result.base + result.images[name], alt: `${name}, ${title(result)}` });
      if (side) find(side, "figcaption").textContent = `${title(result)} (${result.folder})`;
    }
    if (blends) find(one, "figcaption").textContent = `${title(two[0])} | ${title(two[1])}`;
  };
  for (const control of [slider, mode, amount]) control.oninput = show;
  const settings = [...new Set(two.flatMap((result) => Object.keys(result.settings)))];
  find(dialog, "tbody").replaceChildren(...settings.map((name) => {
    const values = two.map((result) => result.settings[name] ?? "");
    const line = make("tr", { className: values[0] === values[1] ? "" : "differs" }, make("th", { scope: "row", textContent: name }));
    line.append(...values.map((value) => make("td", { textContent: value })));
    return line;
  }));
  show();
  dialog.showModal();
});
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], slider = find(dialog, ".which");
  if (!step || event.target.matches("select, input")) return;
  slider.value = Number(slider.value) + step;
  slider.oninput();
});

filters.addEventListener("input", draw);
filters.addEventListener("reset", () => setTimeout(draw));
filters.addEventListener("submit", (event) => event.preventDefault());
setInterval(() => {
  const again = make("script", { src: `${DATA}?${Date.now()}` });
  again.addEventListener("load", () => again.remove());
  again.addEventListener("error", () => again.remove());
  document.body.append(again);
}, EVERY);
