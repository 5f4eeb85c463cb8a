// Compare: the latents of this atlas beside those of another that are most like them.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useEffect, useMemo, useState } = preactHooks;
  const html = htm.bind(h);
  const { number, percent, count } = S.charts;
  const SHOWN = 100;

  function Card({ source, model, latent, name }) {
    const [found, setFound] = useState({ latent: null });
    useEffect(() => {
      let stale = false;
      S.readExamples(source, model, latent).then((read) => { if (!stale) setFound(read); }, (error) => { if (!stale) setFound({ latent: null, error }); });
      return () => { stale = true; };
    }, [model, latent]);
    const row = model.rowOf.get(latent);
    const about = found.latent && found.latent.id === latent ? found : null;
    const address = (source.number ? "?atlas=" + source.number : location.pathname) + S.route.format("latent", latent, {});
    return html`<section class="card" aria-label=${`Latent ${latent} of ${name}`} aria-busy=${!about}>
      <h2><a href=${address}>Latent ${latent}</a> <span class="names"><${S.tokenViews.Label} model=${model} row=${row} /></span></h2>
      <p class="muted">${S.honest(name)}; active on ${percent(model.index.density[row])} of tokens, at most ${number(model.index.max_act[row])}</p>
      ${found.error && html`<p class="problem" role="alert">${found.error.message}</p>`}
      ${about && html`<p class="names promotes">${about.latent.promoted.tokens.slice(0, 6).map((token) => html`<${S.tokenViews.Chip} key=${token} tokens=${model.tokens} id=${token} />`)}</p>
        <ol>${about.examples.map((example, i) => html`<${S.Excerpt} key=${i} model=${model} latent=${about.latent} example=${example} context=${about.contexts.get(example.context)} />`)}</ol>
        ${!about.examples.length && html`<p class="empty">It was never active on this text.</p>`}`}
    </section>`;
  }

  function Page({ model, query }) {
    const { session } = S;
    const others = session ? session.atlases.map((atlas, i) => ({ ...atlas, i })).filter(({ i, error }) => i !== S.atlas && !error) : [];
    const asked = Number(query.with);
    const other = others.find(({ i }) => i === asked) || others[0];
    const number_ = other ? other.i : null;
    const { model: theirs, error: noModel } = S.useModelOf(number_);
    const [pairs, setPairs] = useState({ found: null, error: null, of: null });
    useEffect(() => {
      if (number_ === null) return undefined;
      let stale = false;
      S.source.compare(number_).then((found) => { if (!stale) setPairs({ found, error: null, of: number_ }); }, (error) => { if (!stale) setPairs({ found: null, error, of: number_ }); });
      return () => { stale = true; };
    }, [number_]);
    const found = pairs.of === number_ ? pairs.found : null;
    const only = query.only || "alive", sort = query.sort || "like", needle = (query.q || "").trim();
    const rows = useMemo(() => {
      if (!found || !theirs) return [];
      const matching = needle ? model.match(needle, "any").score : null;
      const kept = [];
      for (let row = 0; row < found.latent.length; row++) {
        if (matching && !matching[row]) continue;
        if (only === "mutual" && found.mutual[row] !== true) continue;
        if (only === "none" ? found.other[row] !== null : only !== "all" && (found.other[row] === null || !model.index.n_active[row])) continue;
        kept.push(row);
      }
      const like = (row) => (found.similarity[row] === null ? -2 : found.similarity[row]);
      const order = { like: (a, b) => like(b) - like(a), unlike: (a, b) => like(a) - like(b), density: (a, b) => model.index.density[b] - model.index.density[a], id: (a, b) => a - b }[sort] || (() => 0);
      return kept.sort((a, b) => order(a, b) || a - b);
    }, [found, theirs, only, sort, needle]);
    const change = (changes) => S.route.replace(S.pageAddress("compare", { ...query, ...changes }));
    if (!session) return html`<p class="empty" role="status">Reading…</p>`;
    if (!other) return html`<article class="tool"><h1>Compare</h1><p class="empty">There is one atlas here. To compare two, name both: <code>sememe browse ATLAS OTHER</code>.</p></article>`;
    const error = pairs.error || noModel;
    const mine = S.honest(session.atlases[S.atlas].name || "this atlas"), named = S.honest(other.name || "the other");
    const open = /^\d{1,9}$/.test(query.latent || "") && model.rowOf.has(Number(query.latent)) ? model.rowOf.get(Number(query.latent)) : null;
    const shown = Math.max(SHOWN, Number(query.n) || 0);
    const select = (name, label, options, value) => html`<label class="field"><span>${label}</span><select name=${name} onChange=${(e) => change({ [name]: e.target.value })}>${options.map(([option, text]) => html`<option key=${option} value=${option} selected=${String(option) === String(value)}>${text}</option>`)}</select></label>`;
    const first = rows.slice(0, shown);
    if (open !== null && rows.includes(open) && !first.includes(open)) first.unshift(open); // an address names it: it is seen
    const average = found && rows.length ? rows.reduce((sum, row) => sum + (found.similarity[row] || 0), 0) / rows.length : null;
    return html`<article class="tool compare"><h1>Compare</h1>
      <p class="lead">Each latent of <b>${mine}</b> beside the latent of <b>${named}</b> that is most like it${found ? html`, by <b>${found.about}</b>` : ""}.</p>
      <div class="tool-bar">${others.length > 1 && select("with", "with", others.map(({ i, name }) => [i, S.honest(name)]), other.i)}
        <input type="search" name="q" value=${query.q || ""} onInput=${(e) => change({ q: e.target.value })} placeholder="Token, label or number" aria-label="Search latents" autocomplete="off" />
        ${select("only", "show", [["alive", "matched"], ["mutual", "each other's likest"], ["none", "without a match"], ["all", "all"]], only)}
        ${select("sort", "sort", [["like", "most alike"], ["unlike", "least alike"], ["density", "density"], ["id", "number"]], sort)}
        <span class="found" role="status">${found && theirs ? html`<b>${count(rows.length)}</b> latents${average !== null ? `, ${number(average)} on average` : ""}` : ""}</span></div>
      ${error && html`<p class="problem" role="alert">${error.message}</p>`}
      ${!error && !(found && theirs) && html`<p class="empty" role="status">Comparing…</p>`}
      ${found && theirs && html`<ol class="pairs">${first.map((row) => {
        const partner = found.other[row], theirRow = partner === null ? undefined : theirs.rowOf.get(partner);
        const isOpen = open === row;
        return html`<li key=${row} class=${isOpen ? "open" : ""}><button type="button" class="pair" aria-expanded=${isOpen} onClick=${() => change({ latent: isOpen ? "" : model.index.id[row] })}>
            <span class="side"><span class="c-id">${model.index.id[row]}</span><span class="names"><${S.tokenViews.Label} model=${model} row=${row} /></span></span>
            <span class="like">${found.similarity[row] === null ? "–" : number(found.similarity[row], 2)}${found.mutual[row] ? html`<span title="each is the other's likest"> ⇄</span><span class="sr"> each other's likest</span>` : null}</span>
            <span class="side">${theirRow === undefined ? html`<span class="nameless">nothing like it</span>` : html`<span class="c-id">${partner}</span><span class="names"><${S.tokenViews.Label} model=${theirs} row=${theirRow} /></span>`}</span></button>
          ${isOpen && html`<div class="side-by-side"><${Card} source=${S.source} model=${model} latent=${model.index.id[row]} name=${mine} />
            ${theirRow === undefined ? html`<section class="card"><p class="empty">Nothing in ${named} is like it.</p></section>` : html`<${Card} source=${S.sourceOf(other.i)} model=${theirs} latent=${partner} name=${named} />`}</div>`}</li>`;
      })}</ol>
      ${rows.length > shown && html`<button type="button" class="button" onClick=${() => change({ n: shown + SHOWN })}>Show more</button>`}
      ${!rows.length && html`<p class="empty">No latent matches.</p>`}`}
    </article>`;
  }

  S.pages.compare = { title: "Compare", Page, when: (session) => session.atlases.length > 1 };
})((window.Sememe = window.Sememe || {}));
