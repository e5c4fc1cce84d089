// The third tab: the training curves, and texts of the model's snapshots.

import { events, get } from "./api.js";
import { byId, clearError, element, guarded, number, showError, state } from "./shared.js";

const REFRESH_MS = 2000; // between two requests, while the run trains
const MAX_TOKENS = 80; // of each snapshot's text
let curves = null, timer = 0, running = null;
const texts = new Map();

export function init() {
  byId("life-prompt").value = state.run.opening;
  byId("life-form").addEventListener("submit", (event) => {
    event.preventDefault();
    writeAtEveryAge();
  });
  byId("age").addEventListener("input", () => selectAge(true));
  addEventListener("resize", () => { if (curves && !byId("life").hidden) draw(); });
}

export async function onOpen() {
  clearTimeout(timer);
  if (byId("life").hidden) return;
  curves = await get("/api/course");
  if (curves.ages.length !== state.run.ages.length) state.changed.dispatchEvent(new Event("age"));
  showAges();
  draw();
  showSamples();
  const training = curves.step < curves.max_steps;
  byId("course-says").textContent = curves.step
    ? `Step ${number(curves.step)} of ${number(curves.max_steps)}, ${curves.minutes.toFixed(1)} min of training. `
      + (training ? "This page updates every 2 s during training. " : "")
      + "An untrained model gives every token the same probability; its loss is ln(vocabulary size)."
    : "No training metrics have been logged for this run.";
  if (training && state.run.trained) timer = setTimeout(guarded(onOpen), REFRESH_MS);
}

function showAges() {
  const ages = curves.ages, range = byId("age"), list = byId("ages");
  if (list.childElementCount !== ages.length) {
    const last = Number(range.value) === Number(range.max);
    range.max = Math.max(0, ages.length - 1);
    range.disabled = ages.length < 2;
    if (last) range.value = range.max;
    list.replaceChildren(...ages.map((step) => {
      const item = element("li", {}, element("h3", {}, step ? `step ${number(step)}` : "step 0 (untrained)"), element("span", {}, texts.get(step) ?? "…"));
      item.dataset.step = step;
      return item;
    }));
  }
  selectAge(false);
}

function selectAge(moved) {
  const step = curves?.ages[Number(byId("age").value)];
  if (step === undefined) return;
  byId("age-says").textContent = step ? `step ${number(step)}` : "step 0 (untrained)";
  byId("age").ariaValueText = byId("age-says").textContent;
  for (const item of byId("ages").children) {
    const chosen = Number(item.dataset.step) === step;
    if (chosen) item.setAttribute("aria-current", "true"); else item.removeAttribute("aria-current");
    if (chosen && moved) item.scrollIntoView({ block: "nearest" });
  }
  if (moved) draw();
}

async function writeAtEveryAge() {
  running?.abort();
  const controller = new AbortController();
  running = controller;
  clearError();
  texts.clear();
  for (const item of byId("ages").children) item.lastChild.textContent = "…";
  const text = byId("life-prompt").value;
  try {
    for (const step of [...curves.ages]) {
      byId("life-state").textContent = `generating at step ${number(step)}`;
      const body = { text, step, max_tokens: MAX_TOKENS, temperature: 0.8, seed: 1 };
      let written = "";
      for await (const event of events("/api/write", body, controller.signal)) {
        written += event.prompt ? event.prompt.map(([, text]) => text).join("") : event.text ?? "";
        texts.set(step, written);
        const item = byId("ages").querySelector(`[data-step="${step}"]`);
        if (item) item.lastChild.textContent = written;
      }
    }
    byId("life-state").textContent = "done: same prompt, same seed";
  } catch (error) {
    if (running === controller) byId("life-state").textContent = "";
    showError(error);
  }
}

function showSamples() {
  const list = byId("samples");
  if (list.childElementCount === curves.samples.length) return;
  list.replaceChildren(...curves.samples.toReversed().map(([step, text]) =>
    element("li", {}, element("h3", {}, `step ${number(step)}`), text)));
}

function draw() {
  const svg = d3.select("#curve");
  svg.selectAll("*").remove();
  const { width, height } = byId("curve").getBoundingClientRect();
  if (!width || !curves.loss.length) return;
  const guess = Math.log(curves.vocab_size), all = [...curves.loss, ...curves.val_loss].map(([, value]) => value);
  const x = d3.scaleSqrt([0, Math.max(curves.step, ...curves.ages, 1)], [40, width - 22]);
  const y = d3.scaleLinear([Math.min(...all), Math.max(guess, ...all)], [height - 30, 12]).nice();
  svg.append("g").attr("transform", `translate(0,${height - 30})`).call(d3.axisBottom(x).ticks(Math.min(8, width / 70)));
  svg.append("g").attr("transform", "translate(40,0)").call(d3.axisLeft(y).ticks(6));
  svg.append("text").attr("x", width - 22).attr("y", height - 2).attr("text-anchor", "end").text("steps");
  svg.append("text").attr("x", 46).attr("y", 12).text("loss, nats per token");
  const line = d3.line(([step]) => x(step), ([, value]) => y(value));
  svg.append("line").attr("class", "guess").attr("x1", 40).attr("x2", width - 22).attr("y1", y(guess)).attr("y2", y(guess));
  svg.append("text").attr("class", "guess-says").attr("x", width - 22).attr("y", y(guess) + 14).attr("text-anchor", "end")
    .text(`uniform guess: ln ${number(curves.vocab_size)} = ${guess.toFixed(2)}`);
  svg.append("path").attr("class", "loss").attr("d", line(curves.loss));
  svg.append("path").attr("class", "val").attr("d", line(curves.val_loss));
  const chosen = curves.ages[Number(byId("age").value)];
  const nearest = d3.bisector(([at]) => at).center;
  const value = (step) => (step ? curves.loss[nearest(curves.loss, step)][1] : guess);
  svg.selectAll("circle").data(curves.ages).join("circle").attr("class", (step) => `age${step === chosen ? " chosen" : ""}`)
    .attr("r", (step) => (step === chosen ? 7 : 4)).attr("cx", (step) => x(step)).attr("cy", (step) => y(value(step)));
  const last = curves.val_loss.at(-1);
  svg.attr("aria-label", `Loss over ${number(curves.step)} steps: from a uniform guess, ${guess.toFixed(2)} nats, to `
    + (last ? `a validation loss of ${last[1].toFixed(2)}.` : `a training loss of ${curves.loss.at(-1)[1].toFixed(2)}.`));
}
