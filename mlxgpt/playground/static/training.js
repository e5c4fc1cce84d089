// The Training tab: loss curves, and text generated at each snapshot.

import { getCurves, streamTokens } from "./api.js";
import { decimal, localize, number, t, translate } from "./language.js";
import { byId, clearError, element, guarded, showError, state } from "./shared.js";

const REFRESH_MS = 2000; // while the run trains
const MAX_TOKENS = 80; // generated at each snapshot
let curves = null, timer = 0, running = null;
const texts = new Map();

export function init() {
  d3.formatDefaultLocale({ decimal: localize("."), thousands: localize(","), grouping: [3], currency: ["", ""] });
  byId("snapshots-prompt").value = state.run.example_prompt;
  byId("snapshots-form").addEventListener("submit", (event) => {
    event.preventDefault();
    generateAtSnapshots();
  });
  byId("snapshot").addEventListener("input", () => selectSnapshot(true));
  addEventListener("resize", () => { if (curves && !byId("training").hidden) draw(); });
}

export async function onOpen() {
  clearTimeout(timer);
  if (byId("training").hidden) return;
  curves = await getCurves();
  if (curves.snapshots.length !== state.run.snapshots.length) state.changed.dispatchEvent(new Event("snapshots"));
  showSnapshots();
  draw();
  showSamples();
  const isTraining = curves.step < curves.max_steps;
  byId("training-progress").textContent = curves.step
    ? [
      t`Step ${number(curves.step)} of ${number(curves.max_steps)}, ${decimal(curves.minutes, 1)} min of training.`,
      ...(isTraining ? [t`This page updates every 2 s during training.`] : []),
      translate(curves.start.reason),
    ].join(" ")
    : t`No training metrics have been logged for this run.`;
  if (isTraining && !state.run.imported) timer = setTimeout(guarded(onOpen), REFRESH_MS);
}

function showSnapshots() {
  const steps = curves.snapshots, slider = byId("snapshot"), list = byId("snapshots");
  if (list.childElementCount !== steps.length) {
    const atEnd = Number(slider.value) === Number(slider.max);
    slider.max = Math.max(0, steps.length - 1);
    slider.disabled = steps.length < 2;
    if (atEnd) slider.value = slider.max;
    list.replaceChildren(...steps.map((step) => {
      const item = element("li", {}, element("h3", {}, step ? t`step ${number(step)}` : t`step 0 (untrained)`), element("span", {}, texts.get(step) ?? "…"));
      item.dataset.step = step;
      return item;
    }));
  }
  selectSnapshot(false);
}

function selectSnapshot(moved) {
  const step = curves?.snapshots[Number(byId("snapshot").value)];
  if (step === undefined) return;
  byId("snapshot-label").textContent = step ? t`step ${number(step)}` : t`step 0 (untrained)`;
  byId("snapshot").ariaValueText = byId("snapshot-label").textContent;
  for (const item of byId("snapshots").children) {
    const selected = Number(item.dataset.step) === step;
    if (selected) item.setAttribute("aria-current", "true"); else item.removeAttribute("aria-current");
    if (selected && moved) item.scrollIntoView({ block: "nearest" });
  }
  if (moved) draw();
}

async function generateAtSnapshots() {
  running?.abort();
  const controller = new AbortController();
  running = controller;
  clearError();
  texts.clear();
  for (const item of byId("snapshots").children) item.lastChild.textContent = "…";
  const text = byId("snapshots-prompt").value;
  try {
    for (const step of [...curves.snapshots]) {
      byId("snapshots-status").textContent = t`generating at step ${number(step)}`;
      const body = { text, step, max_tokens: MAX_TOKENS, temperature: 0.8, seed: 1 };
      let generated = "";
      for await (const event of streamTokens(body, controller.signal)) {
        generated += event.prompt ? event.prompt.map(([, text]) => text).join("") : event.text ?? "";
        texts.set(step, generated);
        const item = byId("snapshots").querySelector(`[data-step="${step}"]`);
        if (item) item.lastChild.textContent = generated;
      }
    }
    byId("snapshots-status").textContent = t`done: same prompt, same seed`;
  } catch (error) {
    if (running === controller) byId("snapshots-status").textContent = "";
    showError(error);
  }
}

function showSamples() {
  const list = byId("samples");
  if (list.childElementCount === curves.samples.length) return;
  list.replaceChildren(...curves.samples.toReversed().map(([step, text]) =>
    element("li", {}, element("h3", {}, t`step ${number(step)}`), text)));
}

function draw() {
  const svg = d3.select("#loss-curve");
  svg.selectAll("*").remove();
  const { width, height } = byId("loss-curve").getBoundingClientRect();
  if (!width || !curves.loss.length) return;
  const startLoss = curves.start.loss, label = `${translate(curves.start.label)}: ln ${number(Math.exp(startLoss))}`;
  const all = [...curves.loss, ...curves.val_loss].map(([, value]) => value);
  const x = d3.scaleSqrt([0, Math.max(curves.step, ...curves.snapshots, 1)], [40, width - 22]);
  const y = d3.scaleLinear([Math.min(...all), Math.max(startLoss, ...all)], [height - 30, 12]).nice();
  svg.append("g").attr("transform", `translate(0,${height - 30})`).call(d3.axisBottom(x).ticks(Math.min(8, width / 70)));
  svg.append("g").attr("transform", "translate(40,0)").call(d3.axisLeft(y).ticks(6));
  svg.append("text").attr("x", width - 22).attr("y", height - 2).attr("text-anchor", "end").text(t`steps`);
  svg.append("text").attr("x", 46).attr("y", 12).text(t`loss, ${translate(curves.loss_unit)}`);
  const line = d3.line(([step]) => x(step), ([, value]) => y(value));
  svg.append("line").attr("class", "uniform").attr("x1", 40).attr("x2", width - 22).attr("y1", y(startLoss)).attr("y2", y(startLoss));
  svg.append("text").attr("class", "uniform-label").attr("x", width - 22).attr("y", y(startLoss) + 14).attr("text-anchor", "end")
    .text(`${label} = ${decimal(startLoss, 2)}`);
  svg.append("path").attr("class", "train-loss").attr("d", line(curves.loss));
  svg.append("path").attr("class", "val-loss").attr("d", line(curves.val_loss));
  const selected = curves.snapshots[Number(byId("snapshot").value)];
  const nearest = d3.bisector(([step]) => step).center;
  const value = (step) => (step ? curves.loss[nearest(curves.loss, step)][1] : startLoss);
  svg.selectAll("circle").data(curves.snapshots).join("circle").attr("class", (step) => `snapshot${step === selected ? " selected" : ""}`)
    .attr("r", (step) => (step === selected ? 7 : 4)).attr("cx", (step) => x(step)).attr("cy", (step) => y(value(step)));
  const last = curves.val_loss.at(-1);
  const steps = number(curves.step), first = decimal(startLoss, 2);
  svg.attr("aria-label", last
    ? t`Loss over ${steps} steps: from ${first}, ${label}, to a validation loss of ${decimal(last[1], 2)}.`
    : t`Loss over ${steps} steps: from ${first}, ${label}, to a training loss of ${decimal(curves.loss.at(-1)[1], 2)}.`);
}
