// All latents in memory, as columns: sorting, filtering and searching without a request.
(function (S) {
  "use strict";

  const IN_LABEL = 1, IS_TOP = 2, IS_PEAK = 4, IS_PROMOTED = 8;
  const PLACES = { label: IN_LABEL, top: IS_TOP, peak: IS_PEAK, promoted: IS_PROMOTED };
  const RARE = 1e-4; // a latent active on fewer tokens than this is rare, as in `sememe geometry`
  const ALIGNED = 0.5; // a latent is aligned with a neuron if more than this share of its square lies on one

  // Figures of a latent by which the list can be sorted and filtered: what they are called, what they mean, where
  // they stand (the index, or the details that come later), and whether they are shares.
  const FIELDS = {
    density: { name: "density", title: "The share of tokens on which it is active", column: "density", share: true },
    l0: { name: "share of L0", title: "Its share of all latents that are active on a token, on average", of: (model, row) => model.index.density[row] / model.l0, share: true },
    max: { name: "largest activation", title: "Its largest activation", column: "max_act" },
    mean: { name: "mean activation", title: "Its mean activation where it is active", column: "mean_act" },
    share: { name: "top share", title: "The share of its activation on its commonest token", column: "top_token_share", share: true },
    spoken: { name: "language share", title: "The share of its examples in its commonest language", column: "language_share", share: true },
    distinct: { name: "peak tokens", title: "Distinct tokens among the peaks of its examples", column: "n_distinct_tokens" },
    score: { name: "score", title: "How well its explanation holds: 0 for guessing, 1 for perfect", detail: "score" },
    mcs: { name: "mcs", title: "Cosine to the nearest latent of the other dictionaries", detail: "mcs" },
    max_cos: { name: "nearest cosine", title: "Cosine to the nearest other latent of this dictionary", detail: "max_cos" },
    self: { name: "self-similarity", title: "Cosine to itself at the last but one kept checkpoint", detail: "self_similarity" },
    reads: { name: "encoder cosine", title: "Cosine of its encoder and decoder directions", detail: "encoder_decoder_cosine" },
    neurons: { name: "effective neurons", title: "Over how many neurons its direction is spread: 1 is one neuron", detail: "n_effective_neurons" },
    neuron: { name: "top neuron's share", title: "The share of its direction's square on one neuron", detail: "top_neuron_share", share: true },
    kurtosis: { name: "kurtosis", title: "Of its direction's entries: 3 is normal, more is fewer neurons", detail: "kurtosis" },
    skew: { name: "skew", title: "Of its direction's entries", detail: "skew" },
    outliers: { name: "outlier share", title: "The share of its square in the dictionary's outlier dimensions", detail: "outlier_share", share: true },
    bias: { name: "bias", title: "Its encoder bias", detail: "bias" },
    norm: { name: "decoder norm", title: "The norm of its decoder direction", detail: "decoder_norm" },
    logits: { name: "logit spread", title: "Standard deviation of its direct effect over the vocabulary", detail: "logit_std" },
    cluster: { name: "cluster", title: "Its group on the map", detail: "cluster" },
  };
  // What is sorted as words: a latent without any comes last, whichever way.
  const WORDS = {
    label: { name: "label", of: (model, row) => model.label(row) },
    token: { name: "top token", of: (model, row) => { const id = model.index.top_token[row]; return id === null ? "" : model.tokens.text(id).trim() || model.tokens.flat(id); } },
    language: { name: "language", of: (model, row) => (model.index.language[row] < 0 ? "" : model.index.languages[model.index.language[row]]) },
    script: { name: "script", of: (model, row) => model.scriptRows()[row] },
  };
  const DESCENDING_FIRST = new Set(Object.keys(FIELDS).filter((key) => key !== "cluster"));

  // The writing system of a token's letters; what has none is digits, blanks or signs.
  const SCRIPTS = ["Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Han", "Hiragana", "Katakana", "Hangul", "Devanagari", "Bengali", "Tamil", "Telugu", "Thai", "Armenian", "Georgian", "Ethiopic", "Khmer", "Myanmar", "Tibetan"]
    .map((name) => [name, new RegExp("\\p{Script=" + name + "}", "u")]);
  function scriptOf(text) {
    for (const [name, pattern] of SCRIPTS) if (pattern.test(text)) return name;
    if (/\p{L}/u.test(text)) return "other letters";
    if (/\p{N}/u.test(text)) return "digits";
    if (/^\s*$/u.test(text)) return "blanks";
    if (/\ufffd/.test(text)) return "bytes";
    return "signs";
  }

  // "score:0.5:,mcs::0.3" -> [{field, low, high}]; what cannot be read is left out.
  function parseRanges(text) {
    return (text || "").split(",").map((part) => {
      const [field, low, high] = part.split(":");
      const bound = (value, none) => (value === undefined || value === "" || Number.isNaN(Number(value)) ? none : Number(value));
      return { field, low: bound(low, -Infinity), high: bound(high, Infinity) };
    }).filter(({ field, low, high }) => field in FIELDS && (low > -Infinity || high < Infinity));
  }
  const formatRanges = (ranges) => ranges.map(({ field, low, high }) => `${field}:${low === -Infinity ? "" : low}:${high === Infinity ? "" : high}`).join(",");

  // "120_300,..." -> corners on the map.
  const parseLasso = (text) => (text || "").split(",").map((corner) => corner.split("_").map(Number)).filter((corner) => corner.length === 2 && corner.every(Number.isFinite));
  const formatLasso = (corners) => corners.map(([x, y]) => Math.round(x) + "_" + Math.round(y)).join(",");
  function inside(corners, x, y) {
    let within = false;
    for (let i = 0, j = corners.length - 1; i < corners.length; j = i++) {
      const [xi, yi] = corners[i], [xj, yj] = corners[j];
      if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) within = !within;
    }
    return within;
  }

  // Rows in the order of their keys, then of their numbers. The bits of a float, read as a whole number, are in its
  // order; with the row in the same number the browser's own sort does it, several times quicker than one that asks a
  // function. Keys are told apart by seven digits.
  function sortByKey(rows, keys, n) {
    const size = rows.length, single = new Float32Array(size), bits = new Int32Array(single.buffer);
    const packed = new Float64Array(size);
    for (let i = 0; i < size; i++) single[i] = keys[rows[i]];
    for (let i = 0; i < size; i++) packed[i] = (bits[i] < 0 ? -(bits[i] & 0x7fffffff) : bits[i]) * n + rows[i];
    packed.sort();
    for (let i = 0; i < size; i++) { const row = packed[i] % n; rows[i] = (row < 0 ? row + n : row) | 0; }
  }

  // From a latent to its row. Ids that are all there from 0 on are their own rows: no table of 100,000 is made.
  function rowsOf(ids) {
    if (ids.some((id, row) => id !== row)) return new Map(ids.map((id, row) => [id, row]));
    const has = (id) => Number.isInteger(id) && id >= 0 && id < ids.length;
    return { has, get: (id) => (has(id) ? id : undefined) };
  }

  class Model {
    constructor(index, tokens) {
      this.index = index;
      this.tokens = tokens;
      this.n = index.id.length;
      this.rowOf = rowsOf(index.id);
      this.l0 = index.density.reduce((sum, density) => sum + density, 0) || 1;
      this.meaning = null; // what a question's meaning is near to
      this.details = null; // the other figures, filled when they have arrived
      this.scripts = null;
      this.byToken = null;
      this.lowerExplanations = null;
      this.search = null; // token -> rows, filled when it has arrived
      this.last = null;
      this.explanations = Object.keys(index.explanation).map(Number);
      this.lowerTokens = null;
      this.wordKeys = {}; // by what they sort
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
      this.rowsOfTokens(); // somebody is about to search
      this.last = null;
    }

    setDetails(payload) {
      this.details = payload;
      this.last = null;
    }

    // Whether a figure is there at all; those of the details are, once they have come.
    has(field) {
      const { detail } = FIELDS[field] || {};
      return !!FIELDS[field] && (!detail || !!(this.details && this.details[detail]));
    }

    value(field, row) {
      const { column, detail, of } = FIELDS[field];
      const found = of ? of(this, row) : column ? this.index[column][row] : this.details && this.details[detail] ? this.details[detail][row] : null;
      return found === undefined ? null : found;
    }

    needsDetails(params) {
      const { by } = this.sortOf(params);
      return !!(params.cluster || params.lasso || params.status === "neuron" || (FIELDS[by] && FIELDS[by].detail) || parseRanges(params.f).some(({ field }) => FIELDS[field].detail));
    }

    // The script of each latent's top token; "" for one without.
    scriptRows() {
      if (!this.scripts) {
        const known = new Map();
        this.scripts = this.index.top_token.map((id) => {
          if (id === null) return "";
          if (!known.has(id)) known.set(id, scriptOf(this.tokens.text(id).slice(0, 200)));
          return known.get(id);
        });
      }
      return this.scripts;
    }

    scriptCounts() {
      const counts = new Map();
      for (const script of this.scriptRows()) if (script) counts.set(script, (counts.get(script) || 0) + 1);
      return [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
    }

    // Per row: the cosine of its label's meaning with a question's; {text, cosines} or {text, error}.
    setMeaning(meaning) {
      this.meaning = meaning;
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

    // Token -> rows that have it as their top token, or in their label.
    rowsOfTokens() {
      if (!this.byToken) {
        const tops = new Map(), labels = new Map();
        const put = (map, id, row) => { const rows = map.get(id); if (rows) rows.push(row); else map.set(id, [row]); };
        for (let row = 0; row < this.n; row++) {
          if (this.index.top_token[row] !== null) put(tops, this.index.top_token[row], row);
          for (const id of this.index.label_tokens[row]) put(labels, id, row);
        }
        this.byToken = { tops, labels };
      }
      return this.byToken;
    }

    // Per row: how well it matches (0: not), and where. A number names a latent first of all.
    match(needle, where) {
      if (where === "meaning") {
        const score = this.meaning && this.meaning.text === needle && this.meaning.cosines ? this.meaning.cosines : new Float32Array(this.n);
        return { score, places: new Uint8Array(this.n) };
      }
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
        const { tops, labels } = this.rowsOfTokens();
        for (const id of wanted) {
          for (const row of tops.get(id) || []) hit(row, IS_TOP, 7 + 2 * whole);
          for (const row of labels.get(id) || []) hit(row, IN_LABEL, 6 + 2 * whole);
        }
        if (this.search)
          for (const id of wanted) {
            for (const latent of this.search.peaks.get(id) || []) hit(this.rowOf.get(latent), IS_PEAK, 3 + 2 * whole);
            for (const latent of this.search.promoted.get(id) || []) hit(this.rowOf.get(latent), IS_PROMOTED, 2 + 2 * whole);
          }
      }
      const lower = needle.trim().toLowerCase();
      if (lower) {
        if (!this.lowerExplanations) this.lowerExplanations = this.explanations.map((row) => this.explanation(row).toLowerCase());
        const words = lower.split(/\s+/);
        this.lowerExplanations.forEach((text, i) => {
          if (text.includes(lower)) hit(this.explanations[i], IN_LABEL, 10);
          else if (words.length > 1 && words.every((word) => text.includes(word))) hit(this.explanations[i], IN_LABEL, 9);
        });
      }
      const number = /^#?(\d+)$/.exec(needle.trim());
      if (number && where === "any" && this.rowOf.has(Number(number[1]))) score[this.rowOf.get(Number(number[1]))] = 20;
      return { score, places };
    }

    // The rows that a list with these parameters shows, in its order.
    query(params) {
      const { q, in: where, status, lang, min, max, sort, dir, cluster, script, f, lasso, note } = params;
      const key = JSON.stringify([q, where, status, lang, min, max, sort, dir, cluster, script, f, lasso, note, !!this.search, !!this.details, where === "meaning" && this.meaning ? this.meaning.text : ""]);
      if (this.last && this.last.key === key) return this.last;
      const { density, n_active, language, languages } = this.index;
      const found = params.q ? this.match(params.q, params.in) : null;
      // A bar of the density histogram holds its lower edge and not its upper one, and so do these bounds.
      const low = params.min === "" ? -Infinity : Number(params.min), high = params.max === "" || Number(params.max) >= 1 ? Infinity : Number(params.max);
      const spoken = params.lang ? (languages.includes(params.lang) ? languages.indexOf(params.lang) : NaN) : null;
      const scripts = script ? this.scriptRows() : null;
      const ranges = parseRanges(f).filter(({ field }) => this.has(field));
      const { details } = this;
      const corners = details && details.x ? parseLasso(lasso) : [];
      const group = cluster === "" || !details ? null : cluster === "none" ? null : Number(cluster);
      const aligned = details && details.top_neuron_share;
      const noted = S.notes ? S.notes.test(note) : null;
      // One pass for each filter that is set: most often none is but the first.
      let rows = [];
      for (let row = 0; row < this.n; row++) if (status === "all" || (status === "dead") === !n_active[row]) rows.push(row);
      const keep = (test) => { rows = rows.filter(test); };
      if (found) keep((row) => found.score[row] > 0);
      if (noted) keep((row) => noted(this.index.id[row]));
      if (status === "rare") keep((row) => density[row] < RARE);
      if (status === "neuron") keep((row) => aligned && aligned[row] > ALIGNED);
      if (scripts) keep((row) => scripts[row] === script);
      if (details && cluster !== "") keep((row) => details.cluster[row] === group);
      if (corners.length > 2) keep((row) => details.x[row] !== null && inside(corners, details.x[row], details.y[row]));
      for (const { field, low: from, high: to } of ranges) keep((row) => { const value = this.value(field, row); return value !== null && value >= from && value <= to; });
      if (spoken !== null) keep((row) => language[row] === spoken);
      if (low > -Infinity || high < Infinity || Number.isNaN(low) || Number.isNaN(high)) keep((row) => density[row] >= low && density[row] < high);
      this.sort(rows, params, found);
      this.last = { key, rows, places: found && found.places };
      return this.last;
    }

    sortOf(params) {
      const wanted = params.sort === "match" || params.sort === "id" || params.sort in WORDS || params.sort in FIELDS ? params.sort : "";
      const by = wanted || (params.q ? "match" : "density");
      const dir = params.dir || (by === "match" || DESCENDING_FIRST.has(by) ? "desc" : "asc");
      return { by, dir };
    }

    sort(rows, params, found) {
      const { by, dir } = this.sortOf(params);
      const { index } = this;
      const sign = dir === "desc" ? -1 : 1;
      if ((by === "match" && found) || by in FIELDS || by === "id") {
        // Ascending keys. Of equally good matches the denser come first; latents without a figure come last.
        const keys = new Float64Array(this.n), match = by === "match", whole = params.in !== "meaning";
        for (const row of rows) {
          const value = match ? found.score[row] : by === "id" ? index.id[row] : this.value(by, row);
          keys[row] = value === null ? Infinity : match && whole ? sign * value * 2 - index.density[row] : sign * value;
        }
        sortByKey(rows, keys, this.n);
      }
      else {
        const kind = by in WORDS ? by : "label";
        if (!this.wordKeys[kind]) this.wordKeys[kind] = Array.from({ length: this.n }, (_, row) => WORDS[kind].of(this, row).toLowerCase());
        const keys = this.wordKeys[kind];
        rows.sort((a, b) => (keys[a] === "") - (keys[b] === "") || sign * (keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : 0) || a - b);
      }
    }

    placeNames(bits) {
      return [[IN_LABEL, "label"], [IS_TOP, "top"], [IS_PEAK, "peak"], [IS_PROMOTED, "promoted"]].filter(([bit]) => bits & bit).map(([, name]) => name);
    }
  }

  S.Model = Model;
  S.fields = { FIELDS, WORDS, RARE, ALIGNED, parseRanges, formatRanges, parseLasso, formatLasso, inside };
})((window.Sememe = window.Sememe || {}));
