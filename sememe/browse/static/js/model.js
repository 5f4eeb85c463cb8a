// All latents in memory, as columns: sorting, filtering and searching without a request.
(function (S) {
  "use strict";

  const IN_LABEL = 1, IS_TOP = 2, IS_PEAK = 4, IS_PROMOTED = 8;
  const PLACES = { label: IN_LABEL, top: IS_TOP, peak: IS_PEAK, promoted: IS_PROMOTED };
  const DESCENDING_FIRST = new Set(["density", "max", "mean", "share"]);

  class Model {
    constructor(index, tokens) {
      this.index = index;
      this.tokens = tokens;
      this.n = index.id.length;
      this.rowOf = new Map(index.id.map((id, row) => [id, row]));
      this.search = null; // token -> rows, filled when it has arrived
      this.last = null;
      this.explanations = Object.keys(index.explanation).map(Number);
      this.lowerTokens = null;
      this.labelKeys = null;
    }

    // By hand before any other: S.notes fills byHand, by row.
    explanation(row) { return (this.byHand && this.byHand.get(row)) || this.index.explanation[row]; }

    // The label's tokens without those that differ in case and blanks only.
    labelTokens(row) {
      const seen = new Set();
      return this.index.label_tokens[row].filter((id) => {
        const key = this.tokens.text(id).trim().toLowerCase() || this.tokens.text(id);
        return !seen.has(key) && seen.add(key);
      });
    }

    label(row) {
      const text = this.explanation(row);
      return text === undefined ? this.labelTokens(row).map((id) => this.tokens.flat(id).replace(/^·/, "")).join(", ") : text;
    }

    setSearch(payload) {
      const table = ({ token, latents }) => new Map(token.map((id, i) => [id, latents[i]]));
      this.search = { promoted: table(payload.promoted), peaks: table(payload.peaks) };
      this.last = null;
    }

    // Tokens that match a text: exact but for case and blanks, or containing it.
    matchTokens(needle) {
      if (!this.lowerTokens) this.lowerTokens = this.tokens.texts.map((text) => text.length > 200 ? text.slice(0, 200).toLowerCase() : text.toLowerCase());
      const trimmed = needle.trim().toLowerCase();
      const wanted = trimmed || needle;
      const exact = [], partial = [];
      const ids = this.tokens.ids;
      this.lowerTokens.forEach((text, i) => {
        if (text === wanted || (trimmed && text.trim() === trimmed)) exact.push(ids[i]);
        else if (wanted.length > 1 && text.includes(wanted)) partial.push(ids[i]);
      });
      return { exact, partial };
    }

    // Per row: how well it matches (0: not), and where. A number names a latent first of all.
    match(needle, where) {
      const score = new Uint8Array(this.n), places = new Uint8Array(this.n);
      const mask = where === "any" ? 15 : PLACES[where] || 15;
      const hit = (row, place, points) => {
        if (row === undefined || !(place & mask)) return;
        places[row] |= place;
        if (points > score[row]) score[row] = points;
      };
      const { exact, partial } = this.matchTokens(needle);
      // A latent's own tokens come before those of single examples, and within both whole tokens before pieces.
      for (const [ids, whole] of [[partial, 0], [exact, 1]]) {
        const wanted = new Set(ids);
        if (!wanted.size) continue;
        for (let row = 0; row < this.n; row++) if (wanted.has(this.index.top_token[row])) hit(row, IS_TOP, 7 + 2 * whole);
        for (let row = 0; row < this.n; row++) if (this.index.label_tokens[row].some((id) => wanted.has(id))) hit(row, IN_LABEL, 6 + 2 * whole);
        if (this.search)
          for (const id of wanted) {
            for (const latent of this.search.peaks.get(id) || []) hit(this.rowOf.get(latent), IS_PEAK, 3 + 2 * whole);
            for (const latent of this.search.promoted.get(id) || []) hit(this.rowOf.get(latent), IS_PROMOTED, 2 + 2 * whole);
          }
      }
      const lower = needle.trim().toLowerCase();
      if (lower) for (const row of this.explanations) if (this.explanation(row).toLowerCase().includes(lower)) hit(row, IN_LABEL, 10);
      const number = /^#?(\d+)$/.exec(needle.trim());
      if (number && where === "any" && this.rowOf.has(Number(number[1]))) score[this.rowOf.get(Number(number[1]))] = 20;
      return { score, places };
    }

    // The rows that a list with these parameters shows, in its order.
    query(params) {
      const key = JSON.stringify([params.q, params.in, params.status, params.lang, params.min, params.max, params.sort, params.dir, !!this.search]);
      if (this.last && this.last.key === key) return this.last;
      const { density, n_active, language, languages } = this.index;
      const found = params.q ? this.match(params.q, params.in) : null;
      // A bar of the density histogram holds its lower edge and not its upper one, and so do these bounds.
      const low = params.min === "" ? -Infinity : Number(params.min), high = params.max === "" || Number(params.max) >= 1 ? Infinity : Number(params.max);
      const spoken = params.lang ? (languages.includes(params.lang) ? languages.indexOf(params.lang) : NaN) : null;
      const rows = [];
      for (let row = 0; row < this.n; row++) {
        if (found && !found.score[row]) continue;
        if (params.status === "alive" && !n_active[row]) continue;
        if (params.status === "dead" && n_active[row]) continue;
        if (spoken !== null && language[row] !== spoken) continue;
        if (!(density[row] >= low && density[row] < high)) continue;
        rows.push(row);
      }
      this.sort(rows, params, found);
      this.last = { key, rows, places: found && found.places };
      return this.last;
    }

    sortOf(params) {
      const by = params.sort || (params.q ? "match" : "density");
      const dir = params.dir || (by === "match" || DESCENDING_FIRST.has(by) ? "desc" : "asc");
      return { by, dir };
    }

    sort(rows, params, found) {
      const { by, dir } = this.sortOf(params);
      const { index } = this;
      const sign = dir === "desc" ? -1 : 1;
      const numeric = { density: index.density, max: index.max_act, mean: index.mean_act, share: index.top_token_share, id: index.id }[by];
      if (by === "match" && found) rows.sort((a, b) => sign * (found.score[a] - found.score[b]) || index.density[b] - index.density[a] || a - b);
      else if (numeric) rows.sort((a, b) => sign * ((numeric[a] ?? -1) - (numeric[b] ?? -1)) || a - b);
      else {
        if (!this.labelKeys) this.labelKeys = Array.from({ length: this.n }, (_, row) => this.label(row).toLowerCase());
        const keys = this.labelKeys;
        // Nameless latents last, whichever way.
        rows.sort((a, b) => (keys[a] === "") - (keys[b] === "") || sign * (keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : 0) || a - b);
      }
    }

    placeNames(bits) {
      return [[IN_LABEL, "label"], [IS_TOP, "top"], [IS_PEAK, "peak"], [IS_PROMOTED, "promoted"]].filter(([bit]) => bits & bit).map(([, name]) => name);
    }
  }

  S.Model = Model;
})((window.Sememe = window.Sememe || {}));
