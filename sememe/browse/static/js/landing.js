// The landing page above the list: vital signs, report, density, frontier, explanations beside nulls, map, texts.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useEffect } = preactHooks;
  const html = htm.bind(h);
  const { Histogram, Scatter, number, percent, count, compact } = S.charts;
  const { route } = S;

  // What each known figure of a report is called, and how it is written; others go by their own name.
  const FIGURES = {
    fvu: ["variance unexplained", percent], fvu_all_rows: ["the same, all positions", percent],
    l0: ["active per token", number], frac_alive: ["alive", percent],
    ce_recovered_zero: ["loss recovered", percent], ce_recovered_mean: ["the same, from the mean", percent],
    ce_increase: ["loss increase (nats)", number], kl: ["KL divergence (nats)", number],
  };
  const NULLS = { pca: "PCA", untrained: "untrained", random_directions: "random directions", identity: "identity", ica: "ICA" };

  const nullName = (name) => NULLS[name] || S.text.flat(name).replace(/[·_]/g, " ");

  function Report({ report }) {
    const arms = [["dictionary", report.metrics], ...Object.entries(report.nulls).map(([name, figures]) => [nullName(name), figures])];
    const names = Object.keys(FIGURES).filter((name) => name in report.metrics);
    const cell = (name, entry) => {
      if (!entry) return "–";
      const write = FIGURES[name][1];
      const interval = entry.low === null || entry.high === null ? null : `95% interval ${write(entry.low)} to ${write(entry.high)}`;
      return html`<span title=${interval}>${write(entry.value)}</span>`;
    };
    return html`<div class="report"><h2>Report <span class="muted">on held-out text${arms.length > 1 ? ", beside nulls" : ""}</span></h2>
      <div class="scroll" tabindex="0" role="region" aria-label="Report"><table><thead><tr><th scope="col">figure</th>${arms.map(([arm]) => html`<th key=${arm} scope="col">${arm}</th>`)}</tr></thead>
      <tbody>${names.map((name) => html`<tr key=${name}><th scope="row" title=${name}>${FIGURES[name][0]}</th>${arms.map(([arm, figures]) => html`<td key=${arm}>${cell(name, figures[name])}</td>`)}</tr>`)}</tbody></table></div></div>`;
  }

  // The dictionaries of a sweep by sparsity and error, this one among them.
  function Frontier({ points }) {
    const placed = points.filter((point) => point.l0 > 0 && point.fvu !== null);
    if (placed.length < 2) return null;
    const rows = placed.slice().sort((a, b) => a.l0 - b.l0);
    return html`<div class="frontier"><h2>Frontier <span class="muted">the dictionaries of its sweep; this one is filled</span></h2>
      <${Scatter} points=${rows.map(({ name, own, l0, fvu }) => ({ x: l0, y: fvu, own, name: S.text.flat(name).replace(/·/g, " ") }))} height=${190} label="Variance unexplained against active latents per token"
        xLabel="active latents per token (log scale)" yLabel="variance unexplained" formatX=${(value) => number(value, 2)} formatY=${(value) => percent(value, 2)} /></div>`;
  }

  // How well explanations hold, beside those of nulls: without them a score says little.
  function Scores({ scores }) {
    if (!scores.length) return null;
    const nulls = [...new Set(scores.flatMap((row) => Object.keys(row.nulls)))];
    const interval = (entry) => (entry.low === null || entry.high === null ? null : `95% interval ${number(entry.low)} to ${number(entry.high)}`);
    return html`<div class="scored scores"><h2>Explanations <span class="muted">mean scores${nulls.length ? ", beside nulls" : ""}; 0 is guessing</span></h2>
      <div class="scroll" tabindex="0" role="region" aria-label="Scores of explanations"><table><thead><tr><th scope="col">scorer</th><th scope="col">dictionary</th>${nulls.map((name) => html`<th key=${name} scope="col">${nullName(name)}</th>`)}${nulls.length > 0 && html`<th scope="col">lift</th>`}</tr></thead>
      <tbody>${scores.map((row) => html`<tr key=${row.scorer + "/" + row.variant}><th scope="row">${row.scorer === "lexical" ? "rules" : row.scorer} <span class="muted">${row.variant}</span></th>
        <td><span title=${interval(row)}>${number(row.mean)}</span></td>${nulls.map((name) => html`<td key=${name}>${number(row.nulls[name])}</td>`)}
        ${nulls.length > 0 && html`<td>${row.lift ? html`<span title=${interval(row.lift)}>${number(row.lift.value)}</span>` : "–"}</td>`}</tr>`)}</tbody></table></div></div>`;
  }

  function Overview({ overview, model, params }) {
    const { latents, text, density, report } = overview;
    const vitals = [
      ["latents", count(latents.n), `${count(latents.dead)} dead on this text`],
      ["active per token", number(latents.l0), "on average"],
    ];
    if (text.n_tokens) vitals.push(["text", compact(text.n_tokens), "tokens" + (text.n_documents ? ` of ${compact(text.n_documents)} documents` : "")]);
    for (const name of ["fvu", "ce_recovered_zero"])
      if (report && report.metrics[name]) vitals.push([FIGURES[name][0], FIGURES[name][1](report.metrics[name].value), "on held-out text"]);
    if (overview.explained) vitals.push(["explained", count(overview.explained), "latents"]);
    const pick = (i, event) => {
      const low = 10 ** density.log10_edges[i], high = 10 ** density.log10_edges[i + 1];
      const round = (value) => String(Number(value.toPrecision(4)));
      const extend = event.shiftKey && params.min !== "" && params.max !== "";
      const min = extend ? Math.min(Number(params.min), low) : low, max = extend ? Math.max(Number(params.max), high) : high;
      const same = params.min === round(min) && params.max === round(max);
      route.replace(route.format("list", null, { ...params, min: same ? "" : round(min), max: same ? "" : round(max) }));
    };
    const low = params.min === "" ? -Infinity : Math.log10(Number(params.min) || 1e-99), high = params.max === "" ? Infinity : Math.log10(Number(params.max));
    const edges = density.log10_edges;
    const every = edges.length > 26 ? 2 : 1;
    const ticks = edges.filter((edge) => Number.isInteger(edge) && (edge % every === 0));
    const power = (value) => { const share = 10 ** value * 100; return share >= 1e-3 ? number(share, 1) + "%" : "10" + String(value).replace("-", "⁻").replace(/\d/g, (d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]); };
    const table = report && Object.keys(report.metrics).some((name) => name in FIGURES);
    useEffect(() => {
      // The list first: the map's figures are asked for when the page has been drawn.
      if (!model || !overview.placed || model.details) return undefined;
      const timer = setTimeout(() => S.needDetails(model), 50);
      return () => clearTimeout(timer);
    }, [model]);
    const change = (changes) => route.replace(route.format("list", null, { ...params, ...changes }));
    const rows = model ? model.query(params).rows : [];
    return html`<section class=${"overview" + (overview.placed ? " with-map" : "")} aria-label="Overview">
      <dl class="facts">${vitals.map(([name, value, note]) => html`<div key=${name + note}><dt>${name}</dt><dd>${value}<small>${note}</small></dd></div>`)}</dl>
      <div class="signs">
        ${table && html`<${Report} report=${report} />`}
        ${edges.length > 1 && html`<div class="density"><h2>Density of the latents <span class="muted">click a bar to filter</span></h2>
          <${Histogram} counts=${density.counts} edges=${edges} xTicks=${ticks} height=${overview.placed || !table ? 190 : 236} label="Histogram of the latents' densities"
            xLabel="share of tokens on which a latent is active" yLabel="latents" formatX=${power} onPick=${pick}
            picked=${params.min === "" && params.max === "" ? null : (i) => edges[i] >= low - 0.01 && edges[i + 1] <= high + 0.01}
            describe=${(i) => `${count(density.counts[i])} latents active on ${percent(10 ** edges[i], 2)} to ${percent(10 ** edges[i + 1], 2)} of tokens`} /></div>`}
        <${Frontier} points=${overview.frontier} />
        <${Scores} scores=${overview.scores} />
      </div>
      ${overview.placed > 0 && html`<${S.mapViews.LatentMap} model=${model} overview=${overview} params=${params} rows=${rows} change=${change} />`}
      <${S.exampleTexts.TextList} overview=${overview} params=${params} />
    </section>`;
  }

  S.landing = { Overview, nullName };
})((window.Sememe = window.Sememe || {}));
