// The Inspect tab: attention, logit lens, disabled heads, nearest neighbors of embeddings.

import { fetchAttention, fetchLogitLens, fetchNeighbors } from "./api.js";
import { decimal, t } from "./language.js";
import { byId, element, guarded, percent, renderBars, state, visible } from "./shared.js";
import { TokenView } from "./token_view.js";

const MAX_TOKENS = 128; // longer texts are cut to their last tokens
const MIN_WEIGHT = 0.02; // smaller attention weights are not drawn
let layer = 0, head = 0, trace = null, stale = true;
const disabledHeads = new Set();

const tokenView = new TokenView(byId("inspected-text"), guarded(showToken), () => {});

export function init() {
  const { n_layer } = state.run;
  byId("layers").append(t`Layer`, ...Array.from({ length: n_layer }, (_, n) => {
    const radio = element("input", { type: "radio", name: "layer", value: n, checked: n === 0,
      onchange: guarded(() => { layer = n; return refresh(); }) });
    return element("label", {}, radio, ` ${n + 1}`);
  }));
  for (const radio of document.querySelectorAll("[name=attention-style]")) radio.addEventListener("change", drawAttention);
  state.changed.addEventListener("text", () => { stale = true; if (!byId("inspect").hidden) guarded(onOpen)(); });
  addEventListener("resize", drawAttention);
}

// Refreshes the tab when it is opened if the text has changed.
export async function onOpen() {
  if (!stale && trace) return drawAttention();
  await refresh();
  if (trace) { stale = false; tokenView.setCurrent(trace.tokens.length - 1); }
}

async function refresh() {
  const ids = state.tokens.slice(-MAX_TOKENS).map((token) => token.id);
  const prompt = ids.length ? { ids } : { text: byId("prompt").value };
  const response = await fetchAttention({ ...prompt, layer, disabled_heads: [...disabledHeads] });
  if (!response) return;
  const bytes = Uint8Array.from(atob(response.attention), (c) => c.charCodeAt(0));
  const previousCount = trace?.tokens.length;
  trace = { ...response, bytes, count: response.tokens.length };
  const shown = state.tokens.length > MAX_TOKENS ? t`the last ${MAX_TOKENS} tokens of the text` : t`the text from the Generate tab`;
  byId("inspect-info").textContent = t`This is ${shown}. Select a layer and a head, then hover over a token to see what it attends to.`;
  const current = tokenView.current >= 0 && previousCount === trace.count ? tokenView.current : trace.count - 1;
  tokenView.show(trace.tokens.map(([id, text, label]) => ({ id, text, label, probability: null })));
  showHeads();
  showNextTokens(trace.baseline_next_tokens, trace.next_tokens);
  tokenView.setCurrent(current);
}

// Shows next-token probabilities with all heads (thin bars) and without the disabled ones (thick).
function showNextTokens(baseline, ablated) {
  const list = byId("ablated-next-tokens");
  const scale = Math.max(...[...baseline, ...ablated].map(([, , prob]) => prob));
  if (!disabledHeads.size) {
    renderBars(list, baseline, { scale });
    return;
  }
  const [baselineProbs, ablatedProbs] = [baseline, ablated].map((rows) => new Map(rows.map(([id, , prob]) => [id, prob])));
  const labels = new Map([...baseline, ...ablated].map(([id, label]) => [id, label]));
  const rows = [...labels].slice(0, 12).map(([id, label]) => [id, label, baselineProbs.get(id) ?? 0, ablatedProbs.get(id) ?? 0]);
  renderBars(list, rows, { scale, format: (a, b) => `${percent(a)} → ${percent(b)}` });
}

const weight = (index, from, to) => trace.bytes[(index * trace.count + from) * trace.count + to] / 255;

function showHeads() {
  const { n_head } = state.run;
  const focused = document.activeElement?.dataset?.focus;
  byId("heads").replaceChildren(...Array.from({ length: n_head }, (_, n) => {
    const number = layer * n_head + n;
    const canvas = drawWeights(n);
    const select = element("button", { type: "button", ariaPressed: String(n === head),
      onclick: () => { head = n; showHeads(); drawAttention(); } }, canvas, t`head ${n + 1}`);
    select.dataset.focus = `head ${n}`;
    const checkbox = element("input", { type: "checkbox", checked: disabledHeads.has(number), onchange: guarded((event) => {
      if (event.target.checked) disabledHeads.add(number); else disabledHeads.delete(number);
      return refresh();
    }) });
    checkbox.ariaLabel = t`disable head ${n + 1} of layer ${layer + 1}`;
    checkbox.dataset.focus = `disable ${n}`;
    const card = element("div", { className: "head" }, select, element("small", {}, describeHead(n)), element("label", {}, checkbox, ` ${t`disable`}`));
    card.classList.toggle("selected", n === head);
    card.classList.toggle("disabled", disabledHeads.has(number));
    return card;
  }));
  if (focused) byId("heads").querySelector(`[data-focus="${focused}"]`)?.focus();
}

