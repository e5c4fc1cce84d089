// The first tab: generates a text, which can continue from another token at each position.

import { events, latest } from "./api.js";
import { bars, byId, clearError, guarded, number, percent, restoreText, saveText, showError, state, visible } from "./shared.js";
import { TokenView } from "./words.js";

const SETTINGS = ["temperature", "top_k", "top_p", "min_p"];
const fetchNext = latest("/api/next");
let running = null;

const tokenView = new TokenView(byId("story"), showAlternatives, () => {
  byId("alternatives").querySelector("button")?.focus();
});

export function init() {
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
  addEventListener("pagehide", saveText);
  const stored = restoreText();
  byId("prompt").value = stored?.prompt ?? state.run.opening;
  if (stored?.tokens?.length) {
    state.tokens = stored.tokens;
    tokenView.show(state.tokens);
    byId("more").disabled = false;
  }
  updateControls();
}

// Without a checkpoint nothing can be generated yet.
export function updateControls() {
  const hasModel = state.run.step !== null;
  byId("go").disabled = !hasModel;
  byId("state").textContent = hasModel ? "" : "no checkpoint yet; see the Training tab for progress";
  if (hasModel) guarded(showNext)();
}

const ids = () => state.tokens.map((token) => token.id);

function settings() {
  return Object.fromEntries(SETTINGS.map((name) => [name, Number(byId(name).value)]));
}

// Generates from a prompt, {text} or {ids}; tokens in `before` keep their probabilities.
async function write(prompt, before) {
  running?.abort();
  const controller = new AbortController();
  running = controller;
  clearError();
  byId("stop").disabled = false;
  byId("more").disabled = true;
  byId("state").textContent = "";
  const waiting = [];
  let frame = 0, count = 0, seed = 0, ended = "stopped";
  const began = performance.now();
  const show = () => {
    frame = 0;
    const added = waiting.splice(0);
    state.tokens.push(...added);
    tokenView.add(added);
  };
  try {
    const body = { ...prompt, ...settings(), max_tokens: Number(byId("max-tokens").value) || 200 };
    for await (const event of events("/api/write", body, controller.signal)) {
      if (event.prompt) {
        seed = event.seed;
        state.tokens = event.prompt.map(([id, text, name], n) => before[n]?.id === id ? before[n] : { id, text, name, probability: null, alternatives: null });
        tokenView.show(state.tokens);
      } else if (event.end) {
        ended = event.end === "stop" ? "ended with end-of-text" : "reached max tokens";
      } else {
        count += 1;
        waiting.push(event);
        frame ||= requestAnimationFrame(show);
      }
    }
  } catch (error) {
    showError(error);
  }
  if (running !== controller) return; // another text is being generated
  cancelAnimationFrame(frame);
  show();
  running = null;
  byId("stop").disabled = true;
  byId("more").disabled = !state.tokens.length;
  const seconds = (performance.now() - began) / 1000;
  if (count) byId("state").textContent = `${number(count)} tokens, ${number(count / seconds)} tok/s, ${ended}; seed ${seed}`;
  saveText();
  state.changed.dispatchEvent(new Event("text"));
  await guarded(showNext)();
}

function showAlternatives(n) {
  const token = state.tokens[n];
  if (!token) return;
  const list = byId("alternatives");
  byId("other-title").textContent = `Alternatives to “${visible(token.name)}”`;
  if (!token.alternatives) {
    byId("other-hint").textContent = "This token is part of the prompt.";
    list.replaceChildren();
    return;
  }
  byId("other-hint").textContent = `The model gave it a probability of ${percent(token.probability)}. Select another token to continue from there.`;
  bars(list, token.alternatives, { drawnId: token.id, scale: token.alternatives[0][2], onChoose: (id) => branch(n, id) });
}

// Replaces a token by an alternative, and continues from there.
function branch(n, id) {
  const before = state.tokens.slice(0, n);
  const token = state.tokens[n];
  const [, name, probability] = token.alternatives.find(([other]) => other === id);
  const replacement = { ...token, id, name, probability, text: name.startsWith("<") ? "" : name };
  byId("story").focus();
  write({ ids: [...before, replacement].map(({ id }) => id) }, [...before, replacement]);
}

function moveInList(event) {
  const items = [...byId("alternatives").querySelectorAll("button")];
  const at = items.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1 }[event.key];
  if (to !== undefined && items[to]) {
    event.preventDefault();
    items[to].focus();
  } else if (event.key === "Escape") {
    tokenView.point(tokenView.at, true);
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
    ? "Temperature 0: always the most likely token (greedy)."
    : chosen.temperature < 1 ? "Below 1: likely tokens become more likely; less varied text." : chosen.temperature > 1
      ? "Above 1: unlikely tokens become more likely; more varied text." : "1: sampled from the model's own distribution.";
  if (running) return;
  const prompt = state.tokens.length ? { ids: ids() } : { text: byId("prompt").value };
  const response = await fetchNext({ ...prompt, ...chosen });
  if (!response) return;
  const maxShare = Math.max(...response.likely.map(([, , before, left]) => Math.max(before, left)));
  bars(byId("next"), response.likely, { scale: maxShare, format: (before, left) => `${percent(before)} → ${percent(left)}` });
}
