// The second tab: attention, the logit lens, heads switched off, neighbours.

import { latest } from "./api.js";
import { bars, byId, element, guarded, percent, state, visible } from "./shared.js";
import { Words } from "./words.js";

const MOST = 128; // tokens, the last ones
const LEAST = 0.02; // of a weight that is drawn
const asLook = latest("/api/look"), asLens = latest("/api/lens"), asNeighbours = latest("/api/neighbours");
let layer = 0, head = 0, look = null, stale = true;
const off = new Set();

const words = new Words(byId("seen"), guarded(show), () => {});

export function begin() {
  const { n_layer } = state.run;
  byId("layers").append("Layer", ...Array.from({ length: n_layer }, (_, n) => {
    const radio = element("input", { type: "radio", name: "layer", value: n, checked: n === 0,
      onchange: guarded(() => { layer = n; return refresh(); }) });
    return element("label", {}, radio, ` ${n + 1}`);
  }));
  for (const radio of document.querySelectorAll("[name=shape]")) radio.addEventListener("change", paint);
  state.changed.addEventListener("text", () => { stale = true; if (!byId("inside").hidden) guarded(opened)(); });
  addEventListener("resize", paint);
}

// The tab is looked at: what it shows is of the text as it is now.
export async function opened() {
  if (!stale && look) return paint();
  await refresh();
  if (look) { stale = false; words.point(look.tokens.length - 1); }
}

async function refresh() {
  const ids = state.tokens.slice(-MOST).map((token) => token.id);
  const from = ids.length ? { ids } : { text: byId("prompt").value };
  const found = await asLook({ ...from, layer, off: [...off] });
  if (!found) return;
  const bytes = Uint8Array.from(atob(found.attention), (c) => c.charCodeAt(0));
  const before = look?.tokens.length;
  look = { ...found, bytes, count: found.tokens.length };
  const shown = state.tokens.length > MOST ? `the last ${MOST} tokens of the text` : "the text of the first tab";
  byId("inside-what").textContent = `This is ${shown}, as the model reads it. Choose a layer and one of its heads; then point at a word, to see where it looks.`;
  const at = words.at >= 0 && before === look.count ? words.at : look.count - 1;
  words.show(look.tokens.map(([id, text, name]) => ({ id, text, name, probability: null })));
  showHeads();
  const most = Math.max(...[...look.usual, ...look.without].map(([, , share]) => share));
  const without = new Map(look.without.map(([id, , share]) => [id, share]));
  const all = new Map([...look.usual, ...look.without].map((row) => [row[0], row]));
  const usual = new Map(look.usual.map(([id, , share]) => [id, share]));
  const rows = [...all.values()].slice(0, 12).map(([id, name]) => [id, name, usual.get(id) ?? 0, without.get(id) ?? 0]);
  if (off.size) bars(byId("without"), rows, { scale: most, say: (a, b) => `${percent(a)} → ${percent(b)}` });
  else bars(byId("without"), look.usual, { scale: most });
  words.point(at);
}

const weight = (which, from, to) => look.bytes[(which * look.count + from) * look.count + to] / 255;

function showHeads() {
  const { n_head } = state.run;
  const focused = document.activeElement?.dataset?.focus;
  byId("heads").replaceChildren(...Array.from({ length: n_head }, (_, n) => {
    const number = layer * n_head + n;
    const canvas = picture(n);
    const choose = element("button", { type: "button", ariaPressed: String(n === head),
      onclick: () => { head = n; showHeads(); paint(); } }, canvas, `head ${n + 1}`);
    choose.dataset.focus = `head ${n}`;
    const box = element("input", { type: "checkbox", checked: off.has(number), onchange: guarded((event) => {
      if (event.target.checked) off.add(number); else off.delete(number);
      return refresh();
    }) });
    box.ariaLabel = `head ${n + 1} of layer ${layer + 1} off`;
    box.dataset.focus = `off ${n}`;
    const card = element("div", { className: "head" }, choose, element("small", {}, habit(n)), element("label", {}, box, " off"));
    card.classList.toggle("chosen", n === head);
    card.classList.toggle("off", off.has(number));
    return card;
  }));
  if (focused) byId("heads").querySelector(`[data-focus="${focused}"]`)?.focus();
}

