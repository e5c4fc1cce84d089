// The first tab: the text streams in, and can take another branch at each of its tokens.

import { events, latest } from "./api.js";
import { bars, byId, clear, guarded, keep, kept, number, percent, state, tell, visible } from "./shared.js";
import { Words } from "./words.js";

const SETTINGS = ["temperature", "top_k", "top_p", "min_p"];
const asNext = latest("/api/next");
let running = null;

const words = new Words(byId("story"), showAlternatives, () => {
  byId("alternatives").querySelector("button")?.focus();
});

export function begin() {
  byId("write-form").addEventListener("submit", (event) => {
    event.preventDefault();
    write({ text: byId("prompt").value }, []);
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("write-form").requestSubmit(byId("go"));
  });
  byId("more").addEventListener("click", () => write({ ids: ids() }, state.tokens));
  byId("stop").addEventListener("click", () => running?.abort());
  byId("alternatives").addEventListener("keydown", moveInList);
  for (const name of SETTINGS) {
    byId(name).addEventListener("input", guarded(showNext));
  }
  addEventListener("pagehide", keep);
  const before = kept();
  byId("prompt").value = before?.prompt ?? state.run.opening;
  if (before?.tokens?.length) {
    state.tokens = before.tokens;
    words.show(state.tokens);
    byId("more").disabled = false;
  }
  ready();
}

// Whether there is a model to write yet.
export function ready() {
  const there = state.run.step !== null;
  byId("go").disabled = !there;
  byId("state").textContent = there ? "" : "there is no checkpoint yet; its life is on the third tab";
  if (there) guarded(showNext)();
}

const ids = () => state.tokens.map((token) => token.id);

function settings() {
  return Object.fromEntries(SETTINGS.map((name) => [name, Number(byId(name).value)]));
}

// From a text, or from ids, whose first tokens stay as they were.
async function write(from, before) {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  clear();
  byId("stop").disabled = false;
  byId("more").disabled = true;
  byId("state").textContent = "";
  const waiting = [];
  let frame = 0, count = 0, seed = 0, ended = "stopped";
  const began = performance.now();
  const show = () => {
    frame = 0;
    const new_ = waiting.splice(0);
    state.tokens.push(...new_);
    words.add(new_);
  };
  try {
    const body = { ...from, ...settings(), max_tokens: Number(byId("max-tokens").value) || 200 };
    for await (const event of events("/api/write", body, mine.signal)) {
      if (event.prompt) {
        seed = event.seed;
        state.tokens = event.prompt.map(([id, text, name], n) => before[n]?.id === id ? before[n] : { id, text, name, probability: null, alternatives: null });
        words.show(state.tokens);
      } else if (event.end) {
        ended = event.end === "stop" ? "it ended by itself" : "as long as asked for";
      } else {
        count += 1;
        waiting.push(event);
        frame ||= requestAnimationFrame(show);
      }
    }
  } catch (error) {
    tell(error);
  }
  if (running !== mine) return; // another text is being written
  cancelAnimationFrame(frame);
  show();
  running = null;
  byId("stop").disabled = true;
  byId("more").disabled = !state.tokens.length;
  const seconds = (performance.now() - began) / 1000;
  if (count) byId("state").textContent = `${number(count)} tokens, ${number(count / seconds)} a second, ${ended}; seed ${seed}`;
  keep();
  state.changed.dispatchEvent(new Event("text"));
  await guarded(showNext)();
}

function showAlternatives(n) {
  const token = state.tokens[n];
  if (!token) return;
  const list = byId("alternatives");
  byId("other-title").textContent = `What else “${visible(token.name)}” could have been`;
  if (!token.alternatives) {
    byId("other-hint").textContent = "It was given: the model begins after it.";
    list.replaceChildren();
    return;
  }
  byId("other-hint").textContent = `The model gave it ${percent(token.probability)}. Choose another one, and the text goes on from there.`;
  bars(list, token.alternatives, { drawn: token.id, scale: token.alternatives[0][2], chosen: (id) => branch(n, id) });
}

// Another token at this place, and on from there.
function branch(n, id) {
  const before = state.tokens.slice(0, n);
  const token = state.tokens[n];
  const [, name, probability] = token.alternatives.find(([other]) => other === id);
  const taken = { ...token, id, name, probability, text: name.startsWith("<") ? "" : name };
  byId("story").focus();
  write({ ids: [...before, taken].map((one) => one.id) }, [...before, taken]);
}

function moveInList(event) {
  const items = [...byId("alternatives").querySelectorAll("button")];
  const at = items.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1 }[event.key];
  if (to !== undefined && items[to]) {
    event.preventDefault();
    items[to].focus();
  } else if (event.key === "Escape") {
    words.point(words.at, true);
  }
}

async function showNext() {
  for (const name of SETTINGS) {
    const value = Number(byId(name).value);
    const shown = name === "top_k" && value === 0 ? "all" : value.toFixed(name === "top_k" ? 0 : 2);
    byId(name).nextElementSibling.textContent = shown;
  }
  const chosen = settings();
  byId("setting-says").textContent = chosen.temperature === 0
    ? "Temperature 0: always the likeliest one."
    : chosen.temperature < 1 ? "Below 1 the likely ones become likelier: a plainer text." : chosen.temperature > 1
      ? "Above 1 the unlikely ones get their chance: a wilder text." : "At 1 it is drawn as the model says.";
  if (running) return;
  const from = state.tokens.length ? { ids: ids() } : { text: byId("prompt").value };
  const told = await asNext({ ...from, ...chosen });
  if (!told) return;
  const most = Math.max(...told.likely.map(([, , before, left]) => Math.max(before, left)));
  bars(byId("next"), told.likely, { scale: most, say: (before, left) => `${percent(before)} → ${percent(left)}` });
}
