// A text as tokens that the pointer or the arrow keys select; one of them is in the tab order.

import { element, percent, visible } from "./shared.js";

export class TokenView {
  // onPoint(index) is called when a token is pointed at or reached; onChoose(index) on click or Enter.
  constructor(box, onPoint, onChoose) {
    this.box = box;
    this.onPoint = onPoint;
    this.at = -1;
    this.spans = [];
    const index = (event) => {
      const span = event.target.closest?.(".token");
      return span ? Number(span.dataset.n) : -1;
    };
    box.addEventListener("pointerover", (event) => { if (index(event) >= 0) this.point(index(event)); });
    box.addEventListener("focusin", (event) => { if (index(event) >= 0) this.point(index(event)); });
    box.addEventListener("click", (event) => {
      if (index(event) < 0) return;
      this.point(index(event), true);
      onChoose(this.at);
    });
    box.addEventListener("keydown", (event) => {
      const to = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: this.spans.length - 1,
        ArrowDown: this.rowNeighbor(1), ArrowUp: this.rowNeighbor(-1) }[event.key];
      if (to !== undefined && this.spans[to]) {
        event.preventDefault();
        this.point(to, true);
      } else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        onChoose(this.at);
      }
    });
  }

  show(tokens) {
    this.box.replaceChildren();
    this.spans = [];
    this.at = -1;
    this.add(tokens);
  }

  add(tokens) {
    const part = document.createDocumentFragment();
    for (const token of tokens) {
      const span = element("span", { className: "token", role: "button", tabIndex: this.spans.length ? -1 : 0 });
      span.dataset.n = this.spans.length;
      const known = token.probability !== null && token.probability !== undefined;
      if (!known) span.classList.add("given");
      else span.style.background = `rgba(var(--surprise), ${(1 - token.probability).toFixed(3)})`;
      span.ariaLabel = known ? `${visible(token.name)}, ${percent(token.probability)}` : visible(token.name);
      // A character of several tokens is shown by the last one; line breaks are visible.
      if (token.text) span.append(token.text.replaceAll("\n", "⏎\n"));
      else span.append(element("span", { className: "mark" }, token.name.startsWith("<") ? token.name : "·"));
      part.append(span);
      this.spans.push(span);
    }
    this.box.append(part);
  }

  point(n, focus = false) {
    if (n === this.at && !focus) return;
    const before = this.spans[this.at];
    if (before) { before.removeAttribute("aria-current"); before.tabIndex = -1; }
    else if (this.spans[0]) this.spans[0].tabIndex = -1;
    this.at = n;
    const span = this.spans[n];
    if (!span) return;
    span.setAttribute("aria-current", "true");
    span.tabIndex = 0;
    if (focus && document.activeElement !== span) span.focus();
    this.onPoint(n);
  }

  // Index of the token above (-1) or below (1) the current one.
  rowNeighbor(direction) {
    const here = this.spans[this.at]?.getBoundingClientRect();
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
