// Talks with the server: the key comes in the address's fragment, which no server sees, and is kept
// for this tab, so that a reload finds it.

const KEPT = "mlxgpt-key";
if (location.hash.length > 1) {
  sessionStorage.setItem(KEPT, location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
}

export class Refused extends Error {}

async function asked(path, options) {
  const key = sessionStorage.getItem(KEPT);
  if (!key) throw new Refused("This page needs its key: open the whole address that mlxgpt play has shown.");
  let response;
  try {
    response = await fetch(path, { ...options, headers: { Authorization: `Bearer ${key}` } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("mlxgpt play does not answer.\n→ start it again, and open the address it shows.");
  }
  if (!response.ok) {
    const said = await response.json().catch(() => null);
    throw new Refused(said?.error?.message ?? `refused: ${response.status}`);
  }
  return response;
}

const posted = (body, signal) => ({ method: "POST", body: JSON.stringify(body), signal });

export const get = async (path) => (await asked(path, {})).json();
export const post = async (path, body, signal) => (await asked(path, posted(body, signal))).json();

// Server-sent events. EventSource could not send a key.
export async function* events(path, body, signal) {
  const reader = (await asked(path, posted(body, signal))).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const event = JSON.parse(part.slice("data: ".length));
      if (event.error) throw new Refused(event.error.message);
      yield event;
    }
  }
}

// Of questions asked in quick succession the last one alone is answered.
export function latest(path) {
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
