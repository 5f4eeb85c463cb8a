// What a latent has to do with others, the shape of its direction, and what explanations say of it.
(function (S) {
  "use strict";
  const { h } = preact;
  const html = htm.bind(h);
  const { number, percent, count } = S.charts;
  const { Label } = S.tokenViews;
  const { route } = S;
  const flat = (text) => S.text.flat(text).replace(/·/g, " ");

  // Facts about its direction, for the table of facts: [name, value, note].
  function shape(latent) {
    const facts = [];
    if (latent.n_effective_neurons !== null) facts.push(["effective neurons", number(latent.n_effective_neurons), latent.top_neuron === null ? "" : `${percent(latent.top_neuron_share, 2)} on neuron ${latent.top_neuron}`]);
    if (latent.encoder_decoder_cosine !== null) facts.push(["reads as it writes", number(latent.encoder_decoder_cosine), "cosine of encoder and decoder"]);
    if (latent.max_cos !== null) facts.push(["nearest other", number(latent.max_cos), "cosine, in this dictionary"]);
    if (latent.mcs !== null) facts.push(["mcs", number(latent.mcs), "nearest of other dictionaries"]);
    if (latent.self_similarity !== null) facts.push(["since a checkpoint", html`${number(latent.self_similarity)} <${History} history=${latent.history} />`, "cosine to itself at the last but one; bars: at each that was kept"]);
    if (latent.kurtosis !== null) facts.push(["kurtosis", number(latent.kurtosis), `skew ${number(latent.skew)}; normal: 3 and 0`]);
    if (latent.outlier_share !== null) facts.push(["outlier share", percent(latent.outlier_share, 2), "in outlier dimensions"]);
    return facts;
  }

  // How near its direction was to what it is now at each checkpoint that training kept, the earliest first.
  function History({ history }) {
    const steps = history.step || [];
    if (steps.length < 2) return null;
    const step = 5, tall = (cosine) => Math.max(0.06, Math.min(1, Math.abs(cosine))) * 16;
    return html`<svg class="deciles-line history" width=${steps.length * step} height="18" role="img" aria-label=${`at ${steps.length} kept checkpoints: ${history.cosine.map((cosine) => number(cosine, 2)).join(", ")}`}>
      ${steps.map((at, i) => html`<rect key=${at} class=${history.cosine[i] < 0 ? "under" : ""} x=${i * step} width=${step - 1} y=${17 - tall(history.cosine[i])} height=${tall(history.cosine[i])}><title>${`step ${count(at)}: ${number(history.cosine[i])}`}</title></rect>`)}</svg>`;
  }

  // A score for each tenth of the activations, the lowest first.
  function Deciles({ deciles }) {
    if (!deciles) return null;
    const tall = (value) => (value === null ? 0 : Math.max(0.08, Math.min(1, Math.abs(value))) * 16);
    return html`<svg class="deciles-line" width="62" height="18" role="img" aria-label=${`by tenth of the activations, from the lowest: ${deciles.map((value) => number(value, 2)).join(", ")}`}>
      ${deciles.map((value, i) => value !== null && html`<rect key=${i} class=${value < 0 ? "under" : ""} x=${i * 6} width="4.5" y=${17 - tall(value)} height=${tall(value)}><title>${`tenth ${i + 1}: ${number(value)}`}</title></rect>`)}</svg>`;
  }

  function Explanation({ latent, overview }) {
    const { explained } = latent;
    if (!explained) return null;
    const lift = (row) => overview.scores.find((known) => known.scorer === row.scorer && known.variant === row.variant);
    const words = [
      ["in words", explained.explanation, explained.label_from === "model"], ["its effect", explained.effect, false],
      ["rule", explained.rule_words, explained.label_from === "rule"], ["kind", explained.category, false],
    ].filter(([, text]) => text);
    const nulls = overview.scores.some((row) => Object.keys(row.nulls).length);
    return html`<section class="explanation"><h2>Explanation</h2>
      <dl>${words.map(([name, text, chosen]) => html`<div key=${name}><dt>${name}</dt><dd><span dir="auto">${flat(text)}</span>${chosen ? html` <span class="muted">(its label)</span>` : null}</dd></div>`)}
        ${explained.auroc !== undefined && html`<div><dt>rule's score</dt><dd>${number(explained.score)} <span class="muted">AUROC ${number(explained.auroc)}${explained.correlation === undefined ? "" : `, correlation ${number(explained.correlation)}`}${explained.auroc_shuffled === undefined ? "" : `; of shuffled activations ${number(explained.auroc_shuffled)}, of another's rule ${number(explained.auroc_other)}`}</span></dd></div>`}</dl>
      ${explained.scores.length > 0 && html`<div class="scored scroll" tabindex="0" role="region" aria-label="Scores of this explanation"><table><thead><tr><th scope="col">scorer</th><th scope="col">score</th><th scope="col">by tenth</th><th scope="col">mean of all</th>${nulls && html`<th scope="col">best null</th>`}</tr></thead>
        <tbody>${explained.scores.map((row) => { const all = lift(row); return html`<tr key=${row.scorer + row.variant}><th scope="row">${row.scorer === "lexical" ? "rules" : row.scorer} <span class="muted">${row.variant}</span></th>
          <td>${row.score === null ? html`<span title="Undefined for this latent">–</span>` : number(row.score)}</td><td><${Deciles} deciles=${row.deciles} /></td><td>${all ? number(all.mean) : "–"}</td>
          ${nulls && html`<td>${all && all.best_null ? html`<span title=${S.landing.nullName(all.best_null)}>${number(all.nulls[all.best_null])}</span>` : "–"}</td>`}</tr>`; })}</tbody></table></div>`}
    </section>`;
  }

  function Related({ title, note, rows, params, model, heads }) {
    if (!rows.length) return null;
    return html`<section class="related"><h3>${title}${note && html` <span class="muted">${note}</span>`}</h3>
      <table><caption class="sr">${title}</caption><thead class=${heads.length > 1 ? "" : "sr"}><tr><th scope="col">latent</th>${heads.map((head) => html`<th key=${head} scope="col">${head}</th>`)}</tr></thead>
      <tbody>${rows.map(({ id, values, flag, plain }) => html`<tr key=${id}><td>${plain ? html`<span class="c-id">${id}</span>` : html`<a href=${route.format("latent", id, route.listParams(params))}><span class="c-id">${id}</span> <span class="names">${model.rowOf.has(id) ? html`<${Label} model=${model} row=${model.rowOf.get(id)} />` : null}</span></a>`}${flag && html` <span class="flag" title=${flag[1]}>${flag[0]}</span>`}</td>
        ${values.map((value, i) => html`<td key=${i} class="value">${value}</td>`)}</tr>`)}</tbody></table></section>`;
  }

  const SPLIT_COSINE = 0.4; // nearer than this and never together: perhaps one feature in two latents

  function Relations({ model, latent, overview, params }) {
    const together = new Map((latent.coactive.other || []).map((other, i) => [other, latent.coactive.phi[i]]));
    const flag = (other, cosine) => {
      if (together.has(other)) return ["fires with it", `Correlation of when they are active: ${number(together.get(other))}`];
      if (cosine >= SPLIT_COSINE && together.size) return ["split?", "Near in direction, but not among the latents it fires with: perhaps one feature split over several latents"];
      return null;
    };
    const near = (group) => group.other.map((id, i) => ({ id, values: [number(group.cosine[i])], flag: group.dictionary === null && group.kind === "decoder" ? flag(id, group.cosine[i]) : null, plain: group.dictionary !== null }));
    const own = latent.neighbours.filter(({ dictionary }) => dictionary === null);
    const others = latent.neighbours.filter(({ dictionary }) => dictionary !== null);
    const kind = { decoder: "writes", encoder: "reads" };
    const tokens = latent.top_tokens.token || [];
    const neurons = latent.neurons.neuron || [];
    const active = latent.coactive.other || [];
    if (!own.length && !others.length && !active.length && !neurons.length && !tokens.length) return null;
    return html`<section class="relations"><h2>Related</h2><div class="relation-grid">
      ${own.map((group) => html`<${Related} key=${group.kind} model=${model} params=${params} title=${`Nearest in what it ${kind[group.kind] || group.kind}`} note="cosine" heads=${["cosine"]} rows=${near(group)} />`)}
      <${Related} model=${model} params=${params} title="Active together" note=${overview.coactive_tokens ? `of ${count(overview.coactive_tokens)} tokens` : ""} heads=${["times", "by chance", "correlation"]}
        rows=${active.map((id, i) => ({ id, values: [count(latent.coactive.n_both[i]), number(latent.coactive.expected[i]), number(latent.coactive.phi[i])] }))} />
      ${tokens.length > 0 && html`<section class="related"><h3>Tokens <span class="muted">that hold most of its activation</span></h3><table><caption class="sr">Tokens that hold most of its activation</caption><thead><tr><th scope="col">token</th><th scope="col">share</th><th scope="col">active on</th><th scope="col">mean</th></tr></thead>
        <tbody>${tokens.map((token, i) => html`<tr key=${token}><td><${S.tokenViews.Chip} tokens=${model.tokens} id=${token} /></td><td class="value">${percent(latent.top_tokens.share[i], 2)}</td><td class="value">${count(latent.top_tokens.n_active[i])} of ${count(latent.top_tokens.n_seen[i])}</td><td class="value">${number(latent.top_tokens.mean_act[i])}</td></tr>`)}</tbody></table></section>`}
      ${neurons.length > 0 && html`<${Related} model=${model} params=${params} title="Neurons" note="it writes to most" heads=${["weight", "share"]} rows=${neurons.map((id, i) => ({ id, plain: true, values: [number(latent.neurons.weight[i]), percent(latent.neurons.share[i], 2)] }))} />`}
      ${others.map((group) => html`<${Related} key=${group.kind + group.dictionary} model=${model} params=${params} title=${`In ${flat(group.dictionary)}`} note=${`nearest in what it ${kind[group.kind] || group.kind}`} heads=${["cosine"]} rows=${near(group)} />`)}
    </div>${latent.cluster !== null && latent.cluster >= 0 && html`<p class="in-cluster">In the group <a href=${route.format("list", null, { ...route.DEFAULTS, cluster: String(latent.cluster) })}>${S.mapViews.clusterName(overview, latent.cluster)}</a> of the map.</p>`}
    </section>`;
  }

  S.relationViews = { Explanation, Relations, shape };
})((window.Sememe = window.Sememe || {}));
