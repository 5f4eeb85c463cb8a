// One latent's page: how often and how strongly it fires, what it promotes, and the text it fires on.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useEffect, useState } = preactHooks;
  const html = htm.bind(h);
  const { Histogram, number, percent, count } = S.charts;
  const { Chip, Example, Label } = S.tokenViews;
  const { route } = S;
  const FIRST_SHOWN = 10;

  function rowsOf(columns) {
    return columns.context.map((_, i) => Object.fromEntries(Object.keys(columns).map((name) => [name, columns[name][i]])));
  }

  async function read(id, row) {
    const latent = await S.source.latent(id, row);
    const { contexts, documents } = await S.source.contexts([...new Set(latent.examples.context)]);
    return { latent, contexts, documents, examples: rowsOf(latent.examples) };
  }

  function Logits({ model, title, note, logits, negative }) {
    const largest = Math.max(...logits.values.map(Math.abs), 1e-9);
    return html`<section class=${"logits" + (negative ? " negative" : "")}>
      <h2>${title} <span class="muted">${note}</span></h2>
      ${logits.tokens.length === 0 ? html`<p class="empty">Not in this atlas.</p>` : html`<ol>${logits.tokens.map((token, i) => html`<li key=${token}>
        <a href=${route.format("list", null, { q: model.tokens.text(token).length > 60 ? "" : model.tokens.text(token), status: "all" })} title="Latents with this token"><${Chip} tokens=${model.tokens} id=${token} /></a>
        <span class="bar" aria-hidden="true"><i style=${{ width: (Math.abs(logits.values[i]) / largest) * 100 + "%" }}></i></span>
        <span class="value">${number(logits.values[i])}</span></li>`)}</ol>`}
    </section>`;
  }

  function ActivationHistogram({ latent, edges }) {
    const roomy = S.useMedia("(min-width: 900px)");
    if (!latent.n_active || !edges.length) return html`<p class="empty">It was never active on this text.</p>`;
    const bounds = [0, ...edges.map((edge) => edge * latent.max_act)];
    const nonzero = latent.histogram.filter((n) => n > 0);
    const logY = Math.max(...nonzero) > 30 * Math.min(...nonzero);
    return html`<${Histogram} counts=${latent.histogram} edges=${bounds} label="Histogram of its activations" logY=${logY}
      height=${roomy ? 300 : 168} xLabel="activation" yLabel=${logY ? "tokens (log scale)" : "tokens"} formatX=${(value) => number(value)} shade=${(i) => (0.1 + 0.9 * edges[i]).toFixed(3)}
      describe=${(i) => `${count(latent.histogram[i])} tokens between ${number(bounds[i])} and ${number(bounds[i + 1])}`} />`;
  }

  function Examples({ title, note, id, examples, shared, limit, level = "h2" }) {
    const { model, latent, contexts, documents, open, toggle } = shared;
    const [all, setAll] = useState(false);
    if (!examples.length) return null;
    const shown = all || !limit ? examples : examples.slice(0, limit);
    return html`<section class="examples" id=${id}>
      <${level}>${title} <span class="muted">${note}</span><//>
      <ol>${shown.map((example) => html`<${Example} key=${example.key} model=${model} latent=${latent} example=${example} context=${contexts.get(example.context)} documents=${documents}
        open=${open.has(example.key)} onToggle=${() => toggle(example.key)} name=${`${title.toLowerCase()}, example ${example.rank + 1}`} />`)}</ol>
      ${shown.length < examples.length && html`<button type="button" class="link more" onClick=${() => setAll(true)}>Show ${examples.length - shown.length} more</button>`}
    </section>`;
  }

  function Deciles({ examples, shared }) {
    const groups = [];
    for (const example of examples) {
      const last = groups[groups.length - 1];
      if (last && last.decile === example.decile) last.examples.push(example);
      else groups.push({ decile: example.decile, examples: [example] });
    }
    if (!groups.length) return null;
    const ordinal = ["lowest", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th", "highest"];
    return html`<section class="deciles"><h2>Across its range <span class="muted">examples from each tenth of its activations</span></h2>
      ${groups.map(({ decile, examples: of }) => html`<${Examples} level="h3" key=${decile} id=${"decile-" + decile} title=${`${ordinal[decile]} tenth`} note="" examples=${of} shared=${shared} />`)}
    </section>`;
  }

  function Stats({ model, latent }) {
    const facts = [
      ["density", percent(latent.density), latent.density > 0 ? `1 in ${count(Math.max(1, Math.round(1 / latent.density)))} tokens` : "never active"],
      ["active on", count(latent.n_active), latent.n_active === 1 ? "token" : "tokens"],
      ["largest", number(latent.max_act), `mean ${number(latent.mean_act)}`],
      ["top token", latent.top_token === null ? "–" : html`<${Chip} tokens=${model.tokens} id=${latent.top_token} />`, latent.top_token === null ? "" : `${percent(latent.top_token_share, 2)} of its activation`],
      ["peak tokens", latent.n_distinct_tokens === null ? "–" : count(latent.n_distinct_tokens), "distinct, in examples"],
      ["language", latent.language || "–", latent.language ? `${percent(latent.language_share, 2)} of examples` : ""],
      ["decoder norm", number(latent.decoder_norm), ""],
    ];
    return html`<dl class="facts">${facts.map(([name, value, note]) => html`<div key=${name}><dt>${name}</dt><dd>${value}<small>${note}</small></dd></div>`)}</dl>`;
  }

  function Latent({ model, overview, id, params }) {
    const roomy = S.useMedia("(min-width: 1180px)");
    const row = model.rowOf.get(id);
    const { rows } = model.query(params);
    let place = row === undefined ? -1 : rows.indexOf(row);
    const [state, setState] = useState({ found: null, error: null });
    useEffect(() => {
      let stale = false;
      if (row === undefined) { setState({ found: null, error: null }); return undefined; }
      read(id, row).then((found) => {
        if (stale) return;
        found.examples.forEach((example, i) => { example.key = String(i); });
        setState({ found, error: null });
      }, (error) => { if (!stale) setState({ found: null, error }); });
      return () => { stale = true; };
    }, [id, row]);

    const order = place >= 0 ? rows : model.index.id.map((_, i) => i); // a latent outside the filter steps by number
    if (place < 0) place = row === undefined ? -1 : row;
    const neighbour = (step) => { const at = order[place + step]; return at === undefined ? null : model.index.id[at]; };
    const before = neighbour(-1), after = neighbour(1);
    const address = (to) => route.format("latent", to, route.listParams(params));
    const listAddress = route.format("list", null, route.listParams(params));
    useEffect(() => {
      const keys = (event) => {
        if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
        if ((event.key === "ArrowRight" || event.key === "j") && after !== null) { event.preventDefault(); route.go(address(after)); }
        else if ((event.key === "ArrowLeft" || event.key === "k") && before !== null) { event.preventDefault(); route.go(address(before)); }
        else if (event.key === "Escape") route.go(listAddress);
      };
      window.addEventListener("keydown", keys);
      return () => window.removeEventListener("keydown", keys);
    }, [before, after, listAddress]);
    const { found, error } = state;
    const current = found && found.latent.id === id;
    useEffect(() => {
      // The next latent is read while this one is looked at.
      if (!current || after === null) return undefined;
      const timer = setTimeout(() => read(after, model.rowOf.get(after)).catch(() => undefined), 150);
      return () => clearTimeout(timer);
    }, [current, after]);
    useEffect(() => { window.scrollTo(0, 0); }, [id]);

    const open = new Set(params.open ? params.open.split(",") : []);
    const toggle = (key) => {
      if (!open.delete(key)) open.add(key);
      route.replace(route.format("latent", id, { ...params, open: [...open].join(",") }));
    };
    const rail = roomy && html`<${S.listViews.Rail} model=${model} params=${params} latent=${id} rows=${rows} place=${rows.indexOf(row)} />`;
    const shared = found && { model, latent: found.latent, contexts: found.contexts, documents: found.documents, open, toggle };
    const of = (kind) => found.examples.filter((example) => example.kind === kind);
    const step = (to, text, label, key) => to === null ? html`<span class="step off" aria-hidden="true">${text}</span>` : html`<a class="step" href=${address(to)} aria-label=${label} title=${`${label} (${key})`}>${text}</a>`;
    return html`<div class=${"latent-layout" + (roomy ? " with-rail" : "")}>
      ${rail}
      <article class=${"latent" + (found && !current ? " stale" : "")} aria-busy=${!current && !error}>
        <header class="latent-head">
          <div class="crumb"><a href=${listAddress}>← All latents</a><span class="muted">${place >= 0 ? `${count(place + 1)} of ${count(order.length)}` : ""}</span>
            <span class="steps">${step(before, "←", "Previous latent", "left arrow")}${step(after, "→", "Next latent", "right arrow")}</span></div>
          <h1><span class="number">Latent ${id}</span> ${row !== undefined && html`<span class="names"><${Label} model=${model} row=${row} /></span>`}</h1>
        </header>
        ${row !== undefined && html`<${S.Notes} key=${"notes" + id} latent=${id} />`}
        ${row === undefined && html`<p class="problem" role="alert">This dictionary has no latent ${id}. Its latents are numbered ${model.index.id[0]} to ${model.index.id[model.n - 1]}.</p>`}
        ${error && html`<p class="problem" role="alert">${error.message}</p>`}
        ${found && row !== undefined && html`
          <${Stats} model=${model} latent=${found.latent} />
          <div class="charts">
            <section><h2>Activations <span class="muted">where it is active</span></h2><${ActivationHistogram} latent=${found.latent} edges=${overview.histogram_edges} /></section>
            <${Logits} model=${model} title="Promotes" note="next tokens it makes likelier" logits=${found.latent.promoted} />
            <${Logits} model=${model} title="Demotes" note="and less likely" logits=${found.latent.demoted} negative />
          </div>
          <div class="legend" aria-hidden="true"><span>0</span><i></i><span>${number(found.latent.max_act)}</span></div>
          <${Examples} id="top" key=${"top" + found.latent.id} title="Top activations" note="one per document" examples=${of("top")} shared=${shared} limit=${FIRST_SHOWN} />
          <${Deciles} key=${"deciles" + found.latent.id} examples=${of("decile")} shared=${shared} />
          <${Examples} id="random" key=${"random" + found.latent.id} title="Random text" note="it is silent here" examples=${of("random")} shared=${shared} />
          ${!found.examples.length && html`<p class="empty">There are no examples: it was never active on this text.</p>`}`}
      </article>
    </div>`;
  }

  S.latentViews = { Latent };
})((window.Sememe = window.Sememe || {}));
