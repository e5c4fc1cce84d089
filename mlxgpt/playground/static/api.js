// Requests to the server; the other modules only call the functions exported below. The API key is
// in the URL's fragment, which browsers never send; it is stored for this tab, to survive a reload.

import { t } from "./language.js";

const STORAGE_KEY = "mlxgpt-key";
if (location.hash.length > 1) {
  sessionStorage.setItem(STORAGE_KEY, location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
}

export class RequestError extends Error {}

async function send(path, options) {
  const key = sessionStorage.getItem(STORAGE_KEY);
  if (!key) throw new RequestError(t`This page needs its API key: open the full address that mlxgpt play printed.`);
  let response;
  try {
    response = await fetch(path, { ...options, headers: { Authorization: `Bearer ${key}` } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(t`mlxgpt play is not responding.\n→ restart it and open the address it prints.`);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new RequestError(body?.error?.message ?? t`request failed: ${response.status}`);
  }
  return response;
}

const postOptions = (body, signal) => ({ method: "POST", body: JSON.stringify(body), signal });

const get = async (path) => (await send(path, {})).json();
const post = async (path, body, signal) => (await send(path, postOptions(body, signal))).json();

// Server-sent events of a POST request; EventSource cannot send the key.
async function* postStream(path, body, signal) {
  const reader = (await send(path, postOptions(body, signal))).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const event = JSON.parse(part.slice("data: ".length));
      if (event.error) throw new RequestError(event.error.message);
      yield event;
    }
  }
}

// Each call aborts the one before it, which then returns null.
function postLatest(path) {
  let running;
  return async (body) => {
    running?.abort();
    running = new AbortController();
    try {
      return await post(path, body, running.signal);
    } catch (error) {
      if (error.name === "AbortError") return null;
      throw error;
    }
  };
}

export const getRun = () => get("/api/run");
export const getCurves = () => get("/api/curves");
export const streamTokens = (body, signal) => postStream("/api/generate", body, signal);
export const fetchNextTokens = postLatest("/api/next_tokens");
export const fetchReferenceNextTokens = postLatest("/api/next_tokens");
export const fetchAttention = postLatest("/api/attention");
export const fetchLogitLens = postLatest("/api/lens");
export const fetchNeighbors = postLatest("/api/neighbors");
