// The report's behaviour. Names and notes come from users: text goes in as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
// Only errors are logged: an empty chart (no run chosen) is none.
const options = { renderer: "svg", actions: false, logLevel: 1, tooltip: { theme: "custom" } };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ── charts

const drawn = [];
for (const figure of document.querySelectorAll("[data-chart]")) {
  const spec = data.charts[figure.dataset.chart];
  if (spec) drawn.push(window.vegaEmbed(figure, spec, options));
  else figure.remove();
}

// ── learning curves

let curveView = null;

function curveRows(metric, boxes) {
  const points = data.curves.points[metric];
  return boxes
    .filter((box) => box.checked && points[box.value])
    .flatMap((box) =>
      points[box.value].map(([epoch, value]) => ({
        run: box.value, ...data.curves.runs[box.value], epoch, value,
      })),
    );
}

async function startCurves() {
  const figure = byId("curve-chart");
  if (!figure) return;
  const boxes = [...byId("curve-runs").querySelectorAll("input")];
  const metric = byId("curve-metric");
  let last = Promise.resolve();

  // Drawn anew each time, one after the other: the labels of the y axis need their own room.
  function show() {
    last = last.then(async () => {
      const values = curveRows(metric.value, boxes);
      curveView?.finalize();
      curveView = await window.vegaEmbed(
        figure, { ...data.curves.spec, data: { name: "curves", values } }, options,
      );
    });
    return last;
  }
  const wanted = { all: () => true, none: () => false, best: (box) => "best" in box.dataset };
  for (const button of document.querySelectorAll("[data-curves]")) {
    button.addEventListener("click", () => {
      for (const box of boxes) box.checked = wanted[button.dataset.curves](box);
      show();
    });
  }
  for (const control of [metric, ...boxes]) control.addEventListener("change", show);
  if (boxes.length > 16) for (const box of boxes) box.checked = wanted.best(box);
  await show();
}

// ── pictures

const kindOf = () => document.querySelector("input[name=kind]:checked").value;
const ofPair = (kind) => kind === "fixed" || kind === "broken";

function fillClasses(select, classes) {
  const before = select.value;
  select.replaceChildren(
    make("option", { value: "", textContent: "any" }),
    ...classes.map((name, i) => make("option", { value: String(i), textContent: name })),
  );
  select.value = before < classes.length ? before : "";
}

function makeCard([key, truth, predicted, confidence, other], classes, pair) {
  const picture = data.pictures[key];
  const text = `${classes[truth]}, predicted ${classes[predicted]}`;
  const image = picture
    ? make("img", { src: picture, alt: `Picture of ${text}` })
    : make("span", { className: "blank", textContent: `#${key.split(":")[1]}` });
  const wrong = truth !== predicted;
  const answer = make("span", { className: wrong ? "wrong" : "", textContent: classes[predicted] });
  const caption = make("p", {});
  if (pair) {
    const second = make("span", {
      className: other === truth ? "" : "wrong", textContent: classes[other],
    });
    const is = `is ${classes[truth]}`;
    caption.append(is, make("br"), `${pair.first}: `, answer, make("br"), `${pair.second}: `, second);
  } else {
    const share = ` ${(100 * confidence).toFixed(confidence < 0.9995 ? 1 : 0)} %`;
    if (wrong) caption.append(`${classes[truth]} → `);
    caption.append(answer, make("small", { textContent: share }));
  }
  const bar = make("span", { className: wrong ? "bar off" : "bar" }, make("i"));
  bar.firstChild.style.width = `${100 * confidence}%`;
  return make("li", { title: `image ${key.split(":")[1]}: ${text}` }, image, bar, caption);
}

const CARDS_AT_FIRST = 36;

