// Begins: who the model is, and the three tabs.

import { get } from "./api.js";
import * as inside from "./inside.js";
import * as life from "./life.js";
import { byId, guarded, number, state, tell } from "./shared.js";
import * as write from "./write.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const OPENED = { inside: inside.opened, life: life.opened };

function select(tab, focus) {
  for (const one of tabs) {
    const chosen = one === tab;
    one.ariaSelected = String(chosen);
    one.tabIndex = chosen ? 0 : -1;
    byId(one.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) tab.focus();
  guarded(OPENED[tab.getAttribute("aria-controls")] ?? (() => {}))();
}

// Who it is, as it is now: a training makes it older.
async function meet() {
  state.run = await get("/api/run");
  const { run } = state;
  document.title = `mlxgpt play: ${run.name}`;
  byId("name").textContent = run.name;
  byId("facts").textContent = `${number(run.parameters)} parameters, ${run.n_layer} layers of ${run.n_head} heads, `
    + `${number(run.vocab_size)} tokens in its vocabulary, a context of ${number(run.block_size)}`
    + (run.step === null ? "; no checkpoint yet" : `; as it was after ${number(run.step)} steps`);
}

async function begin() {
  await meet();
  state.changed.addEventListener("age", guarded(async () => { await meet(); write.ready(); }));
  write.begin();
  inside.begin();
  life.begin();
  for (const tab of tabs) {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const n = tabs.indexOf(tab);
      const to = { ArrowRight: n + 1, ArrowLeft: n + tabs.length - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to !== undefined) select(tabs[to % tabs.length], true);
    });
  }
  if (state.run.step === null) select(tabs[2]);
  document.body.dataset.ready = "yes";
}

begin().catch(tell);
