// The list of latents: search, filters, a table that draws only what is seen, and the same as a narrow rail.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useEffect, useLayoutEffect, useRef, useState } = preactHooks;
  const html = htm.bind(h);
  const { number, percent, count } = S.charts;
  const { Chip, Label } = S.tokenViews;
  const { route } = S;
  const { FIELDS, WORDS, parseRanges, formatRanges } = S.fields;

  // Draws the rows between first and last; scrolls with the window, or within itself (`own`).
  function Virtual({ n, height, draw, own, current, label, columns, children }) {
    const ref = useRef(null);
    const [range, setRange] = useState([0, 40]);
    useLayoutEffect(() => {
      const element = ref.current, target = own ? element : window;
      const measure = () => {
        const top = own ? element.scrollTop : -element.getBoundingClientRect().top;
        const seen = own ? element.clientHeight : window.innerHeight;
        const first = Math.max(0, Math.floor(top / height) - 8);
        const last = Math.min(n, Math.max(20, Math.ceil((top + seen) / height) + 8)); // the first few even below the fold
        setRange((old) => (old[0] === first && old[1] === last ? old : [first, Math.max(last, first)]));
      };
      measure();
      target.addEventListener("scroll", measure, { passive: true });
      window.addEventListener("resize", measure);
      return () => { target.removeEventListener("scroll", measure); window.removeEventListener("resize", measure); };
    }, [n, height, own]);
    useLayoutEffect(() => {
      if (!own || current === undefined || current < 0) return;
      const element = ref.current, top = current * height;
      if (top < element.scrollTop || top + height > element.scrollTop + element.clientHeight)
        element.scrollTop = top - element.clientHeight / 2 + height / 2;
    }, [current, n, height, own]);
    const rows = [];
    for (let i = range[0]; i < Math.min(range[1], n); i++) rows.push(draw(i, { top: i * height + "px", height: height + "px" }));
    const keys = (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      const link = event.target.closest("[data-place]");
      if (!step || !link) return;
      event.preventDefault();
      const next = ref.current.querySelector(`[data-place="${Number(link.dataset.place) + step}"]`);
      if (next) next.focus();
    };
    const table = columns ? { role: "table", "aria-label": label, "aria-rowcount": n, "aria-colcount": columns } : { tabIndex: -1 };
    return html`<div class=${own ? "virtual own" : "virtual"} ref=${ref} ...${table} onKeyDown=${keys}>
      ${children}
      <div class="rows" role=${columns ? "rowgroup" : null} style=${{ height: n * height + "px" }}>${rows}</div>
    </div>`;
  }

  const COLUMNS = [
    ["id", "Latent", "Its number in the dictionary"],
    ["label", "Label", "Its explanation, or the tokens it peaks on"],
    ["promotes", "Promotes", "The output tokens it makes likeliest"],
    ["share", "Top share", "The share of its activation on its commonest token"],
    ["density", "Density", "The share of tokens on which it is active"],
    ["max", "Max", "Its largest activation"],
    ["language", "Language", "The commonest language of its examples' documents"],
  ];

  const UNSORTED = new Set(["promotes"]);

  // The box leads and the address follows, letter by letter; only an address that the box did not write changes it.
  function SearchBox({ params, change, model }) {
    const box = useRef(null), typed = useRef(null), sent = useRef(new Set());
    useLayoutEffect(() => {
      if (params.q === typed.current) { sent.current.clear(); return; }
      if (sent.current.has(params.q)) return; // an earlier letter's address, drawn late
      box.current.value = typed.current = params.q;
    }, [params.q]);
    const input = (event) => {
      typed.current = event.target.value;
      sent.current.add(typed.current);
      change({ q: typed.current, sort: params.sort === "match" ? "" : params.sort });
    };
    return html`<div class="search">
      <input type="search" id="search" ref=${box} onInput=${input} onFocus=${() => S.needSearch(model)} placeholder="Search a token, label or number" aria-label="Search latents" autocomplete="off" autocapitalize="off" spellcheck=${false} enterkeyhint="search" />
      <kbd aria-hidden="true">/</kbd>
    </div>`;
  }

  function Toolbar({ model, overview, params, change, found }) {
    const select = (name, label, options) => html`<label class="field"><span>${label}</span>
      <select name=${name} value=${params[name]} onChange=${(e) => change({ [name]: e.target.value })}>
        ${options.map(([value, text]) => html`<option key=${value} value=${value} selected=${params[name] === value}>${text}</option>`)}
      </select></label>`;
    const bound = (name, label) => html`<input type="number" min="0" max="100" step="any" name=${name} aria-label=${label} placeholder=${name === "min" ? "0" : "100"}
      value=${params[name] === "" ? "" : Number((Number(params[name]) * 100).toPrecision(6))}
      onChange=${(e) => change({ [name]: e.target.value === "" || !(Number(e.target.value) >= 0) ? "" : String(Number((Number(e.target.value) / 100).toPrecision(8))) })} />`;
    const filtered = ["q", "in", "status", "lang", "min", "max", "cluster", "script", "f", "lasso", "note"].some((key) => params[key] !== route.DEFAULTS[key]);
    return html`<div class="toolbar">
      <${SearchBox} model=${model} params=${params} change=${change} />
      ${select("in", "in", [["any", "anything"], ["label", "labels"], ["top", "top tokens"], ["peak", "examples' peaks"], ["promoted", "promoted tokens"], ...(meaningful(overview) || params.in === "meaning" ? [["meaning", "meanings of labels"]] : [])])}
      ${select("status", "show", [["alive", "alive"], ["dead", "dead"], ["rare", "rare"], ["neuron", "neuron-aligned"], ["all", "all"]])}
      ${S.notes && (S.notes.latents.size > 0 || params.note) && select("note", "notes", S.notes.options())}
      ${overview.languages.length > 0 && select("lang", "language", [["", "any"], ...overview.languages.map(({ language, n }) => [language, `${language} (${count(n)})`])])}
      <div class="field" role="group" aria-label="Density in percent"><span>density %</span>${bound("min", "Lowest density in percent")}<span>to</span>${bound("max", "Highest density in percent")}</div>
      <div class="found" role="status" aria-live="polite">${found === null ? "" : html`<b>${count(found)}</b> ${found === 1 ? "latent" : "latents"}`}
        ${filtered && html` <button type="button" class="link" onClick=${() => change(CLEARED)}>Clear</button>`}</div>
      <${MoreFilters} model=${model} overview=${overview} params=${params} change=${change} />
    </div>`;
  }

  // Labels can be searched by meaning where they have been embedded, and a model answers that embeds the question.
  const meaningful = (overview) => overview.embedded > 0 && !!(S.session && S.session.live);
  const NEAREST = 200; // labels shown, the nearest in meaning

  // Asks for the question's vector when it has not changed for a moment, and compares it with every label's.
  function useMeaning(model, overview, params) {
    const wanted = params.in === "meaning" && params.q.trim() !== "" && model ? params.q : "";
    useEffect(() => {
      if (!wanted || (model.meaning && model.meaning.text === wanted)) return undefined;
      let stale = false;
      const settle = (meaning) => { if (!stale) { model.setMeaning({ text: wanted, ...meaning }); S.redraw(); } };
      if (!meaningful(overview)) { settle({ error: "Meanings can be searched where labels were embedded (sememe explain --scorers embedding) and a model is served." }); return undefined; }
      const timer = setTimeout(() => {
        Promise.all([S.source.embeddings(), S.send("POST", "live/embed", { text: wanted })]).then(([known, { vector }]) => {
          if (vector.length !== known.width) throw new Error("The labels were embedded by another encoder. Run sememe explain again.");
          const packed = atob(known.vectors), cosines = new Float32Array(model.n);
          const found = known.latent.map((latent, i) => {
            let sum = 0;
            for (let j = 0; j < known.width; j++) sum += ((packed.charCodeAt(i * known.width + j) << 24) >> 24) * vector[j];
            return [sum / 127, model.rowOf.get(latent)];
          }).filter(([, row]) => row !== undefined).sort((a, b) => b[0] - a[0]).slice(0, NEAREST);
          for (const [cosine, row] of found) cosines[row] = cosine;
          settle({ cosines });
        }).catch((error) => settle({ error: error.message }));
      }, 250);
      return () => { stale = true; clearTimeout(timer); };
    }, [wanted, model]);
    if (!wanted) return null;
    return model.meaning && model.meaning.text === wanted ? model.meaning : { text: wanted, waiting: true };
  }

  const CLEARED = { q: "", in: "any", status: "alive", lang: "", min: "", max: "", cluster: "", script: "", f: "", lasso: "", note: "" };
  const written = (field, value) => (FIELDS[field].share ? percent(value) : number(value));

  // Filters by any figure, script and group; open while one of them is set or somebody opened it.
  function MoreFilters({ model, overview, params, change }) {
    const [open, setOpen] = useState(false);
    const [field, setField] = useState("score");
    const low = useRef(null), high = useRef(null);
    const ranges = parseRanges(params.f);
    const set = params.cluster || params.script || params.f || params.lasso;
    const wanted = open || set;
    useEffect(() => { if (wanted) S.needDetails(model); }, [wanted, model]);
    const fields = Object.keys(FIELDS).filter((key) => key !== "cluster" && (!model || model.has(key)));
    const chosen = fields.includes(field) ? field : fields[0];
    const share = FIELDS[chosen].share;
    const add = (event) => {
      event.preventDefault();
      const bound = (input, none) => (input.value === "" || Number.isNaN(Number(input.value)) ? none : Number((Number(input.value) / (share ? 100 : 1)).toPrecision(8)));
      const range = { field: chosen, low: bound(low.current, -Infinity), high: bound(high.current, Infinity) };
      low.current.value = high.current.value = "";
      if (range.low > -Infinity || range.high < Infinity) change({ f: formatRanges([...ranges.filter((one) => one.field !== chosen), range]) });
    };
    const choice = (name, label, options) => html`<label class="field"><span>${label}</span><select name=${name} onChange=${(e) => change({ [name]: e.target.value })}>
      ${options.map(([value, text]) => html`<option key=${value} value=${value} selected=${params[name] === value}>${text}</option>`)}</select></label>`;
    const groups = [...overview.clusters].sort((a, b) => b.n - a.n).map((cluster) => [String(cluster.id), `${S.mapViews.clusterName(overview, cluster.id).slice(0, 40)} (${count(cluster.n)})`]);
    return html`<div class="more-filters">
      <button type="button" class="link" aria-expanded=${!!wanted} onClick=${() => setOpen(!wanted)}>${wanted ? "Fewer filters" : "More filters"}</button>
      ${wanted && html`
        ${groups.length > 0 && choice("cluster", "group", [["", "any"], ...groups, ["none", "in no group"]])}
        ${model && choice("script", "script", [["", "any"], ...model.scriptCounts().map(([script, n]) => [script, `${script} (${count(n)})`])])}
        <form class="field range" onSubmit=${add} aria-label="Filter by a figure"><select name="figure" aria-label="Figure" onChange=${(e) => setField(e.target.value)}>
            ${fields.map((key) => html`<option key=${key} value=${key} selected=${key === chosen}>${FIELDS[key].name}${FIELDS[key].share ? " %" : ""}</option>`)}</select>
          <span>from</span><input ref=${low} name="low" type="number" step="any" aria-label="Lowest" /><span>to</span><input ref=${high} name="high" type="number" step="any" aria-label="Highest" />
          <button type="submit" class="button">Add</button></form>`}
      ${(ranges.length > 0 || params.lasso) && html`<ul class="set-filters" aria-label="Filters that are set">${ranges.map(({ field: key, low: from, high: to }) => html`<li key=${key}><button type="button" class="set" title="Remove this filter" onClick=${() => change({ f: formatRanges(ranges.filter((one) => one.field !== key)) })}>${FIELDS[key].name} ${from > -Infinity ? `≥ ${written(key, from)}` : ""}${from > -Infinity && to < Infinity ? ", " : ""}${to < Infinity ? `≤ ${written(key, to)}` : ""} <span aria-hidden="true">×</span></button></li>`)}
        ${params.lasso && html`<li><button type="button" class="set" title="Remove this filter" onClick=${() => change({ lasso: "" })}>inside the lasso <span aria-hidden="true">×</span></button></li>`}</ul>`}
    </div>`;
  }

  const COLUMN_FIELDS = new Set(["id", "label", "share", "density", "max"]);

  // A density as a bar on a logarithmic scale from 1e-6 to 1.
  const densityShare = (density) => (density > 0 ? Math.max(0.02, 1 + Math.log10(density) / 6) : 0);

  let rememberedScroll = { key: "", top: 0 };

  function List({ model, overview, params }) {
    const wide = S.useMedia("(min-width: 760px)");
    const change = (changes) => route.replace(route.format("list", null, { ...params, ...changes }));
    const meaning = useMeaning(model, overview, params);
    const found = model ? model.query(params) : null;
    const rows = found ? found.rows : [];
    const order = model ? model.sortOf(params) : { by: "density", dir: "desc" };
    const key = route.format("list", null, params);
    useLayoutEffect(() => {
      if (model && rememberedScroll.key === key && rememberedScroll.top) window.scrollTo(0, rememberedScroll.top);
      return () => undefined;
    }, [!!model]);
    useEffect(() => {
      const remember = () => { rememberedScroll = { key: location.hash || "#/", top: window.scrollY }; };
      window.addEventListener("scroll", remember, { passive: true });
      return () => window.removeEventListener("scroll", remember);
    }, []);
    const extra = order.by in FIELDS && !COLUMN_FIELDS.has(order.by) ? order.by : null; // shown in the place of "Max"
    const columns = extra ? COLUMNS.map((column) => (column[0] === "max" ? [extra, FIELDS[extra].name, FIELDS[extra].title] : column)) : COLUMNS;
    const sortBy = (by) => {
      const same = order.by === by;
      change({ sort: by, dir: same ? (order.dir === "desc" ? "asc" : "desc") : "" });
    };
    const draw = (place, style) => {
      const row = rows[place], { index } = model, id = index.id[row];
      const places = found.places ? model.placeNames(found.places[row]) : [];
      return html`<div key=${row} class="row" role="row" aria-rowindex=${place + 1} style=${style}>
        <span role="cell" class="c-id">${id}</span>
        <span role="cell" class="c-label"><a class="cover" data-place=${place} href=${route.format("latent", id, route.listParams(params))}><span class="names"><${Label} model=${model} row=${row} /></span></a>${places.length > 0 && html`<span class="where">${places.join(" · ")}</span>`}</span>
        <span role="cell" class="c-promotes"><span class="names">${index.promoted[row].map((id) => html`<${Chip} key=${id} tokens=${model.tokens} id=${id} />`)}</span></span>
        <span role="cell" class="c-share">${index.top_token[row] === null ? "–" : percent(index.top_token_share[row], 2)}</span>
        <span role="cell" class="c-density"><span class="meter" aria-hidden="true"><i style=${{ width: densityShare(index.density[row]) * 100 + "%" }}></i></span><span>${percent(index.density[row])}</span></span>
        <span role="cell" class="c-max">${extra ? html`<span class="extra-name">${FIELDS[extra].name} </span>${model.value(extra, row) === null ? "–" : extra === "cluster" ? S.mapViews.clusterName(overview, model.value(extra, row)) : written(extra, model.value(extra, row))}` : number(index.max_act[row])}</span>
        <span role="cell" class="c-lang">${index.language[row] < 0 ? "–" : index.languages[index.language[row]]}</span>
      </div>`;
    };
    return html`<section class="list" aria-label="Latents">
      <${Toolbar} model=${model} overview=${overview} params=${params} change=${change} found=${model ? rows.length : null} />
      <div class="sorts"><label class="field"><span>sort by</span><select name="sort" onChange=${(e) => change({ sort: e.target.value, dir: "" })}>
        ${params.q && html`<option value="match" selected=${order.by === "match"}>best match</option>`}
        <option value="id" selected=${order.by === "id"}>number</option>${Object.keys(WORDS).map((key) => html`<option key=${key} value=${key} selected=${order.by === key}>${WORDS[key].name}</option>`)}
        ${Object.keys(FIELDS).filter((key) => !model || model.has(key) || key === order.by || (FIELDS[key].detail && !model.details && key !== "score")).map((key) => html`<option key=${key} value=${key} selected=${order.by === key}>${FIELDS[key].name}</option>`)}</select></label>
        <button type="button" class="link" onClick=${() => sortBy(order.by)}>${order.by in WORDS ? (order.dir === "desc" ? "z to a" : "a to z") : order.dir === "desc" ? "high to low" : "low to high"}</button></div>
      <${Virtual} n=${rows.length} height=${wide ? 42 : 66} draw=${draw} label="Latents" columns=${COLUMNS.length}>
        <div class="head" role="rowgroup"><div class="row" role="row">
          ${columns.map(([by, name, title]) => html`<span key=${by} role="columnheader" class=${by === extra ? "c-max" : { id: "c-id", label: "c-label", promotes: "c-promotes", share: "c-share", density: "c-density", max: "c-max", language: "c-lang" }[by]}
            aria-sort=${UNSORTED.has(by) ? null : order.by === by ? (order.dir === "desc" ? "descending" : "ascending") : "none"}>
            ${UNSORTED.has(by) ? html`<span title=${title}>${name}</span>` : html`<button type="button" title=${title} onClick=${() => sortBy(by)}>${name}<span class="dir" aria-hidden="true">${order.by === by ? (order.dir === "desc" ? "↓" : "↑") : ""}</span></button>`}
          </span>`)}
        </div></div>
      <//>
      ${!model && html`<p class="empty" role="status">Reading the latents…</p>`}
      ${meaning && meaning.error && html`<p class="problem" role="alert">${meaning.error}</p>`}
      ${meaning && meaning.waiting && html`<p class="empty" role="status">Looking for labels of like meaning…</p>`}
      ${model && !rows.length && !(meaning && (meaning.error || meaning.waiting)) && html`<p class="empty">No latent matches. ${params.status !== "all" ? "Dead latents are shown under “all”. " : ""}<button type="button" class="link" onClick=${() => change({ ...route.DEFAULTS, status: "all" })}>Show all latents</button></p>`}
    </section>`;
  }

  // The same list beside a latent, on wide screens.
  function Rail({ model, params, latent, rows, place }) {
    const change = (changes) => route.replace(route.format("latent", latent, { ...params, ...changes }));
    const draw = (at, style) => {
      const row = rows[at], id = model.index.id[row];
      return html`<a key=${row} class=${"rail-row" + (at === place ? " current" : "")} aria-current=${at === place ? "true" : null} data-place=${at} href=${route.format("latent", id, route.listParams(params))} style=${style}>
        <span class="c-id">${id}</span><span class="names"><${Label} model=${model} row=${row} /></span></a>`;
    };
    return html`<nav class="rail" aria-label="Latents">
      <${SearchBox} model=${model} params=${params} change=${change} />
      <p class="found" role="status"><b>${count(rows.length)}</b> ${rows.length === 1 ? "latent" : "latents"} <a href=${route.format("list", null, route.listParams(params))}>Filters and sorting</a></p>
      <${Virtual} own n=${rows.length} height=${36} draw=${draw} current=${place} />
    </nav>`;
  }

  S.listViews = { List, Rail };
})((window.Sememe = window.Sememe || {}));
