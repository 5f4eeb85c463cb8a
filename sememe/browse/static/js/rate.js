// Rate: a seeded queue of latents, judged one by one by their text alone; tallies with intervals.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useEffect, useMemo, useState } = preactHooks;
  const html = htm.bind(h);
  const { percent, count } = S.charts;

  const VERDICTS = [["monosemantic", "1", "one meaning"], ["unclear", "2", "cannot tell"], ["polysemantic", "3", "several meanings"]];

  // Wilson's interval of a share, 95%.
  S.wilson = (k, n) => {
    if (!n) return [0, 1];
    const z = 1.959964, p = k / n, middle = p + (z * z) / (2 * n), half = z * Math.sqrt((p * (1 - p)) / n + (z * z) / (4 * n * n)), under = 1 + (z * z) / n;
    return [Math.max(0, (middle - half) / under), Math.min(1, (middle + half) / under)];
  };

  const decade = (density) => { const power = Math.min(-1, Math.floor(Math.log10(density) + 1e-12)); return `density 1e${power} to 1e${power + 1}`; };
  const third = (value) => (value === null || value === undefined ? "mcs unknown" : value < 0.5 ? "mcs below 0.5" : value < 0.8 ? "mcs 0.5 to 0.8" : "mcs 0.8 or more");

  // Which latents, in which order: equally many of each stratum as long as it lasts, the rest in turn, at random.
  S.rateQueue = ({ seed, n, pools }) => {
    const random = S.random(seed);
    const shuffled = pools.map(({ stratum, items }) => {
      const left = items.slice();
      for (let i = left.length - 1; i > 0; i--) { const j = Math.floor(random() * (i + 1)); [left[i], left[j]] = [left[j], left[i]]; }
      return left.map((item) => ({ ...item, stratum }));
    });
    const drawn = [];
    for (let turn = 0; drawn.length < n && shuffled.some((pool) => pool.length > turn); turn++)
      for (const pool of shuffled) if (turn < pool.length && drawn.length < n) drawn.push(pool[turn]);
    for (let i = drawn.length - 1; i > 0; i--) { const j = Math.floor(random() * (i + 1)); [drawn[i], drawn[j]] = [drawn[j], drawn[i]]; }
    return drawn;
  };

  function grouped(items, name) {
    const pools = new Map();
    for (const item of items) { const stratum = name(item); if (!pools.has(stratum)) pools.set(stratum, []); pools.get(stratum).push(item); }
    return [...pools].sort(([a], [b]) => (a < b ? -1 : 1)).map(([stratum, found]) => ({ stratum, items: found }));
  }

  const alive = (model, source, atlas) => model.index.id.map((id, row) => ({ id, row, source, atlas })).filter(({ row }) => model.index.n_active[row] > 0);

  function Tallies({ ratings }) {
    const groups = [["all", ratings], ...grouped(ratings, ({ stratum }) => stratum).map(({ stratum, items }) => [stratum, items])];
    const shown = groups.length === 2 ? groups.slice(0, 1) : groups;
    return html`<div class="scroll" tabindex="0" role="group" aria-label="Tallies"><table class="tallies"><thead><tr><th scope="col">of</th><th scope="col">rated</th>${VERDICTS.map(([verdict]) => html`<th key=${verdict} scope="col">${verdict}</th>`)}</tr></thead>
      <tbody>${shown.map(([name, of]) => html`<tr key=${name}><th scope="row">${S.honest(name)}</th><td>${count(of.length)}</td>${VERDICTS.map(([verdict]) => {
        const k = of.filter((one) => one.verdict === verdict).length, [low, high] = S.wilson(k, of.length);
        return html`<td key=${verdict}>${k}${of.length ? html` <span class="muted">${percent(k / of.length, 2)} (${percent(low, 2)} to ${percent(high, 2)})</span>` : null}</td>`;
      })}</tr>`)}</tbody></table></div>`;
  }

  function Examples({ source, model, item }) {
    const [found, setFound] = useState({ of: null });
    useEffect(() => {
      let stale = false;
      S.readExamples(source, model, item.id, ["top", "decile"], 7).then((read) => { if (!stale) setFound({ ...read, of: item }); }, (error) => { if (!stale) setFound({ error, of: item }); });
      return () => { stale = true; };
    }, [item]);
    if (found.of !== item) return html`<p class="empty" role="status">Reading its text…</p>`;
    if (found.error) return html`<p class="problem" role="alert">${found.error.message}</p>`;
    return html`<ol class="rate-examples">${found.examples.map((example, i) => html`<${S.Excerpt} key=${i} model=${model} latent=${found.latent} example=${example} context=${found.contexts.get(example.context)} />`)}</ol>
      ${!found.examples.length && html`<p class="empty">It has no examples.</p>`}`;
  }

  function Page({ model, query }) {
    const notes = S.useNotes();
    const { session } = S;
    const n = Math.max(1, Math.min(1000, Number(query.n) || 30)), seed = Math.max(0, Math.round(Number(query.seed) || 0)), by = query.by || "density";
    const others = session ? session.atlases.map((atlas, i) => ({ ...atlas, i })).filter(({ i, error }) => i !== S.atlas && !error) : [];
    const mixed = by.startsWith("mixed:") ? others.find(({ i }) => String(i) === by.slice(6)) : null;
    const { model: theirs, error: noModel } = S.useModelOf(mixed ? mixed.i : null);
    const [details, setDetails] = useState(null);
    useEffect(() => { if (by === "mcs" && !details) (model.details ? Promise.resolve(model.details) : S.source.details ? S.source.details() : Promise.resolve({})).then(setDetails, () => setDetails({})); }, [by]);
    const mine = session ? session.atlases[S.atlas] : null;
    const queue = useMemo(() => {
      if (!mine) return null;
      const own = alive(model, mine.fingerprint || "", S.atlas);
      if (mixed) {
        if (!theirs) return null;
        return S.rateQueue({ seed, n, pools: [{ stratum: mine.name || "first", items: own }, { stratum: mixed.name || "second", items: alive(theirs, mixed.fingerprint || "", mixed.i) }] });
      }
      if (by === "mcs" && !details) return null;
      const mcs = (details && details.mcs) || [];
      return S.rateQueue({ seed, n, pools: grouped(own, ({ row }) => (by === "mcs" ? third(mcs[row]) : by === "none" ? "all" : decade(model.index.density[row]))) });
    }, [session, theirs, details, by, seed, n]);
    const name = `seed ${seed}, ${n} by ${mixed ? "atlas, source hidden, with " + (mixed.fingerprint || "").slice(0, 16) : by}`;
    const done = useMemo(() => new Map(notes.ratings.filter((one) => one.session === name).map((one) => [one.source + " " + one.latent, one])), [notes.ratings, name]);
    const key = (item) => item.source + " " + item.id;
    const place = queue ? queue.findIndex((item) => !done.has(key(item))) : -1;
    const item = queue && place >= 0 ? queue[place] : null;
    // Asked at the moment of the key, not of the last drawing: two quick keys are two verdicts.
    const placeNow = () => {
      const rated = new Set(notes.ratings.filter((one) => one.session === name).map((one) => one.source + " " + one.latent));
      return queue ? queue.findIndex((one) => !rated.has(key(one))) : -1;
    };
    const rate = (verdict) => {
      const now = queue && queue[placeNow()];
      if (now) notes.rate({ session: name, source: now.source, latent: now.id, stratum: now.stratum, verdict });
    };
    const undo = () => {
      if (!queue) return;
      const now = placeNow(), last = queue[(now < 0 ? queue.length : now) - 1];
      if (last) notes.rate({ session: name, source: last.source, latent: last.id, verdict: null });
    };
    useEffect(() => {
      const keys = (event) => {
        if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
        const verdict = VERDICTS.find(([verdict, digit]) => event.key === digit || event.key === verdict[0]);
        if (verdict) { event.preventDefault(); rate(verdict[0]); } else if (event.key === "z" || event.key === "Backspace") { event.preventDefault(); undo(); }
      };
      window.addEventListener("keydown", keys);
      return () => window.removeEventListener("keydown", keys);
    });
    if (!session || !notes.ready) return html`<p class="empty" role="status">Reading…</p>`;
    const change = (changes) => S.route.replace(S.pageAddress("rate", { ...query, ...changes }));
    const of = [...done.values()];
    const finished = queue && place < 0;
    const options = [["density", "density"], ["mcs", "likeness to other dictionaries (mcs)"], ["none", "nothing"], ...others.map(({ i, name: other }) => ["mixed:" + i, `mixed with ${S.honest(other)}, source hidden`])];
    return html`<article class="tool rate"><h1>Rate</h1>
      <p class="lead">Does this latent stand for one thing? Judge by its text alone; the queue is the same for everybody with the same seed.</p>
      <div class="tool-bar"><label class="field"><span>strata by</span><select name="by" onChange=${(e) => change({ by: e.target.value })}>${options.map(([value, text]) => html`<option key=${value} value=${value} selected=${value === by}>${text}</option>`)}</select></label>
        <label class="field"><span>latents</span><input type="number" name="n" min="1" max="1000" value=${n} onChange=${(e) => change({ n: Math.max(1, Math.min(1000, Math.round(Number(e.target.value)) || 30)) })} /></label>
        <label class="field"><span>seed</span><input type="number" name="seed" min="0" max="4294967295" value=${seed} onChange=${(e) => change({ seed: Math.max(0, Math.round(Number(e.target.value)) || 0) })} /></label>
        <${S.NotesFiles} name="ratings.json" /></div>
      ${noModel && html`<p class="problem" role="alert">${noModel.message}</p>`}
      ${notes.problem && html`<p class="problem" role="alert">${notes.problem}</p>`}
      ${!queue && !noModel && html`<p class="empty" role="status">Drawing…</p>`}
      ${queue && html`<p class="rate-place" role="status">${finished ? html`<b>All ${count(queue.length)} are rated.</b>` : html`<b>${place + 1}</b> of ${count(queue.length)}`}</p>`}
      ${item && html`<section aria-label="The latent to rate"><${Examples} source=${S.sourceOf(item.atlas)} model=${item.atlas === S.atlas ? model : theirs} item=${item} /></section>`}
      ${queue && html`<div class="verdicts" role="group" aria-label="Verdict">${VERDICTS.map(([verdict, digit, words]) => html`<button type="button" key=${verdict} class="button main" disabled=${!item} onClick=${() => rate(verdict)}>${verdict} <span>${words}</span> <kbd>${digit}</kbd></button>`)}
        <button type="button" class="button" disabled=${!of.length} onClick=${undo}>Undo <kbd>z</kbd></button></div>`}
      ${of.length > 0 && html`<section aria-label="So far"><h2>So far <span class="muted">shares with 95% intervals (Wilson)${mixed && !finished ? "; whose they are is told at the end" : ""}</span></h2><${Tallies} ratings=${mixed && !finished ? of.map((one) => ({ ...one, stratum: "all" })) : of} /></section>`}
      ${finished && html`<section aria-label="What they were"><h2>What they were</h2><ol class="rated">${queue.map((one) => html`<li key=${key(one)}><a href=${(one.atlas === S.atlas ? "" : "?atlas=" + one.atlas) + S.route.format("latent", one.id, {})}>Latent ${one.id}</a> <span class="muted">${S.honest(one.stratum)}</span> ${(done.get(key(one)) || {}).verdict}</li>`)}</ol></section>`}
    </article>`;
  }

  S.pages.rate = { title: "Rate", Page };
})((window.Sememe = window.Sememe || {}));
