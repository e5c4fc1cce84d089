// Text as tokens, selectable with the pointer or the arrow keys; only the current one is a tab stop.

import { element, percent, visible } from "./shared.js";

export class TokenView {
  // Calls onFocus(index) when a token is hovered over or focused, onSelect(index) on click or Enter.
  constructor(box, onFocus, onSelect) {
    this.box = box;
    this.onFocus = onFocus;
    this.current = -1;
    this.spans = [];
    const index = (event) => {
      const span = event.target.closest?.(".token");
      return span ? Number(span.dataset.index) : -1;
    };
    box.addEventListener("pointerover", (event) => { if (index(event) >= 0) this.setCurrent(index(event)); });
    box.addEventListener("focusin", (event) => { if (index(event) >= 0) this.setCurrent(index(event)); });
    box.addEventListener("click", (event) => {
      if (index(event) < 0) return;
      this.setCurrent(index(event), true);
      onSelect(this.current);
    });
    box.addEventListener("keydown", (event) => {
      const to = { ArrowRight: this.current + 1, ArrowLeft: this.current - 1, Home: 0, End: this.spans.length - 1,
        ArrowDown: this.rowNeighbor(1), ArrowUp: this.rowNeighbor(-1) }[event.key];
      if (to !== undefined && this.spans[to]) {
        event.preventDefault();
        this.setCurrent(to, true);
      } else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        onSelect(this.current);
      }
    });
  }

  show(tokens) {
    this.box.replaceChildren();
    this.spans = [];
    this.current = -1;
    this.add(tokens);
  }

  add(tokens) {
    const part = document.createDocumentFragment();
    for (const token of tokens) {
      const span = element("span", { className: "token", role: "button", tabIndex: this.spans.length ? -1 : 0 });
      span.dataset.index = this.spans.length;
      const hasProbability = token.probability !== null && token.probability !== undefined;
      if (!hasProbability) span.classList.add("prompt");
      else span.style.background = `rgba(var(--surprise), ${(1 - token.probability).toFixed(3)})`;
      span.ariaLabel = hasProbability ? `${visible(token.label)}, ${percent(token.probability)}` : visible(token.label);
      // If several tokens make up one character, the last one shows it.
      if (token.text) span.append(token.text.replaceAll("\n", "⏎\n"));
      else span.append(element("span", { className: "placeholder" }, token.label.startsWith("<") ? token.label : "·"));
      part.append(span);
      this.spans.push(span);
    }
    this.box.append(part);
  }

  setCurrent(n, focus = false) {
    if (n === this.current && !focus) return;
    const before = this.spans[this.current];
    if (before) { before.removeAttribute("aria-current"); before.tabIndex = -1; }
    else if (this.spans[0]) this.spans[0].tabIndex = -1;
    this.current = n;
    const span = this.spans[n];
    if (!span) return;
    span.setAttribute("aria-current", "true");
    span.tabIndex = 0;
    if (focus && document.activeElement !== span) span.focus();
    this.onFocus(n);
  }

  // Index of the token above (-1) or below (1) the current one.
  rowNeighbor(direction) {
    const here = this.spans[this.current]?.getBoundingClientRect();
    if (!here) return undefined;
    let best, distance = Infinity;
    for (const [n, span] of this.spans.entries()) {
      const there = span.getBoundingClientRect();
      const rows = direction * (there.top - here.top);
      if (rows < here.height / 2 || rows > 3 * here.height) continue;
      const cost = rows * 10 + Math.abs(there.left - here.left);
      if (cost < distance) { best = n; distance = cost; }
    }
    return best;
  }
}
