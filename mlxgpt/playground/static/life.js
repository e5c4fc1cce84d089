// The third tab: the curve as it grows, and what the model could say at each age.

import { events, get } from "./api.js";
import { byId, clear, element, guarded, number, state, tell } from "./shared.js";

const EVERY = 2000; // milliseconds between two looks at a training's files
const LENGTH = 80; // tokens at each age
let course = null, timer = 0, running = null;
const texts = new Map();

export function begin() {
  byId("life-prompt").value = state.run.opening;
  byId("life-form").addEventListener("submit", (event) => {
    event.preventDefault();
    writeAtEveryAge();
  });
  byId("age").addEventListener("input", () => choose(true));
  addEventListener("resize", () => { if (course && !byId("life").hidden) draw(); });
}

export async function opened() {
  clearTimeout(timer);
  if (byId("life").hidden) return;
  course = await get("/api/course");
  if (course.ages.length !== state.run.ages.length) state.changed.dispatchEvent(new Event("age"));
  showAges();
  draw();
  showSamples();
  const going = course.step < course.max_steps;
  byId("course-says").textContent = course.step
    ? `Step ${number(course.step)} of ${number(course.max_steps)}, ${course.minutes.toFixed(1)} minutes of training. `
      + (going ? "While it trains, this page looks at its files every two seconds. " : "")
      + "Before it has learned anything, each of its tokens is as likely as any other, and the loss is that of a guess."
    : "No training has been noted here.";
  if (going && state.run.trained) timer = setTimeout(guarded(opened), EVERY);
}

function showAges() {
  const ages = course.ages, range = byId("age"), list = byId("ages");
  if (list.childElementCount !== ages.length) {
    const last = Number(range.value) === Number(range.max);
    range.max = Math.max(0, ages.length - 1);
    range.disabled = ages.length < 2;
    if (last) range.value = range.max;
    list.replaceChildren(...ages.map((step) => {
      const item = element("li", {}, element("h3", {}, step ? `after ${number(step)} steps` : "before the first step"), element("span", {}, texts.get(step) ?? "…"));
      item.dataset.step = step;
      return item;
    }));
  }
  choose(false);
}

function choose(moved) {
  const step = course?.ages[Number(byId("age").value)];
  if (step === undefined) return;
  byId("age-says").textContent = step ? `after ${number(step)} steps` : "before the first step";
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
  const mine = new AbortController();
  running = mine;
  clear();
  texts.clear();
  for (const item of byId("ages").children) item.lastChild.textContent = "…";
  const text = byId("life-prompt").value;
  try {
    for (const step of [...course.ages]) {
      byId("life-state").textContent = `writing after ${number(step)} steps`;
      const body = { text, step, max_tokens: LENGTH, temperature: 0.8, seed: 1 };
      let made = "";
      for await (const event of events("/api/write", body, mine.signal)) {
        made += event.prompt ? event.prompt.map((one) => one[1]).join("") : event.text ?? "";
        texts.set(step, made);
        const item = byId("ages").querySelector(`[data-step="${step}"]`);
        if (item) item.lastChild.textContent = made;
      }
    }
    byId("life-state").textContent = "the same beginning, the same seed";
  } catch (error) {
    if (running === mine) byId("life-state").textContent = "";
    tell(error);
  }
}

function showSamples() {
  const list = byId("samples");
  if (list.childElementCount === course.samples.length) return;
  list.replaceChildren(...course.samples.toReversed().map(([step, text]) =>
    element("li", {}, element("h3", {}, `after ${number(step)} steps`), text)));
}

function draw() {
  const svg = d3.select("#curve");
  svg.selectAll("*").remove();
  const { width, height } = byId("curve").getBoundingClientRect();
  if (!width || !course.loss.length) return;
  const guess = Math.log(course.vocab_size), all = [...course.loss, ...course.val_loss].map(([, value]) => value);
  const x = d3.scaleSqrt([0, Math.max(course.step, ...course.ages, 1)], [40, width - 22]);
  const y = d3.scaleLinear([Math.min(...all), Math.max(guess, ...all)], [height - 30, 12]).nice();
  svg.append("g").attr("transform", `translate(0,${height - 30})`).call(d3.axisBottom(x).ticks(Math.min(8, width / 70)));
  svg.append("g").attr("transform", "translate(40,0)").call(d3.axisLeft(y).ticks(6));
  svg.append("text").attr("x", width - 22).attr("y", height - 2).attr("text-anchor", "end").text("steps");
  svg.append("text").attr("x", 46).attr("y", 12).text("loss, nats per token");
  const line = d3.line(([step]) => x(step), ([, value]) => y(value));
  svg.append("line").attr("class", "guess").attr("x1", 40).attr("x2", width - 22).attr("y1", y(guess)).attr("y2", y(guess));
  svg.append("text").attr("class", "guess-says").attr("x", width - 22).attr("y", y(guess) + 14).attr("text-anchor", "end")
    .text(`a guess among ${number(course.vocab_size)}: ln ${number(course.vocab_size)} = ${guess.toFixed(2)}`);
  svg.append("path").attr("class", "loss").attr("d", line(course.loss));
  svg.append("path").attr("class", "val").attr("d", line(course.val_loss));
  const chosen = course.ages[Number(byId("age").value)];
  const nearest = d3.bisector(([at]) => at).center;
  const value = (step) => (step ? course.loss[nearest(course.loss, step)][1] : guess);
  svg.selectAll("circle").data(course.ages).join("circle").attr("class", (step) => `age${step === chosen ? " chosen" : ""}`)
    .attr("r", (step) => (step === chosen ? 7 : 4)).attr("cx", (step) => x(step)).attr("cy", (step) => y(value(step)));
  const last = course.val_loss.at(-1);
  svg.attr("aria-label", `The loss over ${number(course.step)} steps: from a guess, ${guess.toFixed(2)} nats, to `
    + (last ? `${last[1].toFixed(2)} on the validation text.` : `${course.loss.at(-1)[1].toFixed(2)} in training.`));
}
