// The Chat tab: a conversation with a model that has a chat template.

import { streamTokens } from "./api.js";
import { generationParams } from "./generate.js";
import { t } from "./language.js";
import { byId, clearError, element, guarded, showError, state } from "./shared.js";

const MAX_MESSAGES = 199; // of the server's 200, so that the first one is the user's

let messages = []; // {role, content}
let running = null;

export function init() {
  byId("chat-compare-label").hidden = !state.run.reference?.has_chat_template;
  byId("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    guarded(send)();
  });
  byId("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("chat-form").requestSubmit();
    }
  });
  byId("stop-reply-button").addEventListener("click", () => running?.abort());
  byId("new-chat-button").addEventListener("click", () => {
    running?.abort();
    messages = [];
    byId("messages").replaceChildren();
    byId("message").focus();
  });
}

function showMessage(role, content, name = role === "user" ? t`You` : t`Model`) {
  const text = element("p", {}, content);
  byId("messages").append(element("li", { className: role }, element("b", {}, name), text));
  text.scrollIntoView({ block: "nearest" });
  return text;
}

// Streams a reply into an element; returns how it ended, and its seed.
async function streamReply(body, signal, text) {
  let ending = t`stopped`, seed = null;
  for await (const event of streamTokens(body, signal)) {
    seed = event.seed ?? seed;
    if (event.finish_reason) ending = event.finish_reason === "length" ? t`reached max tokens` : "";
    text.textContent += event.text ?? "";
  }
  return { ending, seed };
}

// Sends the message and shows the reply; without any reply, the message returns to its field.
async function send() {
  const content = byId("message").value.trim();
  if (!content || running) return;
  clearError();
  const controller = running = new AbortController();
  const conversation = messages;
  conversation.push({ role: "user", content });
  byId("message").value = "";
  byId("stop-reply-button").disabled = false;
  byId("send-button").disabled = true;
  byId("chat-status").textContent = "";
  const question = showMessage("user", content).parentElement;
  const text = showMessage("assistant", "");
  let ending = t`stopped`, seed;
  try {
    const body = { messages: conversation.slice(-MAX_MESSAGES), ...generationParams() };
    ({ ending, seed } = await streamReply(body, controller.signal, text));
    if (byId("chat-compare").checked && conversation === messages) {
      const other = showMessage("assistant", "", state.run.reference.name);
      await streamReply({ ...body, seed, reference: true }, controller.signal, other);
    }
  } catch (error) {
    showError(error);
  }
  const reply = text.textContent;
  running = null;
  byId("stop-reply-button").disabled = true;
  byId("send-button").disabled = false;
  if (conversation !== messages) return; // a new conversation has begun
  if (reply) {
    conversation.push({ role: "assistant", content: reply });
    byId("chat-status").textContent = ending;
  } else {
    conversation.pop();
    question.remove();
    text.parentElement.remove();
    byId("message").value = content;
  }
}
