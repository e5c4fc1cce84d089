// The Generate tab: generates text; selecting an alternative to a token continues from there.

import { fetchNextTokens, fetchReferenceNextTokens, streamTokens } from "./api.js";
import { decimal, number, t } from "./language.js";
import { byId, clearError, guarded, percent, renderBars, restoreText, saveText, showError, state, visible } from "./shared.js";
import { TokenView } from "./token_view.js";

const SAMPLING_PARAMS = ["temperature", "top_k", "top_p", "min_p"];
let running = null;
let referenceTokens = [];

const tokenView = new TokenView(byId("generated-text"), showAlternatives, () => {
  byId("alternatives").querySelector("button")?.focus();
});
const referenceView = new TokenView(byId("reference-text"), (n) => describeToken(referenceTokens[n], state.run.reference.name), () => {});

export function init() {
  byId("generate-form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate({ text: byId("prompt").value }, []);
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("generate-form").requestSubmit(byId("generate-button"));
  });
  byId("continue-button").addEventListener("click", () => generate({ ids: ids() }, state.tokens));
  byId("stop-button").addEventListener("click", () => running?.abort());
  byId("alternatives").addEventListener("keydown", moveInAlternatives);
  for (const name of SAMPLING_PARAMS) {
    byId(name).addEventListener("input", guarded(showNextTokens));
  }
  byId("compare-label").hidden = !state.run.reference;
  for (const name of document.querySelectorAll(".reference-name")) name.textContent = state.run.reference?.name;
  byId("compare").addEventListener("change", guarded(showComparison));
  addEventListener("pagehide", saveText);
  const stored = restoreText();
  byId("prompt").value = stored?.prompt ?? state.run.example_prompt;
  if (stored?.tokens?.length) {
    state.tokens = stored.tokens;
    tokenView.show(state.tokens);
    byId("continue-button").disabled = false;
  }
  updateControls();
}

// Disables generation until the run has a checkpoint.
export function updateControls() {
  const hasModel = state.run.step !== null;
  byId("generate-button").disabled = !hasModel;
  byId("generate-status").textContent = hasModel ? "" : t`no checkpoint yet; see the Training tab for progress`;
  if (hasModel) guarded(showNextTokens)();
}

const ids = () => state.tokens.map((token) => token.id);

function samplingParams() {
  return Object.fromEntries(SAMPLING_PARAMS.map((name) => [name, Number(byId(name).value)]));
}

export const generationParams = () => ({ ...samplingParams(), max_tokens: Number(byId("max-tokens").value) || 200 });

// Generates from a prompt, {text} or {ids}; tokens also in `previous` keep their probabilities.
async function generate(prompt, previous) {
  running?.abort();
  const controller = new AbortController();
  running = controller;
  clearError();
  byId("stop-button").disabled = false;
  byId("continue-button").disabled = true;
  byId("generate-status").textContent = "";
  const body = { ...prompt, ...generationParams() };
  if (byId("seed").value !== "") body.seed = Number(byId("seed").value);
  const start = performance.now();
  let result;
  try {
    result = await stream(body, controller.signal, tokenView, (tokens) => { state.tokens = tokens; }, previous);
    const seconds = (performance.now() - start) / 1000;
    if (comparing() && !controller.signal.aborted) {
      await stream({ ...body, seed: result.seed, reference: true }, controller.signal, referenceView, (tokens) => { referenceTokens = tokens; });
    }
    const { count, ending, seed } = result;
    if (running === controller && count) {
      byId("generate-status").textContent = t`${number(count)} tokens, ${number(count / seconds)} tok/s, ${ending}; seed ${seed}`;
    }
  } catch (error) {
    showError(error);
  }
  if (running !== controller) return; // replaced by a newer generation
  running = null;
  byId("stop-button").disabled = true;
  byId("continue-button").disabled = !state.tokens.length;
  saveText();
  state.changed.dispatchEvent(new Event("text"));
  await guarded(showNextTokens)();
}

