// What the pages Try, Compare, Rate and Notes share: the session, honest text, excerpts, files to keep and to read.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useEffect, useMemo, useState } = preactHooks;
  const html = htm.bind(h);

  // Pages by the word in the address, #/try: {title, Page, when(session, overview), many: whether #/try/3 is one of several}.
  S.pages = {};
  S.session = null;
  const waiting = [];

  // What is served, whether notes may be written, whether a model answers. A site of an older export has no session.
  S.loadSession = () => S.source.session().catch(() => ({ atlases: [{}], write: false, live: false })).then((session) => {
    S.session = session;
    for (const resolve of waiting.splice(0)) resolve(session);
    if (S.redraw) S.redraw();
  });
  S.whenSession = () => (S.session ? Promise.resolve(S.session) : new Promise((resolve) => waiting.push(resolve)));

  // The links in the header, and which atlas is shown where there are several.
  S.Tools = function ({ overview }) {
    const { session } = S;
    if (!session) return html`<nav class="tools" aria-label="Pages"></nav>`;
    const change = (event) => { location.href = (location.pathname || "") + (event.target.value === "0" ? "" : "?atlas=" + event.target.value) + "#/"; };
    return html`<nav class="tools" aria-label="Pages">
      ${session.atlases.length > 1 && html`<label class="field"><span class="sr">Atlas</span><select name="atlas" onChange=${change}>
        ${session.atlases.map(({ name }, i) => html`<option key=${i} value=${i} selected=${i === S.atlas}>${S.honest(name || "atlas " + (i + 1))}</option>`)}</select></label>`}
      ${Object.entries(S.pages).filter(([, { when }]) => !when || when(session, overview)).map(([name, { title }]) => html`<a key=${name} href=${"#/" + name} aria-current=${S.route.current().page === name ? "page" : null}>${title}</a>`)}
    </nav>`;
  };

  // A text that somebody typed, as it is, but for what would be invisible or act on the page: that becomes escapes.
  S.honest = (text) => (String(text).match(/[^\n]{1,60}|\n/gu) || []).map((part) => (part === "\n" ? part : S.text.runs(part, "runs").map((run) => (run.kind === "blank" ? run.text.replace(/·/g, " ").replace(/⇥/g, "\t") : run.text)).join(""))).join("");

  // Tokens that a model gave, not the atlas: [{token, text, bytes}], letters across tokens joined again.
  S.foreignTokens = (tokens) => {
    const numbers = tokens.map((_, i) => i);
    const bytes = {};
    tokens.forEach((token, i) => { if (token.bytes) bytes[i] = token.bytes; });
    return new S.text.Tokens({ id: numbers, text: tokens.map(({ text }) => text), bytes }).row(numbers);
  };

  const rowsOf = (columns) => columns.context.map((_, i) => Object.fromEntries(Object.keys(columns).map((name) => [name, columns[name][i]])));

  // At most so many: the strongest of the top ones, of others some spread evenly, the first and the last among them.
  const some = (rows, kind, limit) => (kind === "top" || rows.length <= limit ? rows.slice(0, limit) : Array.from({ length: limit }, (_, i) => rows[Math.round((i * (rows.length - 1)) / Math.max(1, limit - 1))]));

  // A latent of any of the atlases with some of its examples, so many of each kind: {latent, examples, contexts}.
  S.readExamples = async (source, model, id, kinds = ["top"], limit = 5) => {
    const latent = await source.latent(id, model.rowOf.get(id));
    const rows = rowsOf(latent.examples);
    const examples = kinds.flatMap((kind) => some(rows.filter((row) => row.kind === kind), kind, limit));
    const { contexts } = await source.contexts([...new Set(examples.map(({ context }) => context))]);
    return { latent, examples, contexts };
  };

  // A window of text, shaded by activation; nothing to open, nothing to hover.
  S.Excerpt = function ({ model, latent, example, context }) {
    const pieces = useMemo(() => (context ? model.tokens.row(context.tokens) : []), [context]);
    if (!context) return html`<li class="excerpt missing">This example's text is not in the atlas.</li>`;
    const acts = new Map(example.positions.map((position, i) => [position, example.acts[i]]));
    const spans = [];
    for (let i = example.start; i < example.stop; i++) {
      const act = acts.get(i) || 0;
      const shade = act && latent.max_act ? 0.1 + 0.9 * Math.min(1, Math.abs(act) / latent.max_act) : 0;
      const peak = i === example.position && example.kind !== "random";
      spans.push(html`<span key=${i} class=${"tok" + (act ? (act < 0 ? " on negative" : " on") : "") + (peak ? " peak" : "") + (pieces[i].continues ? " continues" : "")} style=${shade ? { "--a": shade.toFixed(3) } : null}><${S.tokenViews.Runs} parts=${pieces[i].parts} /></span>`);
    }
    return html`<li class="excerpt" dir="auto">${spans}</li>`;
  };

  // The model of another of the atlases that are served together, read once.
  const models = new Map();
  S.modelOf = (number) => {
    if (!models.has(number)) {
      const source = S.sourceOf(number);
      models.set(number, Promise.all([source.index(), source.tokens()]).then(([index, tokens]) => new S.Model(index, new S.text.Tokens(tokens))));
    }
    return models.get(number);
  };
  S.useModelOf = (number) => {
    const [found, setFound] = useState({ model: null, error: null });
    useEffect(() => {
      if (number === null) return undefined;
      let stale = false;
      S.modelOf(number).then((model) => { if (!stale) setFound({ model, error: null }); }, (error) => { if (!stale) setFound({ model: null, error }); });
      return () => { stale = true; };
    }, [number]);
    return found;
  };

  // Write a page's state into its address without a new entry in the history.
  S.pageAddress = (name, query) => {
    const text = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined)).toString();
    return "#/" + name + (text ? "?" + text : "");
  };

  S.keepFile = (name, value) => {
    const url = URL.createObjectURL(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }));
    const link = document.createElement("a");
    link.href = url;
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  };

  S.readFile = async (file) => {
    if (file.size > 32e6) throw new Error("A file to import must be smaller than 32 MB.");
    try { return JSON.parse(await file.text()); } catch (error) { throw new Error("A file to import must be JSON; choose one that was exported here."); }
  };

  // A small seeded generator of numbers in [0, 1): the same queue everywhere (mulberry32).
  S.random = (seed) => {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = state;
      t = Math.imul(t ^ (t >>> 15), t | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  };
})((window.Sememe = window.Sememe || {}));