function showPictures(limit = CARDS_AT_FIRST) {
  const kind = kindOf();
  const pair = ofPair(kind) ? data.pair : null;
  const run = data.runs[byId("picture-run").value];
  const { classes } = pair ?? run;
  byId("picture-run-label").hidden = Boolean(pair);
  const selects = [byId("picture-truth"), byId("picture-predicted")];
  for (const select of selects) fillClasses(select, classes);
  const [truth, predicted] = selects.map((select) => select.value);
  const all = (pair ?? run)[kind];
  const items = all.filter(
    (item) => (truth === "" || item[1] === +truth) && (predicted === "" || item[2] === +predicted),
  );
  const shown = items.slice(0, limit);
  byId("cards").replaceChildren(...shown.map((item) => makeCard(item, classes, pair)));
  byId("picture-more").hidden = shown.length === items.length;
  byId("picture-more").textContent = `Show all ${items.length}`;
  const mistakes = run.confusion.flatMap((row, i) => row.filter((_, j) => i !== j));
  const total = pair ? pair.total[kind] : mistakes.reduce((sum, count) => sum + count, 0);
  const images = (n) => `${n} image${n === 1 ? "" : "s"}`;
  const partial = kind !== "samples" && total > all.length;
  const of = partial ? `; ${all.length} of ${total} are on this page` : "";
  byId("picture-count").textContent = `${images(items.length)}${of}`;
}

function startPictures() {
  if (!byId("cards")) return;
  const controls = [...document.querySelectorAll("input[name=kind], #pictures select")];
  for (const control of controls) control.addEventListener("change", () => showPictures());
  byId("picture-more").addEventListener("click", () => {
    showPictures(Infinity);
    byId("picture-truth").focus({ preventScroll: true });  // the button is gone
  });
  showPictures();
}

// ── confusion matrices

function showMatrix(table, index) {
  const { classes, confusion } = data.runs[index];
  const long = classes.some((name) => name.length > 2) ? "long" : "";
  const head = classes.map((name) => make("th", { scope: "col", className: long, textContent: name }));
  const worst = Math.max(1, ...confusion.flatMap((row, i) => row.filter((_, j) => i !== j)));
  const rows = confusion.map((row, i) => {
    const total = row.reduce((sum, count) => sum + count, 0) || 1;
    const cells = row.map((count, j) => {
      const cell = make("td");
      const depth = i === j ? 0.08 + 0.4 * (count / total) : count && 0.15 + 0.55 * (count / worst);
      cell.style.setProperty("--shade", i === j ? "var(--right)" : "var(--wrong)");
      cell.style.setProperty("--depth", depth.toFixed(3));
      if (i === j || !count) {
        cell.append(make("span", { textContent: count || "" }));
        return cell;
      }
      const button = make("button", { type: "button", textContent: count });
      button.setAttribute("aria-label", `${count}: ${classes[i]} taken for ${classes[j]}; show`);
      button.addEventListener("click", () => showMistakes(index, i, j));
      cell.append(button);
      return cell;
    });
    return make("tr", {}, make("th", { scope: "row", textContent: classes[i] }), ...cells);
  });
  table.replaceChildren(
    make("thead", {}, make("tr", {}, make("td"), ...head)),
    make("tbody", {}, ...rows),
  );
}

function showMistakes(index, truth, predicted) {
  document.querySelector("input[name=kind][value=mistakes]").checked = true;
  byId("picture-run").value = index;
  showPictures();
  byId("picture-truth").value = truth;
  byId("picture-predicted").value = predicted;
  showPictures();
  byId("pictures").scrollIntoView();
  byId("picture-truth").focus({ preventScroll: true });
}

function startMatrices() {
  for (const select of document.querySelectorAll(".confusion-run")) {
    const table = select.closest("div").querySelector("table");
    const show = () => showMatrix(table, Number(select.value));
    select.addEventListener("change", show);
    show();
  }
}

// ── all

window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
startPictures();
startMatrices();
await Promise.all([...drawn, startCurves()]);
document.body.dataset.ready = "true";
