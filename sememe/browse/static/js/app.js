// The frame: header, overview, about, and which page the address asks for.
(function (S) {
  "use strict";
  const { h, render } = preact;
  const { useEffect, useState } = preactHooks;
  const html = htm.bind(h);
  const { Histogram, number, percent, count, compact } = S.charts;
  const { route } = S;

  S.useMedia = (query) => {
    const [matches, setMatches] = useState(() => matchMedia(query).matches);
    useEffect(() => {
      const media = matchMedia(query), changed = () => setMatches(media.matches);
      media.addEventListener("change", changed);
      return () => media.removeEventListener("change", changed);
    }, [query]);
    return matches;
  };

  // What each known figure of a report is called, and how it is written; others go by their own name.
  const FIGURES = {
    fvu: ["variance unexplained", percent], fvu_all_rows: ["the same, all positions", percent],
    l0: ["active per token", number], frac_alive: ["alive", percent],
    ce_recovered_zero: ["loss recovered", percent], ce_recovered_mean: ["the same, from the mean", percent],
    ce_increase: ["loss increase (nats)", number], kl: ["KL divergence (nats)", number],
  };
  const NULLS = { pca: "PCA", untrained: "untrained", random_directions: "random directions", identity: "identity", ica: "ICA" };

  function Report({ report }) {
    const arms = [["dictionary", report.metrics], ...Object.entries(report.nulls).map(([name, figures]) => [NULLS[name] || name, figures])];
    const names = Object.keys(FIGURES).filter((name) => name in report.metrics);
    const cell = (name, entry) => {
      if (!entry) return "–";
      const write = FIGURES[name][1];
      const interval = entry.low === null || entry.high === null ? null : `95% interval ${write(entry.low)} to ${write(entry.high)}`;
      return html`<span title=${interval}>${write(entry.value)}</span>`;
    };
    return html`<div class="report"><h2>Report <span class="muted">on held-out text${arms.length > 1 ? ", beside nulls" : ""}</span></h2>
      <div class="scroll"><table><thead><tr><td></td>${arms.map(([arm]) => html`<th key=${arm} scope="col">${arm}</th>`)}</tr></thead>
      <tbody>${names.map((name) => html`<tr key=${name}><th scope="row" title=${name}>${FIGURES[name][0]}</th>${arms.map(([arm, figures]) => html`<td key=${arm}>${cell(name, figures[name])}</td>`)}</tr>`)}</tbody></table></div></div>`;
  }

  function Overview({ overview, params }) {
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
    return html`<section class=${"overview" + (table ? " with-report" : "")} aria-label="Overview">
      <dl class="facts">${vitals.map(([name, value, note]) => html`<div key=${name + note}><dt>${name}</dt><dd>${value}<small>${note}</small></dd></div>`)}</dl>
      ${table && html`<${Report} report=${report} />`}
      ${edges.length > 1 && html`<div class="density"><h2>Density of the latents <span class="muted">click a bar to filter</span></h2>
        <${Histogram} counts=${density.counts} edges=${edges} xTicks=${ticks} height=${table ? 236 : 150} label="Histogram of the latents' densities"
          xLabel="share of tokens on which a latent is active" yLabel="latents" formatX=${power} onPick=${pick}
          picked=${params.min === "" && params.max === "" ? null : (i) => edges[i] >= low - 0.01 && edges[i + 1] <= high + 0.01}
          describe=${(i) => `${count(density.counts[i])} latents active on ${percent(10 ** edges[i], 2)} to ${percent(10 ** edges[i + 1], 2)} of tokens`} /></div>`}
    </section>`;
  }

  function About({ overview }) {
    const { dictionary, text, attributions } = overview;
    const facts = [
      ["dictionary", dictionary.name], ["architecture", dictionary.kind], ["model", dictionary.model], ["hookpoint", dictionary.hookpoint],
      ["input width", dictionary.d_in && count(dictionary.d_in)], ["latents", dictionary.d_sae && count(dictionary.d_sae)],
      ["tokens", text.n_tokens && count(text.n_tokens)], ["context length", overview.context_length && count(overview.context_length)],
      ["atlas", overview.fingerprint.slice(0, 16)], ["made with", "sememe " + overview.sememe],
    ].filter(([, value]) => value);
    const safe = (url) => typeof url === "string" && /^https?:\/\//i.test(url);
    return html`<article class="about">
      <p><a href="#/">← All latents</a></p>
      <h1>About this atlas</h1>
      <dl class="about-facts">${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${String(value)}</dd></div>`)}</dl>
      <h2>Reading a latent</h2>
      <p>A latent is one direction of a dictionary learned from a language model's activations. The text it is most active on, and the tokens it makes likelier, say what it stands for. Tokens are shaded by the latent's activation, from none to its maximum on this text; the strongest token of an example is underlined.</p>
      <p>What cannot be seen is shown in a lighter ink: <span class="mark">·</span> a space, <span class="mark">↵</span> a line's end, <span class="mark">⇥</span> a tab, and escapes such as <span class="mark escape">\\u200B</span> or <span class="mark escape">\\xE6</span> for invisible letters and bytes. A letter that the tokenizer cuts into several tokens stands in the first of them; the others are thin gaps.</p>
      <h2>Keys</h2>
      <p class="keys"><kbd>←</kbd> <kbd>→</kbd> previous and next latent in the list's order; <kbd>Esc</kbd> back to the list; <kbd>/</kbd> search.</p>
      <h2 id="attributions">Text sources</h2>
      ${attributions.length === 0 ? html`<p>The atlas names no sources.</p>` : html`<ul class="sources">${attributions.map((a, i) => html`<li key=${i}>
        <b>${safe(a.url) ? html`<a href=${a.url} rel="noopener noreferrer" target="_blank">${a.title || a.source}</a>` : a.title || a.source}</b>
        ${a.licence ? html`<span class="licence">${a.licence}</span>` : null}${a.notice ? html`<p>${a.notice}</p>` : null}</li>`)}</ul>`}
    </article>`;
  }

  function Header({ overview }) {
    const { dictionary } = overview || { dictionary: {} };
    return html`<header class="top"><a class="brand" href="#/"><svg viewBox="0 0 32 32" width="22" height="22" aria-hidden="true"><g><rect x="4" y="12" width="4" height="8" rx="2" opacity=".45" /><rect x="11" y="8" width="4" height="16" rx="2" opacity=".7" /><rect x="18" y="3" width="4" height="26" rx="2" /><rect x="25" y="10" width="4" height="12" rx="2" opacity=".7" /></g></svg>Sememe</a>
      <p class="what">${[dictionary.model, dictionary.hookpoint, dictionary.name].filter(Boolean).map((part, i) => html`<span key=${i}>${part}</span>`)}</p>
      <${S.Tools} /><a class="about-link" href="#/about">About</a></header>`;
  }

  function Footer({ overview }) {
    const names = [...new Set((overview.attributions || []).map((a) => a.title || a.source))];
    return html`<footer>${names.length > 0 && html`<p>Text: ${names.slice(0, 6).join(", ")}${names.length > 6 ? ` and ${names.length - 6} more` : ""}. <a href="#/about">Sources and licences</a></p>`}</footer>`;
  }

  // The table behind a search by token is read when somebody wants to search.
  S.needSearch = (model) => {
    if (!model || model.search || model.asked) return;
    model.asked = true;
    S.source.search().then((payload) => { model.setSearch(payload); S.redraw(); }, () => { model.asked = false; });
  };

  function App() {
    const [address, setAddress] = useState(route.current());
    const [overview, setOverview] = useState(null);
    const [model, setModel] = useState(null);
    const [error, setError] = useState(null);
    const [, redraw] = useState(0);
    S.redraw = () => redraw((n) => n + 1);
    useEffect(() => route.listen(setAddress), []);
    useEffect(() => {
      S.source.overview().then(setOverview, setError);
      Promise.all([S.source.index(), S.source.tokens()]).then(([index, tokens]) => setModel(new S.Model(index, new S.text.Tokens(tokens))), setError);
    }, []);
    useEffect(() => { if (model && address.params.q) S.needSearch(model); }, [model, address.params.q]);
    useEffect(() => { S.loadSession(); }, []);
    useEffect(() => { if (model) S.notes.attach(model); }, [model]);
    useEffect(() => {
      const keys = (event) => {
        if (event.key !== "/" || event.ctrlKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
        const box = document.getElementById("search");
        event.preventDefault();
        if (box) { box.focus(); box.select(); } else { route.go(route.format("list", null, route.listParams(address.params))); setTimeout(() => document.getElementById("search")?.focus(), 60); }
      };
      window.addEventListener("keydown", keys);
      return () => window.removeEventListener("keydown", keys);
    }, [address]);
    useEffect(() => {
      const name = overview && (overview.dictionary.name || overview.dictionary.hookpoint);
      const label = model && address.page === "latent" && model.rowOf.has(address.latent) ? " " + model.label(model.rowOf.get(address.latent)).slice(0, 60) : "";
      document.title = [address.page === "latent" ? `Latent ${address.latent}${label}` : address.page === "about" ? "About" : S.pages[address.page] ? S.pages[address.page].title : "", name, "Sememe"].filter(Boolean).join(" – ");
    }, [address, overview, model]);
    if (error) return html`<${Header} /><main class="failed"><h1>This atlas cannot be shown</h1><p class="problem" role="alert">${error.message}</p></main>`;
    if (!overview || !S.session) return html`<${Header} /><main aria-busy="true"></main>`;
    let body;
    if (S.pages[address.page]) body = model ? html`<${S.pages[address.page].Page} model=${model} overview=${overview} query=${address.query} />` : html`<p class="empty" role="status">Reading the latents…</p>`;
    else if (address.page === "about") body = html`<${About} overview=${overview} />`;
    else if (address.page === "latent") body = model ? html`<${S.latentViews.Latent} model=${model} overview=${overview} id=${address.latent} params=${address.params} />` : html`<p class="empty" role="status">Reading the latents…</p>`;
    else body = html`<h1 class="sr">Latents of ${overview.dictionary.name || "this dictionary"}</h1><${Overview} overview=${overview} params=${address.params} /><${S.TryBox} /><${S.listViews.List} model=${model} overview=${overview} params=${address.params} />`;
    return html`<${Header} overview=${overview} /><main class=${"page-" + address.page}>${body}</main><${Footer} overview=${overview} />`;
  }

  render(html`<${App} />`, document.getElementById("app"));
})((window.Sememe = window.Sememe || {}));
