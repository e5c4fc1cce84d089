// The second tab: attention, logit lens, disabled heads, nearest neighbors of embeddings.

import { latest } from "./api.js";
import { bars, byId, element, guarded, percent, state, visible } from "./shared.js";
import { TokenView } from "./words.js";

const MAX_TOKENS = 128; // the last ones of the text
const MIN_WEIGHT = 0.02; // smaller attention weights are not drawn
const fetchAttention = latest("/api/look"), fetchLens = latest("/api/lens"), fetchNeighbors = latest("/api/neighbors");
let layer = 0, head = 0, trace = null, stale = true;
const off = new Set();

const tokenView = new TokenView(byId("seen"), guarded(showToken), () => {});

export function init() {
  const { n_layer } = state.run;
  byId("layers").append("Layer", ...Array.from({ length: n_layer }, (_, n) => {
    const radio = element("input", { type: "radio", name: "layer", value: n, checked: n === 0,
      onchange: guarded(() => { layer = n; return refresh(); }) });
    return element("label", {}, radio, ` ${n + 1}`);
  }));
  for (const radio of document.querySelectorAll("[name=shape]")) radio.addEventListener("change", drawAttention);
  state.changed.addEventListener("text", () => { stale = true; if (!byId("inside").hidden) guarded(onOpen)(); });
  addEventListener("resize", drawAttention);
}

// Refreshes the tab when it is opened, if the text has changed.
export async function onOpen() {
  if (!stale && trace) return drawAttention();
  await refresh();
  if (trace) { stale = false; tokenView.point(trace.tokens.length - 1); }
}

async function refresh() {
  const ids = state.tokens.slice(-MAX_TOKENS).map((token) => token.id);
  const prompt = ids.length ? { ids } : { text: byId("prompt").value };
  const response = await fetchAttention({ ...prompt, layer, off: [...off] });
  if (!response) return;
  const bytes = Uint8Array.from(atob(response.attention), (c) => c.charCodeAt(0));
  const before = trace?.tokens.length;
  trace = { ...response, bytes, count: response.tokens.length };
  const shown = state.tokens.length > MAX_TOKENS ? `the last ${MAX_TOKENS} tokens of the text` : "the text from the Generate tab";
  byId("inside-what").textContent = `This is ${shown}. Select a layer and a head, then hover over a token to see what it attends to.`;
  const at = tokenView.at >= 0 && before === trace.count ? tokenView.at : trace.count - 1;
  tokenView.show(trace.tokens.map(([id, text, name]) => ({ id, text, name, probability: null })));
  showHeads();
  const maxShare = Math.max(...[...trace.usual, ...trace.without].map(([, , share]) => share));
  const without = new Map(trace.without.map(([id, , share]) => [id, share]));
  const all = new Map([...trace.usual, ...trace.without].map((row) => [row[0], row]));
  const usual = new Map(trace.usual.map(([id, , share]) => [id, share]));
  const rows = [...all.values()].slice(0, 12).map(([id, name]) => [id, name, usual.get(id) ?? 0, without.get(id) ?? 0]);
  if (off.size) bars(byId("without"), rows, { scale: maxShare, format: (a, b) => `${percent(a)} → ${percent(b)}` });
  else bars(byId("without"), trace.usual, { scale: maxShare });
  tokenView.point(at);
}

const weight = (index, from, to) => trace.bytes[(index * trace.count + from) * trace.count + to] / 255;

