// The tokenizer of a tokenizer.json: byte-level BPE with GPT-2's pattern, or one token per character.

// GPT-2's, with Unicode's white space, as in tiktoken.
const PATTERN = /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+$|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}/gu;

// GPT-2's characters for bytes: printable Latin-1 as itself, the others from U+0100 on.
function bytesByCharacter() {
  const isPrintable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  const bytes = new Map();
  let other = 256;
  for (let byte = 0; byte < 256; byte += 1) bytes.set(String.fromCodePoint(isPrintable(byte) ? byte : other++), byte);
  return bytes;
}

export class Tokenizer {
  // tree: the contents of tokenizer.json. endOfText: id, or null.
  constructor(tree, endOfText) {
    const { vocab, merges } = tree.model;
    this.endOfText = endOfText;
    this.isCharacters = !tree.pre_tokenizer;
    this.added = tree.added_tokens.map(({ id, content, special }) => ({ id, content, special }));
    const addedIds = new Set(this.added.map(({ id }) => id));
    this.tokens = []; // bytes of each id
    this.ids = new Map(); // by text, or by bytes as Latin-1
    const characters = bytesByCharacter(), encoder = new TextEncoder();
    const toBytes = (token) => Uint8Array.from(token, (character) => characters.get(character));
    const key = (bytes) => String.fromCharCode(...bytes);
    for (const [token, id] of Object.entries(vocab)) {
      if (addedIds.has(id)) continue;
      this.tokens[id] = this.isCharacters ? encoder.encode(token) : toBytes(token);
      this.ids.set(this.isCharacters ? token : key(this.tokens[id]), id);
    }
    for (const { id, content } of this.added) this.tokens[id] = encoder.encode(content);
    // The rank of a merge is the order of its result, as in tiktoken.
    this.ranks = new Map((merges ?? []).map((pair, rank) => {
      const [left, right] = Array.isArray(pair) ? pair : pair.split(" ");
      return [key(toBytes(left + right)), rank];
    }));
  }

  encode(text) {
    const plain = text.replace(/^\uFEFF/, "").replace(/\r\n?/g, "\n").replace(/\p{Surrogate}/gu, "\uFFFD");
    const contents = this.added.filter(({ special }) => !special).map(({ content }) => content).sort((a, b) => b.length - a.length);
    if (!contents.length) return this.encodePlain(plain);
    const escaped = contents.map((content) => content.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    return plain.split(new RegExp(`(${escaped.join("|")})`)).flatMap((part, n) =>
      (n % 2 ? [this.added.find(({ content }) => content === part).id] : this.encodePlain(part)));
  }

  encodePlain(text) {
    if (!this.isCharacters) return (text.match(PATTERN) ?? []).flatMap((part) => this.encodePart(part));
    for (const form of [text, text.normalize("NFC"), text.normalize("NFD")]) {
      const ids = [...form].map((character) => this.ids.get(character));
      if (!ids.includes(undefined)) return ids;
    }
    const unknown = new Set([...text].filter((character) => !this.ids.has(character)));
    throw new UnknownCharacters([...unknown].slice(0, 10).join(" "));
  }

  // Merges the pair with the lowest rank until none is left.
  encodePart(text) {
    const parts = Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte));
    for (;;) {
      let best = -1, bestRank = Infinity;
      for (let n = 0; n + 1 < parts.length; n += 1) {
        const rank = this.ranks.get(parts[n] + parts[n + 1]) ?? Infinity;
        if (rank < bestRank) [best, bestRank] = [n, rank];
      }
      if (best < 0) return parts.map((part) => this.ids.get(part));
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
  }

  // A token's text, or its bytes in hex if they are not valid UTF-8.
  label(id) {
    try {
      return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(this.tokens[id]);
    } catch {
      return `<${Array.from(this.tokens[id], (byte) => byte.toString(16).padStart(2, "0").toUpperCase()).join(" ")}>`;
    }
  }

  // A function that decodes one id after the other; a character is complete at its last token.
  decoder() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return (id) => (id === this.endOfText ? "" : decoder.decode(this.tokens[id], { stream: true }));
  }
}

// A text with characters that the model does not know; the message lists them.
export class UnknownCharacters extends Error {}
