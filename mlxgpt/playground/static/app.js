// Entry point: loads the run, and sets up the three tabs.

import { get } from "./api.js";
import * as inside from "./inside.js";
import * as life from "./life.js";
import { byId, guarded, number, showError, state } from "./shared.js";
import * as write from "./write.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const ON_OPEN = { inside: inside.onOpen, life: life.onOpen };

function select(tab, focus) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.ariaSelected = String(chosen);
    other.tabIndex = chosen ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) tab.focus();
  guarded(ON_OPEN[tab.getAttribute("aria-controls")] ?? (() => {}))();
}

// Name and size of the run, and its step, which grows while it trains.
async function loadRun() {
  state.run = await get("/api/run");
  const { run } = state;
  document.title = `mlxgpt play: ${run.name}`;
  byId("name").textContent = run.name;
  byId("facts").textContent = `${number(run.parameters)} parameters, ${run.n_layer} layers × ${run.n_head} heads, `
    + `vocabulary ${number(run.vocab_size)}, block size ${number(run.block_size)}`
    + (run.step === null ? "; no checkpoint yet" : `; checkpoint at step ${number(run.step)}`);
}

async function init() {
  await loadRun();
  state.changed.addEventListener("age", guarded(async () => { await loadRun(); write.updateControls(); }));
  write.init();
  inside.init();
  life.init();
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

init().catch(showError);