// A head's weights as a picture: a row for each token, a column for each that it may look at.
function picture(which) {
  const canvas = element("canvas", { width: look.count, height: look.count, ariaHidden: "true" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(look.count, look.count);
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink-rgb").split(",").map(Number);
  const begin = which * look.count ** 2;
  for (let n = 0; n < look.count ** 2; n += 1) {
    image.data.set([...ink, Math.sqrt(look.bytes[begin + n] / 255) * 255], 4 * n);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// What a head looks at most, on the average.
function habit(which) {
  const sums = { "itself": 0, "the token before": 0, "the first token": 0 };
  if (look.count < 4) return "";
  for (let t = 2; t < look.count; t += 1) {
    sums["itself"] += weight(which, t, t);
    sums["the token before"] += weight(which, t, t - 1);
    sums["the first token"] += weight(which, t, 0);
  }
  const [what, sum] = Object.entries(sums).sort((a, b) => b[1] - a[1])[0];
  const share = sum / (look.count - 2);
  return share > 0.25 ? `mostly at ${what} (${percent(share)})` : "spread over many tokens";
}

// A token is pointed at.
async function show(n) {
  if (!look) return;
  paint();
  const [id, , name] = look.tokens[n];
  byId("whose").textContent = `“${visible(name)}”`;
  for (const after of document.querySelectorAll(".after")) after.textContent = `after “${visible(name)}”`;
  const ids = look.tokens.map(([one]) => one);
  const shown = [ // each when it is there; what takes less time is asked first
    asNeighbours({ id }).then((near) => near && bars(byId("neighbours"), near.likely, { say: (share) => share.toFixed(2) })),
    asLens({ ids, position: n, off: [...off] }).then((lens) => lens && showLens(lens.layers)),
  ];
  await Promise.all(shown);
}

function showLens(layers) {
  byId("lens").tBodies[0].replaceChildren(...layers.map((likely, n) => {
    const [[, first, share], ...rest] = likely;
    const then = rest.slice(0, 3).flatMap(([, name]) => [element("code", {}, visible(name)), " "]);
    return element("tr", {}, element("th", { scope: "row" }, n ? `layer ${n}` : "embedding"),
      element("td", {}, element("code", {}, visible(first)), ` ${percent(share)}`), element("td", {}, ...then));
  }));
}

// Where the token that is pointed at looks, with the chosen head.
function paint() {
  const svg = d3.select("#lines");
  svg.selectAll("path").remove();
  if (!look || words.at < 0 || byId("inside").hidden) return;
  const shades = document.querySelector("[name=shape]:checked").value === "shades";
  const from = words.at, row = Array.from({ length: look.count }, (_, to) => weight(head, from, to));
  words.spans.forEach((span, to) => {
    span.style.background = shades && row[to] > LEAST / 4 ? `rgba(var(--look), ${Math.sqrt(row[to])})` : "";
  });
  const first = row.map((share, to) => [share, to]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([share]) => share >= LEAST);
  const names = first.map(([share, to]) => `“${visible(look.tokens[to][2])}” ${percent(share)}`);
  byId("attends").textContent = `Layer ${layer + 1}, head ${head + 1}: “${visible(look.tokens[from][2])}” looks at ${names.join(", ")}.`;
  if (shades) return;
  const frame = byId("lines").getBoundingClientRect();
  const place = (n) => {
    const box = words.spans[n].getClientRects()[0] ?? words.spans[n].getBoundingClientRect();
    return [(box.left + box.right) / 2 - frame.left, box.top - frame.top, box.height];
  };
  const [x, y, height] = place(from);
  const lines = row.map((share, to) => ({ share, to })).filter(({ share }) => share >= LEAST);
  svg.selectAll("path").data(lines).join("path")
    .attr("d", ({ to }) => {
      const [u, v] = place(to);
      const bend = Math.min(60, 14 + Math.abs(u - x) / 6);
      return to === from ? `M${x - 5},${y}C${x - 9},${y - 16} ${x + 9},${y - 16} ${x + 5},${y}`
        : v < y - height / 2 ? d3.linkVertical()({ source: [x, y], target: [u, v + height] })
          : `M${x},${y}Q${(x + u) / 2},${y - bend} ${u},${v}`;
    })
    .attr("stroke-width", ({ share }) => 0.5 + 5 * share).attr("opacity", ({ share }) => 0.25 + 0.75 * share);
}