// A head's attention weights as an image: rows are queries, columns are keys.
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

// Describes where most of a head's attention is, on average.
function describeHead(index) {
  const targets = [[t`itself`, (n) => n], [t`the previous token`, (n) => n - 1], [t`the first token`, () => 0]];
  if (trace.count < 4) return "";
  const sums = targets.map(([name, position]) => {
    let sum = 0;
    for (let n = 2; n < trace.count; n += 1) sum += weight(index, n, position(n));
    return [name, sum];
  });
  const [target, sum] = sums.sort((a, b) => b[1] - a[1])[0];
  const share = sum / (trace.count - 2);
  return share > 0.25 ? t`mostly attends to ${target} (${percent(share)})` : t`spread over many tokens`;
}

// Shows a token's attention, logit lens and neighbors.
async function showToken(n) {
  if (!trace) return;
  drawAttention();
  const [id, , label] = trace.tokens[n];
  byId("neighbors-of").textContent = `“${visible(label)}”`;
  for (const span of document.querySelectorAll(".lens-position")) span.textContent = t`after “${visible(label)}”`;
  const ids = trace.tokens.map(([token]) => token);
  const requests = [ // each is shown as soon as it arrives; the fastest is sent first
    fetchNeighbors({ token_id: id }).then((response) => response && renderBars(byId("neighbors"), response.neighbors, { format: (cosine) => decimal(cosine, 2) })),
    fetchLogitLens({ ids, position: n, disabled_heads: [...disabledHeads] }).then((lens) => lens && showLens(lens.layers)),
  ];
  await Promise.all(requests);
}

function showLens(layers) {
  byId("lens").tBodies[0].replaceChildren(...layers.map((topTokens, n) => {
    const [[, top, prob], ...rest] = topTokens;
    const others = rest.slice(0, 3).flatMap(([, label]) => [element("code", {}, visible(label)), " "]);
    return element("tr", {}, element("th", { scope: "row" }, n ? t`layer ${n}` : t`embedding`),
      element("td", {}, element("code", {}, visible(top)), ` ${percent(prob)}`), element("td", {}, ...others));
  }));
}

// Draws the selected head's attention from the current token, as lines or as a heat map.
function drawAttention() {
  const svg = byId("attention-lines");
  svg.replaceChildren();
  if (!trace || tokenView.current < 0 || byId("inspect").hidden) return;
  const isHeatmap = document.querySelector("[name=attention-style]:checked").value === "heatmap";
  const from = tokenView.current, row = Array.from({ length: trace.count }, (_, to) => weight(head, from, to));
  tokenView.spans.forEach((span, to) => {
    span.style.background = isHeatmap && row[to] > MIN_WEIGHT / 4 ? `rgba(var(--attention), ${Math.sqrt(row[to])})` : "";
  });
  const highest = row.map((share, to) => [share, to]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([share]) => share >= MIN_WEIGHT);
  const targets = highest.map(([share, to]) => `“${visible(trace.tokens[to][2])}” ${percent(share)}`);
  const target = targets.join(", ") || t`no token with more than ${percent(MIN_WEIGHT)}`;
  byId("attention-summary").textContent = t`Layer ${layer + 1}, head ${head + 1}: “${visible(trace.tokens[from][2])}” attends to ${target}.`;
  if (isHeatmap) return;
  const frame = byId("attention-lines").getBoundingClientRect();
  const place = (n) => {
    const box = tokenView.spans[n].getClientRects()[0] ?? tokenView.spans[n].getBoundingClientRect();
    return [(box.left + box.right) / 2 - frame.left, box.top - frame.top, box.height];
  };
  const [x, y, height] = place(from);
  const curve = (to) => {
    const [u, v] = place(to), middle = (y + v + height) / 2;
    if (to === from) return `M${x - 5},${y}C${x - 9},${y - 16} ${x + 9},${y - 16} ${x + 5},${y}`;
    if (v < y - height / 2) return `M${x},${y}C${x},${middle} ${u},${middle} ${u},${v + height}`;
    return `M${x},${y}Q${(x + u) / 2},${y - Math.min(60, 14 + Math.abs(u - x) / 6)} ${u},${v}`;
  };
  row.forEach((share, to) => {
    if (share < MIN_WEIGHT) return;
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", curve(to));
    path.setAttribute("stroke-width", 0.5 + 5 * share);
    path.setAttribute("opacity", 0.25 + 0.75 * share);
    svg.append(path);
  });
}
