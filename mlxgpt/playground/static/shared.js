// Shared by the tabs: the run, the generated tokens, errors, and DOM helpers.

import { RequestError } from "./api.js";
import { decimal, t } from "./language.js";

const STORAGE_KEY = "mlxgpt-generated-text";

// tokens: {id, text, label, probability, alternatives}; the last two are null for prompt tokens.
export const state = { run: null, tokens: [], changed: new EventTarget() };

export const byId = (id) => document.getElementById(id);
export const percent = (share) => (share >= 0.0995 ? `${Math.round(share * 100)}%` : `${decimal(share * 100, 1)}%`);

export function saveText() {
  if (state.run.is_file) return; // stores nothing
  try {
    sessionStorage.setItem(STORAGE_KEY, JSON.stringify({ tokens: state.tokens, prompt: byId("prompt").value }));
  } catch {
    sessionStorage.removeItem(STORAGE_KEY); // the text exceeds the storage quota
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
  byId("error").textContent = error instanceof RequestError ? error.message : t`Page error: ${error}`;
}

export const clearError = () => { byId("error").textContent = ""; };

// Wraps an event handler to show its errors.
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

// A token's label with visible replacements for unprintable characters.
export const visible = (label) => label.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣")
  .replace(/(?! )[\p{C}\p{Z}]/gu, (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`) || "∅";

// Shows rows of [id, label, value] or [id, label, thin bar, thick bar] as bars; with `onSelect`, as
// buttons.
export function renderBars(list, rows, { onSelect, sampledId, scale = 1, format } = {}) {
  list.replaceChildren(...rows.map(([id, label, thin, thick]) => {
    const share = thick ?? thin;
    const bar = element("span", { className: "bar", ariaHidden: "true" });
    if (thick !== undefined) bar.append(barPart("thin", thin / scale));
    bar.append(barPart("thick", share / scale));
    const value = format ? format(thin, thick) : percent(share);
    const parts = [element("code", {}, visible(label)), bar, element("span", {}, value)];
    const item = element("li", { className: [id === sampledId && "sampled", share === 0 && "zero"].filter(Boolean).join(" ") });
    if (onSelect) {
      const button = element("button", { type: "button", onclick: () => onSelect(id) }, ...parts);
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
