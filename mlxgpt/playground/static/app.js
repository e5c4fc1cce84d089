// Entry point: loads the run and sets up the tabs.

import { getRun } from "./api.js";
import * as chat from "./chat.js";
import * as generate from "./generate.js";
import * as inspect from "./inspect.js";
import { number, setLanguage, t } from "./language.js";
import { byId, guarded, showError, state } from "./shared.js";
import * as training from "./training.js";

let tabs = [...document.querySelectorAll("[role=tab]")];
const ON_OPEN = { inspect: inspect.onOpen, training: training.onOpen };

function select(tab, focus) {
  for (const other of tabs) {
    const selected = other === tab;
    other.ariaSelected = String(selected);
    other.tabIndex = selected ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !selected;
  }
  if (focus) tab.focus();
  guarded(ON_OPEN[tab.getAttribute("aria-controls")] ?? (() => {}))();
}

// Loads and shows the run: its name, its size, and its latest checkpoint.
async function loadRun() {
  state.run = await getRun();
  const { run } = state;
  document.title = run.is_file ? run.name : `mlxgpt play: ${run.name}`;
  byId("run-name").textContent = run.name;
  byId("run-info").textContent = t`${number(run.parameters)} parameters, ${run.n_layer} layers × ${run.n_head} heads, vocabulary ${number(run.vocab_size)}, block size ${number(run.block_size)}`
    + (run.step === null ? t`; no checkpoint yet` : t`; checkpoint at step ${number(run.step)}`);
}

async function init() {
  setLanguage();
  await loadRun();
  state.changed.addEventListener("snapshots", guarded(async () => { await loadRun(); generate.updateControls(); }));
  byId("tab-chat").hidden = !state.run.has_chat_template;
  tabs = tabs.filter((tab) => !tab.hidden);
  generate.init();
  chat.init();
  inspect.init();
  training.init();
  for (const tab of tabs) {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const n = tabs.indexOf(tab);
      const to = { ArrowRight: n + 1, ArrowLeft: n + tabs.length - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to !== undefined) select(tabs[to % tabs.length], true);
    });
  }
  if (state.run.step === null) select(byId("tab-training"));
  document.body.dataset.ready = "yes";
}

init().catch(showError);
