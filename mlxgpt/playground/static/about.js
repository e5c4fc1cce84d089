// The About tab of a file that contains a model: what it is, and what it wrote during training.

import { localize, number, t, translate } from "./language.js";
import { byId, element, state } from "./shared.js";

export function init() {
  byId("about-rows").append(...state.run.about.map(([name, value]) =>
    element("tr", {}, element("th", { scope: "row" }, translate(name)), element("td", {}, /^[\d.,]+$/.test(value) ? localize(value) : value))));
  byId("about-snapshots").append(...state.run.texts.map(([step, text]) =>
    element("li", {}, element("h3", {}, t`step ${number(step)}`), text)));
  byId("about-history").hidden = !state.run.texts.length;
}

export const onOpen = () => {};
