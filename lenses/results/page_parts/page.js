"use strict";
const find = (within, what) => within.querySelector(what);
const all = (within, what) => [...within.querySelectorAll(what)];
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const shown = (value) => (value === null ? "none" : Math.abs(value) >= 0.001 || value === 0 ? value.toFixed(3) : value.toExponential(2));
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

const viewer = find(document, "#viewer");
let turnPage = () => {};
function openViewer(image, name) {
  const large = find(viewer, "img");
  large.src = image.src;
  large.alt = image.alt;
  const width = Number(image.getAttribute("width")) || image.naturalWidth;
  large.width = width * Math.max(1, Math.floor(448 / width));
  large.classList.toggle("small", width < 224);
  find(viewer, "p").textContent = name;
  if (!viewer.open) viewer.showModal();
}
viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener("keydown", (event) => {
  if (event.key in MOVES) { event.preventDefault(); turnPage(MOVES[event.key]); }
});

for (const section of all(document, "section.images")) {
  const buttons = all(section, ".sheet button");
  const rows = all(section, ".sheet").map((sheet) => all(sheet, "button"));
  const [one, other, slider, audio] = [".one", ".other", ".which", "audio"].map((what) => find(section, what));
  const [choice, mode, amount] = [".with", ".mode", ".amount"].map((what) => find(section, what));
  const over = find(one, ".over");
  let current = 0;
  const put = (figure, image, button) => {
    const from = find(button, "img");
    image.src = from.src;
    image.alt = from.alt;
    image.classList.toggle("small", Number(from.getAttribute("width")) < 224);
    find(figure, "figcaption").textContent = button.dataset.name;
  };
  const draw = () => {
    buttons.forEach((button, i) => button.setAttribute("aria-current", i === current));
    slider.value = current;
    slider.setAttribute("aria-valuetext", buttons[current].dataset.name);
    put(one, find(one, "img"), buttons[current]);
    const sound = find(buttons[current], "img").dataset.sound;
    audio.hidden = !sound;
    if (sound) audio.src = sound;
    const second = choice && choice.value !== "" ? buttons[choice.value] : null;
    if (!choice) return;
    mode.hidden = !second;
    const blends = second && find(mode, "select").value === "blend";
    amount.hidden = over.hidden = !blends;
    other.hidden = !second || blends;
    if (blends) {
      put(one, over, second);
      over.style.opacity = find(amount, "input").value / 100;
      find(one, "figcaption").textContent = `${buttons[current].dataset.name} | ${second.dataset.name}`;
    } else if (second) put(other, find(other, "img"), second);
  };
  const go = (number) => { current = clamp(number, 0, buttons.length - 1); draw(); };
  const move = ([down, across]) => {
    if (rows.length === 1 || across) return go(current + down + across);
    const row = rows.findIndex((cells) => cells.includes(buttons[current]));
    const next = rows[clamp(row + down, 0, rows.length - 1)];
    go(buttons.indexOf(next[Math.min(rows[row].indexOf(buttons[current]), next.length - 1)]));
  };
  const open = (button) => {
    turnPage = (step) => { move(step); open(buttons[current]); };
    openViewer(find(button, "img"), button.dataset.name);
  };
  buttons.forEach((button, i) => button.addEventListener("click", () => (i === current ? open(button) : go(i))));
  buttons.forEach((button) => button.addEventListener("dblclick", () => open(button)));
  slider.addEventListener("input", () => go(Number(slider.value)));
  find(one, ".picture").addEventListener("click", () => open(buttons[current]));
  if (choice) {
    find(other, ".picture").addEventListener("click", () => open(buttons[choice.value]));
    for (const control of [choice, mode, amount]) control.addEventListener("input", draw);
  }
  section.addEventListener("keydown", (event) => {
    if (!(event.key in MOVES) || event.target.matches("select, input, audio")) return;
    event.preventDefault();
    move(MOVES[event.key]);
    if (event.target.closest(".sheet")) buttons[current].focus();
  });
  draw();
}

for (const section of all(document, "section.table")) {
  const rows = all(section, "tbody tr").map((row) => all(row, "td"));
  const heads = all(section, "thead th").slice(1).map((head) => head.textContent);
  for (const [i, cells] of rows.entries()) for (const [j, cell] of cells.entries()) {
    if (cell.textContent.length > 40) cell.classList.add("wide");
    const show = () => {
      const name = cell.parentElement.firstElementChild.textContent;
      const details = JSON.parse(cell.dataset.details || "[]").map(([text, value]) => `${JSON.stringify(text)} ${shown(value)}`);
      find(section, ".readout").textContent = `${find(section, "thead th").textContent} ${name}, ${heads[j]}: ${details.join("   ")}`;
    };
    if (!cell.dataset.details) continue;
    cell.addEventListener("focus", show);
    cell.addEventListener("mouseenter", show);
    cell.addEventListener("keydown", (event) => {
      if (!(event.key in MOVES)) return;
      event.preventDefault();
      const [down, across] = MOVES[event.key];
      rows[clamp(i + down, 0, rows.length - 1)][clamp(j + across, 0, cells.length - 1)].focus();
    });
  }
}

