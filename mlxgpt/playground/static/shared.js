// What all three tabs know: the run, the text as tokens, and where problems are told.

import { Refused } from "./api.js";

const KEPT = "mlxgpt-text";

// tokens: {id, text, name, probability, alternatives}; of the prompt's the last two are null.
export const state = { run: null, tokens: [], changed: new EventTarget() };

export const byId = (id) => document.getElementById(id);
export const percent = (share) => (share >= 0.0995 ? `${Math.round(share * 100)} %` : `${(share * 100).toFixed(1)} %`);
export const number = (value) => Math.round(value).toLocaleString("en");

export function keep() {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ tokens: state.tokens, prompt: byId("prompt").value }));
  } catch {
    sessionStorage.removeItem(KEPT); // too long to be kept
  }
}

export function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT));
  } catch {
    return null;
  }
}

export function tell(error) {
  if (error?.name === "AbortError") return;
  byId("problem").textContent = error instanceof Refused ? error.message : `Something is wrong with this page: ${error}`;
}

export const clear = () => { byId("problem").textContent = ""; };

// A problem of whatever an event began is shown, not lost.
export const guarded = (handler) => async (...given) => {
  try {
    return await handler(...given);
  } catch (error) {
    return tell(error);
  }
};

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// A token's name with what cannot be seen made visible.
export const visible = (name) => name.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣")
  .replace(/(?! )[\p{C}\p{Z}]/gu, (one) => `U+${one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`) || "∅";

// [[name, thin share, thick share, …]] as bars; `chosen` makes them buttons.
export function bars(list, rows, { chosen, drawn, scale = 1, say } = {}) {
  list.replaceChildren(...rows.map(([id, name, before, left]) => {
    const share = left ?? before;
    const bar = element("span", { className: "bar", ariaHidden: "true" });
    if (left !== undefined) bar.append(filled("before", before / scale));
    bar.append(filled("left", share / scale));
    const told = say ? say(before, left) : percent(share);
    const parts = [element("code", {}, visible(name)), bar, element("span", {}, told)];
    const item = element("li", { className: [id === drawn && "drawn", share === 0 && "none"].filter(Boolean).join(" ") });
    if (chosen) {
      const button = element("button", { type: "button", onclick: () => chosen(id) }, ...parts);
      item.append(button);
    } else {
      item.append(...parts);
    }
    return item;
  }));
}

function filled(kind, share) {
  const bar = element("i", { className: kind });
  bar.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return bar;
}