function showHeads() {
  const { n_head } = state.run;
  const focused = document.activeElement?.dataset?.focus;
  byId("heads").replaceChildren(...Array.from({ length: n_head }, (_, n) => {
    const number = layer * n_head + n;
    const canvas = drawWeights(n);
    const choose = element("button", { type: "button", ariaPressed: String(n === head),
      onclick: () => { head = n; showHeads(); drawAttention(); } }, canvas, `head ${n + 1}`);
    choose.dataset.focus = `head ${n}`;
    const box = element("input", { type: "checkbox", checked: off.has(number), onchange: guarded((event) => {
      if (event.target.checked) off.add(number); else off.delete(number);
      return refresh();
    }) });
    box.ariaLabel = `disable head ${n + 1} of layer ${layer + 1}`;
    box.dataset.focus = `off ${n}`;
    const card = element("div", { className: "head" }, choose, element("small", {}, describeHead(n)), element("label", {}, box, " disable"));
    card.classList.toggle("chosen", n === head);
    card.classList.toggle("off", off.has(number));
    return card;
  }));
  if (focused) byId("heads").querySelector(`[data-focus="${focused}"]`)?.focus();
}

// A head's attention weights as an image: a row for each token, a column for each it attends to.
function drawWeights(index) {
  const canvas = element("canvas", { width: trace.count, height: trace.count, ariaHidden: "true" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(trace.count, trace.count);
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink-rgb").split(",").map(Number);
  const offset = index * trace.count ** 2;
  for (let n = 0; n < trace.count ** 2; n += 1) {
    image.data.set([...ink, Math.sqrt(trace.bytes[offset + n] / 255) * 255], 4 * n);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// Where most of a head's attention goes, on average.
function describeHead(index) {
  const sums = { "itself": 0, "the previous token": 0, "the first token": 0 };
  if (trace.count < 4) return "";
  for (let t = 2; t < trace.count; t += 1) {
    sums["itself"] += weight(index, t, t);
    sums["the previous token"] += weight(index, t, t - 1);
    sums["the first token"] += weight(index, t, 0);
  }
  const [target, sum] = Object.entries(sums).sort((a, b) => b[1] - a[1])[0];
  const share = sum / (trace.count - 2);
  return share > 0.25 ? `mostly attends to ${target} (${percent(share)})` : "spread over many tokens";
}

// Shows a token's attention, logit lens and neighbors.
async function showToken(n) {
  if (!trace) return;
  drawAttention();
  const [id, , name] = trace.tokens[n];
  byId("whose").textContent = `“${visible(name)}”`;
  for (const after of document.querySelectorAll(".after")) after.textContent = `after “${visible(name)}”`;
  const ids = trace.tokens.map(([token]) => token);
  const shown = [ // each as soon as it arrives; the fastest is requested first
    fetchNeighbors({ id }).then((near) => near && bars(byId("neighbors"), near.likely, { format: (share) => share.toFixed(2) })),
    fetchLens({ ids, position: n, off: [...off] }).then((lens) => lens && showLens(lens.layers)),
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

// Draws the chosen head's attention from the current token, as lines or shades.
function drawAttention() {
  const svg = d3.select("#lines");
  svg.selectAll("path").remove();
  if (!trace || tokenView.at < 0 || byId("inside").hidden) return;
  const shades = document.querySelector("[name=shape]:checked").value === "shades";
  const from = tokenView.at, row = Array.from({ length: trace.count }, (_, to) => weight(head, from, to));
  tokenView.spans.forEach((span, to) => {
    span.style.background = shades && row[to] > MIN_WEIGHT / 4 ? `rgba(var(--look), ${Math.sqrt(row[to])})` : "";
  });
  const first = row.map((share, to) => [share, to]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([share]) => share >= MIN_WEIGHT);
  const names = first.map(([share, to]) => `“${visible(trace.tokens[to][2])}” ${percent(share)}`);
  byId("attends").textContent = `Layer ${layer + 1}, head ${head + 1}: “${visible(trace.tokens[from][2])}” attends to ${names.join(", ")}.`;
  if (shades) return;
  const frame = byId("lines").getBoundingClientRect();
  const place = (n) => {
    const box = tokenView.spans[n].getClientRects()[0] ?? tokenView.spans[n].getBoundingClientRect();
    return [(box.left + box.right) / 2 - frame.left, box.top - frame.top, box.height];
  };
  const [x, y, height] = place(from);
  const lines = row.map((share, to) => ({ share, to })).filter(({ share }) => share >= MIN_WEIGHT);
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