// Streams generated tokens into a view; calls onTokens with the list that they are added to.
// Tokens that are also in `previous` keep their probabilities.
async function stream(body, signal, view, onTokens, previous = []) {
  const pending = [];
  let tokens = [], frame = 0, count = 0, seed = 0, ending = t`stopped`;
  const show = () => {
    frame = 0;
    const added = pending.splice(0);
    tokens.push(...added);
    view.add(added);
  };
  try {
    for await (const event of streamTokens(body, signal)) {
      if (event.prompt) {
        seed = event.seed;
        tokens = event.prompt.map(([id, text, label], n) => previous[n]?.id === id ? previous[n] : { id, text, label, probability: null, alternatives: null });
        onTokens(tokens);
        view.show(tokens);
      } else if (event.finish_reason) {
        ending = event.finish_reason === "stop" ? t`ended with end-of-text` : t`reached max tokens`;
      } else {
        count += 1;
        pending.push(event);
        frame ||= requestAnimationFrame(show);
      }
    }
  } catch (error) {
    if (!signal.aborted) throw error;
  } finally {
    cancelAnimationFrame(frame);
    show();
  }
  return { seed, count, ending };
}

const comparing = () => state.run.reference !== null && byId("compare").checked;

function showComparison() {
  byId("reference-panel").hidden = byId("reference-next").hidden = !comparing();
  byId("generated-text").closest(".columns").classList.toggle("compared", comparing());
  return showNextTokens();
}

function showAlternatives(n) {
  describeToken(state.tokens[n], t`The model`, (id) => branch(n, id));
}

function describeToken(token, modelName, onSelect) {
  if (!token) return;
  const list = byId("alternatives");
  byId("alternatives-title").textContent = t`Alternatives to “${visible(token.label)}”`;
  if (!token.alternatives) {
    byId("alternatives-hint").textContent = t`This token is part of the prompt.`;
    list.replaceChildren();
    return;
  }
  byId("alternatives-hint").textContent = t`${modelName} gave it a probability of ${percent(token.probability)}.`
    + (onSelect ? ` ${t`Select another token to continue from there.`}` : "");
  renderBars(list, token.alternatives, { sampledId: token.id, scale: token.alternatives[0][2], onSelect });
}

// Replaces a token with an alternative and continues from there.
function branch(n, id) {
  const before = state.tokens.slice(0, n);
  const token = state.tokens[n];
  const [, label, probability] = token.alternatives.find(([other]) => other === id);
  const replacement = { ...token, id, label, probability, text: label.startsWith("<") ? "" : label };
  byId("generated-text").focus();
  generate({ ids: [...before, replacement].map(({ id }) => id) }, [...before, replacement]);
}

function moveInAlternatives(event) {
  const items = [...byId("alternatives").querySelectorAll("button")];
  const current = items.indexOf(document.activeElement);
  const to = { ArrowDown: current + 1, ArrowUp: current - 1 }[event.key];
  if (to !== undefined && items[to]) {
    event.preventDefault();
    items[to].focus();
  } else if (event.key === "Escape") {
    tokenView.setCurrent(tokenView.current, true);
  }
}

async function showNextTokens() {
  for (const name of SAMPLING_PARAMS) {
    const value = Number(byId(name).value);
    const shown = name === "top_k" && value === 0 ? t`all` : decimal(value, name === "top_k" ? 0 : 2);
    byId(name).nextElementSibling.textContent = shown;
  }
  const params = samplingParams();
  byId("temperature-hint").textContent = params.temperature === 0
    ? t`Temperature 0: always the most likely token (greedy).`
    : params.temperature < 1 ? t`Below 1: likely tokens become more likely; less varied text.` : params.temperature > 1
      ? t`Above 1: unlikely tokens become more likely; more varied text.` : t`1: sampled from the model's own distribution.`;
  if (running) return;
  const prompt = state.tokens.length ? { ids: ids() } : { text: byId("prompt").value };
  showTopTokens(byId("next-tokens"), await fetchNextTokens({ ...prompt, ...params }));
  if (comparing()) {
    showTopTokens(byId("reference-next-tokens"), await fetchReferenceNextTokens({ ...prompt, ...params, reference: true }));
  }
}

function showTopTokens(list, response) {
  if (!response) return;
  const maxProb = Math.max(...response.top_tokens.map(([, , modelProb, samplingProb]) => Math.max(modelProb, samplingProb)));
  renderBars(list, response.top_tokens, {
    scale: maxProb, format: (modelProb, samplingProb) => `${percent(modelProb)} → ${percent(samplingProb)}`,
  });
}
