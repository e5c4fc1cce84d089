// Runs the program of an HTML file that contains a model, without a browser.
//
//     node page_engine.mjs FILE.html FOLDER < TASKS.json > RESULTS.json
//
// FOLDER has the page's modules. A task is {logits: ids}, {greedy: text, count}, {encode: text} or {together: tasks}, which run interleaved.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [file, folder] = process.argv.slice(2);
const page = readFileSync(file, "utf8");
const elements = Object.fromEntries([...page.matchAll(/<script type="[^"]*" id="([^"]*)">(.*?)<\/script>/gs)].map(([, id, textContent]) => [id, { textContent }]));
globalThis.document = { getElementById: (id) => elements[id] };
const load = (name) => import(pathToFileURL(`${folder}/${name}`).href);
const [{ readWeights, streamTokens }, { GPT }, { Tokenizer }] = await Promise.all(["file_api.js", "gpt.js", "tokenizer.js"].map(load));
const info = JSON.parse(elements["model-info"].textContent);
const tokenizer = new Tokenizer(JSON.parse(elements["model-tokenizer"].textContent), info.end_of_text);
const bytes = Buffer.from(elements["model-weights"].textContent, "base64");
const model = new GPT(info.config, readWeights(new Uint8Array(bytes).buffer, info.weights));

async function run(task) {
  if (task.encode !== undefined) return tokenizer.encode(task.encode);
  if (task.logits) {
    const cache = model.newCache();
    return task.logits.map((id) => Array.from(model.logits(model.step(cache, id))));
  }
  if (task.together) return Promise.all(task.together.map(run));
  const ids = [];
  const body = { text: task.greedy, messages: task.messages, temperature: 0, max_tokens: task.count };
  for await (const event of streamTokens(body)) if (event.id !== undefined) ids.push(event.id);
  return ids;
}

const tasks = JSON.parse(readFileSync(0, "utf8")), results = [];
for (const task of tasks) results.push(await run(task));
process.stdout.write(JSON.stringify(results));
