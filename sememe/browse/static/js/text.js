// Tokens as honest text: what would be invisible, or would act on the page, is shown as a glyph or an escape.
// Knows strings and bytes; knows nothing about the page. Every result is text, never markup.
(function (S) {
  "use strict";

  // Control, format (zero-width, direction overrides, tags), separators, surrogates, private use, unassigned.
  const HIDDEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\p{Co}\p{Cn}]/u;
  const IGNORABLE = /\p{Default_Ignorable_Code_Point}/u; // fillers, variation selectors: seen only on what they follow
  const MARK = /\p{M}/u;
  const SPACES = /\p{Zs}/u;
  const MAX_SHOWN = 80; // letters of one token: longer ones are cut, and say so

  function escape(char) {
    const code = char.codePointAt(0);
    if (code < 0x100) return "\\x" + code.toString(16).toUpperCase().padStart(2, "0");
    if (code < 0x10000) return "\\u" + code.toString(16).toUpperCase().padStart(4, "0");
    return "\\u{" + code.toString(16).toUpperCase() + "}";
  }

  // A number with commas between its thousands. By hand: the first word with the browser's tables of languages costs
  // 50 ms, and would be had before anything is drawn.
  function grouped(value) {
    const [whole, part] = String(Number(value.toFixed(3))).split(".");
    return whole.replace(/\B(?=(\d{3})+$)/g, ",") + (part ? "." + part : "");
  }

  // A string as runs: {text} as it is, {glyph, text} for something shown in its place.
  // spaces: "all" shows every space as a dot, "runs" only those beside another blank, where they would vanish.
  function runs(string, spaces) {
    const out = [];
    let plain = "";
    const chars = Array.from(string);
    const push = (glyph, kind) => {
      if (plain) out.push({ text: plain });
      plain = "";
      const last = out[out.length - 1];
      if (last && last.kind === kind && kind !== "newline") last.text += glyph;
      else out.push({ kind, text: glyph });
    };
    for (let i = 0; i < chars.length; i++) {
      const char = chars[i];
      if (i >= MAX_SHOWN) {
        push("… (" + grouped(chars.length) + " characters)", "escape");
        break;
      }
      if (char === "\n") push("↵", "newline");
      else if (char === "\t") push("⇥", "blank");
      else if (char === " ") {
        const alone = chars[i - 1] !== " " && chars[i + 1] !== " ";
        if (spaces === "all" || !alone) push("·", "blank");
        else plain += char;
      } else if (SPACES.test(char)) push(escape(char), "escape");
      else if (HIDDEN.test(char) || (IGNORABLE.test(char) && !(plain && MARK.test(char)))) push(escape(char), "escape");
      else if (spaces === "all" && !plain && MARK.test(char)) plain += "◌" + char; // an accent by itself stands on a circle
      else plain += char;
    }
    if (plain) out.push({ text: plain });
    return out;
  }

  // One flat string, for tooltips' sorting, titles and search results.
  function flat(string) {
    return runs(string, "all").map((run) => run.text).join("");
  }

  const hexBytes = (hex) => hex.match(/../g).map((pair) => parseInt(pair, 16));

  // The length of the UTF-8 sequence that starts with this byte; 0 where none can.
  function sequenceLength(byte) {
    if (byte < 0x80) return 1;
    if (byte >= 0xc2 && byte < 0xe0) return 2;
    if (byte >= 0xe0 && byte < 0xf0) return 3;
    if (byte >= 0xf0 && byte < 0xf5) return 4;
    return 0;
  }

  const strict = new TextDecoder("utf-8", { fatal: true });

  // Consecutive tokens that are not UTF-8 by themselves, joined: each gets the letters that begin in it.
  // `open` marks a token that only continues a letter; bytes that belong to no letter become escapes.
  function join(byteLists, spaces) {
    const bytes = [], owner = [];
    byteLists.forEach((list, token) => list.forEach((byte) => { bytes.push(byte); owner.push(token); }));
    const out = byteLists.map(() => ({ parts: [], continues: false }));
    const plain = byteLists.map(() => "");
    const flush = (token) => { out[token].parts.push(...runs(plain[token], spaces)); plain[token] = ""; };
    for (let i = 0; i < bytes.length; ) {
      const length = sequenceLength(bytes[i]), token = owner[i];
      let letter = null;
      if (length && i + length <= bytes.length) {
        try { letter = strict.decode(new Uint8Array(bytes.slice(i, i + length))); } catch (error) { letter = null; }
      }
      if (letter === null) {
        flush(token);
        out[token].parts.push({ kind: "escape", text: "\\x" + bytes[i].toString(16).toUpperCase().padStart(2, "0") });
        i += 1;
      } else {
        plain[token] += letter;
        for (let j = i + 1; j < i + length; j++) if (owner[j] !== token) out[owner[j]].continues = true;
        i += length;
      }
    }
    byteLists.forEach((_, token) => flush(token));
    return out;
  }

  // What letters a cut-off sequence at the end of these bytes can become: "ぁ–み" for E3 81; null if there is none.
  function beginningOf(bytes) {
    for (let start = Math.max(0, bytes.length - 3); start < bytes.length; start++) {
      const length = sequenceLength(bytes[start]), rest = bytes.slice(start + 1);
      if (length < 2 || rest.length >= length - 1 || rest.some((byte) => byte < 0x80 || byte > 0xbf)) continue;
      let low = bytes[start] & (0xff >> (length + 1)), high = low;
      for (let i = 0; i < length - 1; i++) {
        low = (low << 6) | (i < rest.length ? rest[i] & 63 : 0);
        high = (high << 6) | (i < rest.length ? rest[i] & 63 : 63);
      }
      const letter = /[\p{L}\p{N}\p{S}]/u, shown = (code) => code < 0xd800 || code > 0xdfff ? letter.test(String.fromCodePoint(code)) : false;
      const shortest = { 2: 0x80, 3: 0x800, 4: 0x10000 }[length]; // nothing is written longer than it must be
      for (low = Math.max(low, shortest); low <= high && !shown(low); ) low++;
      while (high >= low && !shown(high)) high--;
      return low <= high ? String.fromCodePoint(low) + "–" + String.fromCodePoint(high) : null;
    }
    return null;
  }

  // The token table of an atlas.
  class Tokens {
    constructor(payload) {
      this.ids = payload.id;
      this.texts = payload.text;
      this.place = new Map(payload.id.map((id, i) => [id, i]));
      this.bytes = new Map(Object.entries(payload.bytes).map(([id, hex]) => [Number(id), hexBytes(hex)]));
      this.cache = new Map();
      this.learned = new Map();
    }
    text(id) {
      const place = this.place.get(id);
      if (place !== undefined) return this.texts[place];
      const text = this.learned.get(id);
      return text === undefined ? "<token " + id + ">" : text;
    }
    // Tokens that occur nowhere in the atlas, by what somebody else calls them.
    learn(ids, texts, bytes) {
      ids.forEach((id, i) => {
        if (this.place.has(id)) return;
        this.learned.set(id, texts[i]);
        if (bytes && bytes[i]) this.bytes.set(id, hexBytes(bytes[i]));
      });
    }
    // One token by itself: half letters are escapes, every space is a dot.
    alone(id) {
      let found = this.cache.get(id);
      if (!found) {
        const bytes = this.bytes.get(id);
        found = bytes ? merge(join([bytes], "all")[0].parts) : runs(this.text(id), "all");
        const hint = bytes && beginningOf(bytes);
        if (hint) found.push({ kind: "hint", text: hint });
        this.cache.set(id, found);
      }
      return found;
    }
    flat(id) {
      return this.alone(id).filter((run) => run.kind !== "hint").map((run) => run.text).join("");
    }
    // A row of tokens, letters that span several joined again: [{parts, continues}] of the same length.
    row(ids) {
      const out = [];
      for (let i = 0; i < ids.length; ) {
        let stop = i;
        while (stop < ids.length && this.bytes.has(ids[stop])) stop++;
        if (stop > i) {
          for (const piece of join(ids.slice(i, stop).map((id) => this.bytes.get(id)), "runs"))
            out.push({ parts: merge(piece.parts), continues: piece.continues && !piece.parts.length });
          i = stop;
        } else {
          out.push({ parts: runs(this.text(ids[i]), "runs"), continues: false });
          i += 1;
        }
      }
      return out;
    }
  }

  function merge(parts) {
    const out = [];
    for (const part of parts) {
      const last = out[out.length - 1];
      if (last && last.kind === part.kind && part.kind !== "newline") out[out.length - 1] = { kind: part.kind, text: last.text + part.text };
      else out.push(part);
    }
    return out;
  }

  S.text = { Tokens, runs, flat, escape, grouped };
})((window.Sememe = window.Sememe || {}));
