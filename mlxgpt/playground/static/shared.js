// Shared by the three tabs: the run, the text's tokens, errors, and helpers for the DOM.

import { RequestError } from "./api.js";

const STORAGE_KEY = "mlxgpt-text";

// tokens: {id, text, name, probability, alternatives}; the prompt's have null for the last two.
export const state = { run: null, tokens: [], changed: new EventTarget() };

export const byId = (id) => document.getElementById(id);
export const percent = (share) => (share >= 0.0995 ? `${Math.round(share * 100)}%` : `${(share * 100).toFixed(1)}%`);
export const number = (value) => Math.round(value).toLocaleString("en");

export function saveText() {
  try {
    sessionStorage.setItem(STORAGE_KEY, JSON.stringify({ tokens: state.tokens, prompt: byId("prompt").value }));
  } catch {
    sessionStorage.removeItem(STORAGE_KEY); // too long for the storage
  }
}

export function restoreText() {
  try {
    return JSON.parse(sessionStorage.getItem(STORAGE_KEY));
  } catch {
    return null;
  }
}

export function showError(error) {
  if (error?.name === "AbortError") return;
  byId("problem").textContent = error instanceof RequestError ? error.message : `Page error: ${error}`;
}

export const clearError = () => { byId("problem").textContent = ""; };

// Wraps an event handler, so that its errors are shown.
export const guarded = (handler) => async (...args) => {
  try {
    return await handler(...args);
  } catch (error) {
    return showError(error);
  }
};

export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

// A token's name with visible stand-ins for unprintable characters.
export const visible = (name) => name.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣")
  .replace(/(?! )[\p{C}\p{Z}]/gu, (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`) || "∅";

// Bars of [[id, name, share]] or [[id, name, thin share, thick share]]; `onChoose` makes buttons.
export function bars(list, rows, { onChoose, drawnId, scale = 1, format } = {}) {
  list.replaceChildren(...rows.map(([id, name, thin, thick]) => {
    const share = thick ?? thin;
    const bar = element("span", { className: "bar", ariaHidden: "true" });
    if (thick !== undefined) bar.append(barPart("before", thin / scale));
    bar.append(barPart("left", share / scale));
    const label = format ? format(thin, thick) : percent(share);
    const parts = [element("code", {}, visible(name)), bar, element("span", {}, label)];
    const item = element("li", { className: [id === drawnId && "drawn", share === 0 && "none"].filter(Boolean).join(" ") });
    if (onChoose) {
      const button = element("button", { type: "button", onclick: () => onChoose(id) }, ...parts);
      item.append(button);
    } else {
      item.append(...parts);
    }
    return item;
  }));
}

function barPart(kind, share) {
  const bar = element("i", { className: kind });
  bar.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return bar;
}