for (const section of all(document, "section.curves")) {
  const plot = find(section, "svg"), cursor = find(plot, ".cursor");
  const across = JSON.parse(plot.dataset.across), places = JSON.parse(plot.dataset.places);
  let current = -1;
  const show = (number) => {
    current = clamp(number, 0, places.length - 1);
    cursor.removeAttribute("hidden");
    cursor.setAttribute("x1", across[current]);
    cursor.setAttribute("x2", across[current]);
    const texts = all(section, ".legend li").map((line) => {
      const value = JSON.parse(line.dataset.values)[current];
      find(line, "output").textContent = shown(value);
      return `${line.textContent.trim()}`;
    });
    find(section, ".readout").textContent = `${places[current]}: ${texts.join(", ").replace(/\s+/g, " ")}`;
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * plot.viewBox.baseVal.width + plot.viewBox.baseVal.x;
    show(across.reduce((best, at, i) => (Math.abs(at - x) < Math.abs(across[best] - x) ? i : best), 0));
  });
  plot.addEventListener("keydown", (event) => {
    if (!(event.key in MOVES)) return;
    event.preventDefault();
    show(current + MOVES[event.key][0] + MOVES[event.key][1]);
  });
}

for (const map of all(document, ".map")) {
  const [rows, columns, values] = ["rows", "columns", "values"].map((name) => JSON.parse(map.dataset[name]));
  const cells = find(map, ".cells"), mark = find(map, ".mark");
  const readout = find(map.closest("section"), ".readout");
  let at = [0, 0];
  const show = (row, column) => {
    at = [clamp(row, 0, rows.length - 1), clamp(column, 0, columns.length - 1)];
    const [width, height] = [100 / columns.length, 100 / rows.length];
    Object.assign(mark.style, { left: `${at[1] * width}%`, top: `${at[0] * height}%`, width: `${width}%`, height: `${height}%` });
    mark.hidden = false;
    readout.textContent = `${rows[at[0]]}, ${columns[at[1]]}: ${shown(values[at[0]][at[1]])}`;
  };
  cells.addEventListener("pointermove", (event) => {
    const box = cells.getBoundingClientRect();
    show(Math.floor(((event.clientY - box.top) / box.height) * rows.length), Math.floor(((event.clientX - box.left) / box.width) * columns.length));
  });
  cells.addEventListener("keydown", (event) => {
    if (!(event.key in MOVES)) return;
    event.preventDefault();
    show(at[0] + MOVES[event.key][0], at[1] + MOVES[event.key][1]);
  });
}

for (const section of all(document, "section.overlay")) {
  const laid = find(section, ".laid"), over = find(laid, ".over"), words = find(laid, ".words");
  const maps = JSON.parse(laid.dataset.maps), slider = find(section, ".which"), boxes = find(section, ".show");
  const amount = find(section, ".amount");
  const draw = () => {
    const map = maps[slider.value];
    over.src = map.source;
    over.alt = `${laid.dataset.label}, ${map.name}`;
    over.style.opacity = amount.value / 100;
    find(section, ".name").textContent = map.name;
    slider.setAttribute("aria-valuetext", map.name);
    words.replaceChildren();
    if (!map.words || !boxes.checked) return;
    words.style.gridTemplate = `repeat(${map.rows}, 1fr) / repeat(${map.columns}, 1fr)`;
    words.style.fontSize = `min(0.85rem, ${(laid.clientWidth / map.columns / 4).toFixed(1)}px)`;
    for (const word of map.words.flat()) words.append(Object.assign(document.createElement("span"), { textContent: word }));
  };
  for (const control of [slider, amount, boxes]) if (control) control.addEventListener("input", draw);
  laid.addEventListener("keydown", (event) => {
    if (!(event.key in MOVES)) return;
    event.preventDefault();
    slider.value = Number(slider.value) + MOVES[event.key][0] + MOVES[event.key][1];
    draw();
  });
  laid.addEventListener("pointermove", (event) => {
    const map = maps[slider.value], box = laid.getBoundingClientRect();
    const row = clamp(Math.floor(((event.clientY - box.top) / box.height) * map.rows), 0, map.rows - 1);
    const column = clamp(Math.floor(((event.clientX - box.left) / box.width) * map.columns), 0, map.columns - 1);
    const word = map.words ? ` ${JSON.stringify(map.words[row][column])}` : "";
    find(section, ".readout").textContent = `row ${row}, column ${column}:${word} ${shown(map.values[row][column])}`;
  });
  draw();
}

const copy = find(document, "#copy");
if (copy) copy.addEventListener("click", async () => {
  const code = find(document, "#code");
  try {
    await navigator.clipboard.writeText(code.textContent);
    copy.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code);
    copy.textContent = "Press Ctrl+C";
  }
});
