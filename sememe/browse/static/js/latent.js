// One latent's page: how often and how strongly it fires, what it promotes, and the text it fires on.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useEffect, useMemo, useState } = preactHooks;
  const html = htm.bind(h);
  const { Histogram, Strip, number, percent, count } = S.charts;
  const { Chip, Example, Label } = S.tokenViews;
  const { route } = S;
  const FIRST_SHOWN = 10;
  const DRAWN_AT_ONCE = 15; // examples below the strongest

  // Calls when the browser has nothing else to do, at the latest soon; returns how to call it off.
  function whenIdle(call) {
    if (!window.requestIdleCallback) { const timer = setTimeout(call, 30); return () => clearTimeout(timer); }
    const handle = requestIdleCallback(call, { timeout: 300 });
    return () => cancelIdleCallback(handle);
  }

  function rowsOf(columns) {
    return columns.context.map((_, i) => Object.fromEntries(Object.keys(columns).map((name) => [name, columns[name][i]])));
  }

  async function read(id, row) {
    const latent = await S.source.latent(id, row);
    const { contexts, documents } = await S.source.contexts([...new Set(latent.examples.context)]);
    const examples = rowsOf(latent.examples);
    const changes = examples.map(({ effect }) => Math.abs((effect && effect.loss_change) || 0));
    return { latent, contexts, documents, examples, largestLoss: Math.max(0, ...changes), removed: examples.some(({ removals }) => removals),
      drops: examples.some(({ effect }) => effect && typeof effect.logit_change === "number") };
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

  const N_HUES = 5;

  // Which tokens the recorded activations of each bar lie on, among the latent's heaviest; the rest is "other".
  function tokensByBar(latent, examples, contexts, edges) {
    const heavy = (latent.top_tokens.token || []).slice(0, N_HUES);
    const counts = edges.map(() => new Array(N_HUES + 1).fill(0));
    const seen = new Set();
    for (const example of examples) {
      const context = contexts.get(example.context);
      if (!context) continue;
      example.positions.forEach((position, i) => {
        const place = example.context + ":" + position, share = Math.abs(example.acts[i]) / latent.max_act;
        if (seen.has(place)) return;
        seen.add(place);
        const bar = edges.findIndex((edge) => share <= edge + 1e-9), hue = heavy.indexOf(context.tokens[position]);
        if (bar >= 0) counts[bar][hue < 0 ? N_HUES : hue] += 1;
      });
    }
    return { heavy, counts, n: seen.size };
  }

  function ActivationHistogram({ model, found, edges }) {
    const { latent, examples, contexts } = found;
    const stacked = useMemo(() => (latent.n_active && edges.length ? tokensByBar(latent, examples, contexts, edges) : null), [found]);
    if (!latent.n_active || !edges.length) return html`<p class="empty">It was never active on this text.</p>`;
    const bounds = [0, ...edges.map((edge) => edge * latent.max_act)];
    const nonzero = latent.histogram.filter((n) => n > 0);
    const logY = Math.max(...nonzero) > 30 * Math.min(...nonzero);
    const { heavy, counts, n } = stacked;
    const split = (i) => { const total = counts[i].reduce((sum, value) => sum + value, 0); return total ? counts[i].map((value, hue) => ({ share: value / total, hue: hue < N_HUES ? "hue" + hue : "other" })).filter(({ share }) => share > 0) : []; };
    return html`<${Histogram} counts=${latent.histogram} edges=${bounds} label="Histogram of its activations" logY=${logY} parts=${heavy.length ? split : null}
      height=${220} xLabel="activation" yLabel=${logY ? "tokens (log scale)" : "tokens"} formatX=${(value) => number(value)} shade=${() => 0.25}
      describe=${(i) => `${count(latent.histogram[i])} tokens between ${number(bounds[i])} and ${number(bounds[i + 1])}`} />
      ${heavy.length > 0 && html`<p class="hues"><span class="muted">split by token, as in ${count(n)} recorded activations:</span> ${heavy.map((token, i) => html`<span key=${token} class="hue-name"><i class=${"hue" + i}></i><${Chip} tokens=${model.tokens} id=${token} /></span>`)} <span class="hue-name"><i class="other"></i>other</span></p>`}`;
  }

  // How something changes when the latent is taken out, over the examples where that was tried.
  function ChangeHistogram({ examples, of, title, unit, label, xLabel }) {
    const values = examples.map(({ effect }) => effect && of(effect)).filter((value) => value !== null && value !== undefined);
    if (!values.length) return null;
    const low = Math.min(0, ...values), high = Math.max(0, ...values), n = 14, size = (high - low) / n || 1;
    const edges = Array.from({ length: n + 1 }, (_, i) => low + i * size), counts = new Array(n).fill(0);
    for (const value of values) counts[Math.min(n - 1, Math.floor((value - low) / size))] += 1;
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    return html`<section><h2>${title} <span class="muted">${count(values.length)} examples, mean ${mean > 0 ? "+" : ""}${number(Math.abs(mean) < 1e-9 ? 0 : mean)}${unit}</span></h2>
      <${Histogram} counts=${counts} edges=${edges} label=${label} height=${220} xLabel=${xLabel} yLabel="examples"
        formatX=${(value) => number(value, 2)} shade=${() => 0.6} describe=${(i) => `${count(counts[i])} examples between ${number(edges[i])} and ${number(edges[i + 1])}${unit}`} /></section>`;
  }

  const LOGIT_DROP = { title: "Logit drop", unit: "", of: (effect) => (effect.logit_change === null || effect.logit_change === undefined ? null : -effect.logit_change),
    label: "Histogram of the drop of the true next token's logit when the latent is taken out", xLabel: "true token's logit, without it lower by" };
  const LOSS = { title: "Loss rise", unit: " nats", of: (effect) => effect.loss_change,
    label: "Histogram of the change of loss when the latent is taken out", xLabel: "loss (nats), without it higher by" };

  // How many output tokens it moves by how much.
  function OverTheVocabulary({ latent, edges }) {
    const { lens = [], counts = [] } = latent.logit_histograms, here = counts[lens.indexOf("logit")];
    if (!here || !edges.length || !latent.logit_std) return null;
    const places = edges.map((edge) => (latent.logit_mean || 0) + edge * latent.logit_std), last = here.length - 1;
    return html`<${Histogram} counts=${here} edges=${places} label="Histogram of its direct effect over the vocabulary" logY height=${150} xLabel="direct effect on a token's logit" yLabel="tokens (log scale)"
      formatX=${(value) => number(value, 2)} shade=${() => 0.6} describe=${(i) => `${count(here[i])} tokens ${i === 0 ? `below ${number(places[1])}` : i === last ? `above ${number(places[last])}` : `between ${number(places[i])} and ${number(places[i + 1])}`}`} />`;
  }

  function DirectEffect({ model, latent, edges }) {
    const marks = [latent.promoted, latent.demoted].flatMap(({ tokens, values }) => tokens.map((token, i) => ({ value: values[i], name: model.tokens.flat(token) })));
    if (!marks.length || latent.logit_std === null) return null;
    return html`<section class="direct"><h2>Direct effect <span class="muted">on all output tokens: mean ± 1 and 2 standard deviations, and the tokens beside</span></h2>
      <${OverTheVocabulary} latent=${latent} edges=${edges} />
      <${Strip} mean=${latent.logit_mean || 0} std=${latent.logit_std} marks=${marks} label=${`Direct effect: mean ${number(latent.logit_mean)}, standard deviation ${number(latent.logit_std)}; strongest ${number(latent.promoted.values[0])}, weakest ${number(latent.demoted.values[0])}`} xLabel="logit" /></section>`;
  }

  function ByPosition({ latent, edges }) {
    if (!latent.n_active || !latent.position_density || !edges.length) return null;
    const density = latent.position_density, scale = Math.max(...density, 1e-12);
    return html`<section class="by-position"><h2>By position <span class="muted">share of tokens on which it is active</span></h2>
      <${Histogram} counts=${density.map((value) => (value / scale) * 100)} edges=${[0, ...edges]} label="Density by position in the row" height=${120} xLabel="position in the row" yLabel="% of most" formatX=${(value) => number(value)}
        shade=${() => 0.6} describe=${(i) => `${percent(density[i])} of tokens up to position ${edges[i]}`} /></section>`;
  }

  function Examples({ title, note, id, examples, shared, limit, level = "h2" }) {
    const { model, latent, contexts, documents, open, toggle, edges, largestLoss, underlined } = shared;
    if (!examples.length) return null;
    const shown = open.has(id) || !limit ? examples : examples.slice(0, limit);
    return html`<section class="examples" id=${id}>
      <${level}>${title} <span class="muted">${note}</span><//>
      <ol>${shown.map((example) => html`<${Example} key=${example.key} model=${model} latent=${latent} example=${example} context=${contexts.get(example.context)} documents=${documents}
        edges=${edges} largestLoss=${largestLoss} underlined=${underlined} open=${open.has(example.key)} onToggle=${() => toggle(example.key)} name=${`${title.toLowerCase()}, example ${example.rank + 1}`} />`)}</ol>
      ${shown.length < examples.length && html`<button type="button" class="link more" onClick=${() => toggle(id)}>Show ${examples.length - shown.length} more</button>`}
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
      ["decoder norm", number(latent.decoder_norm), latent.bias === null ? "" : `encoder bias ${number(latent.bias)}`],
      ...S.relationViews.shape(latent),
    ];
    return html`<dl class="facts">${facts.map(([name, value, note]) => html`<div key=${name}><dt>${name}</dt><dd>${value}<small>${note}</small></dd></div>`)}</dl>`;
  }

  // A latent that has been read, with so many of the examples below the strongest.
  function Content({ model, overview, found, below, params }) {
    const { latent, largestLoss } = found, { id } = latent;
    const underlined = params.mark !== "plain";
    const change = (changes) => {
      const now = route.current(); // not as it was when this was drawn: a search beside it may have changed since
      route.replace(route.format("latent", now.latent, { ...now.params, ...changes }));
    };
    const opened = (text) => new Set(text ? text.split(",") : []), open = opened(params.open);
    const toggle = (key) => {
      const now = opened(route.current().params.open);
      if (!now.delete(key)) now.add(key);
      change({ open: [...now].join(",") });
    };
    const shared = { edges: overview.histogram_edges, largestLoss, underlined, model, latent, contexts: found.contexts, documents: found.documents, open, toggle };
    const of = (kind) => found.examples.filter((example) => example.kind === kind), deciles = of("decile");
    return html`
      <${Stats} model=${model} latent=${latent} />
      <${S.relationViews.Explanation} latent=${latent} overview=${overview} />
      <div class=${"charts" + (largestLoss > 0 ? (found.drops ? "" : " two") : " one")}>
        <section><h2>Activations <span class="muted">where it is active</span></h2><${ActivationHistogram} key=${id} model=${model} found=${found} edges=${overview.histogram_edges} /></section>
        ${largestLoss > 0 && found.drops && html`<${ChangeHistogram} examples=${found.examples} ...${LOGIT_DROP} />`}
        ${largestLoss > 0 && html`<${ChangeHistogram} examples=${found.examples} ...${LOSS} />`}
      </div>
      <div class="charts">
        <${Logits} model=${model} title="Promotes" note="next tokens it makes likelier" logits=${latent.promoted} />
        <${Logits} model=${model} title="Demotes" note="and less likely" logits=${latent.demoted} negative />
        <div><${DirectEffect} model=${model} latent=${latent} edges=${overview.logit_edges} /><${ByPosition} latent=${latent} edges=${overview.position_edges} /></div>
      </div>
      ${Object.entries(latent.lenses).map(([lens, ends]) => html`<div class="charts" key=${lens}>
        <${Logits} model=${model} title="Promotes" note=${`through the ${S.text.flat(lens)} lens`} logits=${ends.promoted} /><${Logits} model=${model} title="Demotes" note=${`through the ${S.text.flat(lens)} lens`} logits=${ends.demoted} negative /></div>`)}
      <div class="legend"><span>0</span><i aria-hidden="true"></i><span>${number(latent.max_act)}</span>
        ${(largestLoss > 0 || found.removed) && html`<label class="underline"><input type="checkbox" checked=${underlined} onChange=${(e) => change({ mark: e.target.checked ? "" : "plain" })} /> underline effects</label>`}</div>
      ${underlined && (largestLoss > 0 || found.removed) && html`<p class="keys-of">${largestLoss > 0 && html`<span><u class="helps">peak</u> its loss rises without the latent, <u class="hurts">peak</u> it falls</span>`}${found.removed && html`<span><u class="needed">before</u> the peak weakens without this token, <u class="against">before</u> it grows</span>`}</p>`}
      <${Examples} id="top" key=${"top" + id} title="Top activations" note="one per document" examples=${of("top")} shared=${shared} limit=${FIRST_SHOWN} />
      ${below > 0 && html`<${S.relationViews.Relations} key=${"relations" + id} model=${model} latent=${latent} overview=${overview} params=${params} />
      <${Deciles} key=${"deciles" + id} examples=${deciles.slice(0, below)} shared=${shared} />
      <${Examples} id="random" key=${"random" + id} title="Random text" note="it is silent here" examples=${of("random").slice(0, Math.max(0, below - deciles.length))} shared=${shared} />`}
      ${!found.examples.length && html`<p class="empty">There are no examples: it was never active on this text.</p>`}`;
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
    // The strongest examples first; what lies below them is drawn piece by piece while nothing else is to be done, and
    // not at all for who has stepped on. Where there are few, what follows would jump into sight: it comes at once.
    const [drawn, setDrawn] = useState({ found: null, below: 0 });
    const few = found && found.examples.length <= FIRST_SHOWN;
    const below = few ? Infinity : drawn.found === found ? drawn.below : 0;
    const whole = found && below > found.examples.length;
    useEffect(() => {
      if (!current || whole) return undefined;
      return whenIdle(() => setDrawn({ found, below: below + DRAWN_AT_ONCE > found.examples.length ? Infinity : below + DRAWN_AT_ONCE }));
    }, [found, below, current]);
    useEffect(() => {
      // The next latent is read while this one is looked at.
      if (!current || after === null) return undefined;
      const timer = setTimeout(() => read(after, model.rowOf.get(after)).catch(() => undefined), 150);
      return () => clearTimeout(timer);
    }, [current, after]);
    useEffect(() => { window.scrollTo(0, 0); }, [id]);

    const here = route.format("latent", id, params);
    const rail = useMemo(() => roomy && html`<${S.listViews.Rail} model=${model} params=${params} latent=${id} rows=${rows} place=${rows.indexOf(row)} />`,
      [roomy, model, model.byHand, rows, here]);
    // Drawn again only for what it shows: thousands of tokens are not compared for each letter typed beside them.
    const content = useMemo(() => found && html`<${Content} model=${model} overview=${overview} found=${found} below=${below} params=${params} />`,
      [model, model.byHand, overview, found, below, route.format("latent", 0, params)]);
    const step = (to, text, label, key) => to === null ? html`<span class="step off" aria-hidden="true">${text}</span>` : html`<a class="step" href=${address(to)} aria-label=${label} title=${`${label} (${key})`}>${text}</a>`;
    return html`<div class=${"latent-layout" + (roomy ? " with-rail" : "")}>
      ${rail}
      <article class=${"latent" + (found && !current ? " stale" : "")} aria-busy=${!error && row !== undefined && !(current && whole)}>
        <header class="latent-head">
          <div class="crumb"><a href=${listAddress}>← All latents</a><span class="muted">${place >= 0 ? `${count(place + 1)} of ${count(order.length)}` : ""}</span>
            <span class="steps">${step(before, "←", "Previous latent", "left arrow")}${step(after, "→", "Next latent", "right arrow")}</span></div>
          <h1><span class="number">Latent ${id}</span> ${row !== undefined && html`<span class="names"><${Label} model=${model} row=${row} /></span>`}</h1>
        </header>
        ${row !== undefined && html`<${S.Notes} key=${"notes" + id} latent=${id} />`}
        ${row === undefined && html`<p class="problem" role="alert">This dictionary has no latent ${id}. Its latents are numbered ${model.index.id[0]} to ${model.index.id[model.n - 1]}.</p>`}
        ${error && html`<p class="problem" role="alert">${error.message}</p>`}
        ${row !== undefined && content}
      </article>
    </div>`;
  }

  S.latentViews = { Latent };
})((window.Sememe = window.Sememe || {}));
