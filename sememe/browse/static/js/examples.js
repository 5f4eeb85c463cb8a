// Chosen texts: which latents fire on each of their tokens, how strongly, and what each does there.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useEffect, useMemo, useRef, useState } = preactHooks;
  const html = htm.bind(h);
  const { number, percent, count } = S.charts;
  const { Label, Output, Runs } = S.tokenViews;
  const { route } = S;
  const FIRST_SHOWN = 30;

  // A text's beginning on one line, as honest text.
  const beginning = (text, length = 70) => { const flat = S.text.flat(text.slice(0, 400)).replace(/·/g, " "); return flat.length > length ? flat.slice(0, length) + "…" : flat; };

  function TextList({ overview, params }) {
    const { texts } = overview;
    if (!texts.length) return null;
    const shown = params.open === "texts" ? texts : texts.slice(0, 6);
    return html`<section class="texts"><h2>Texts <span class="muted">which latents fire on them, token by token</span></h2>
      <ul>${shown.map((text, i) => html`<li key=${i}><a href=${route.format("text", i, route.listParams(params))}><span class="quote" dir="auto">${beginning(text.prompt)}</span></a> <span class="muted">${count(text.n_tokens)} tokens</span></li>`)}</ul>
      ${shown.length < texts.length && html`<button type="button" class="link" onClick=${() => route.replace(route.format("list", null, { ...params, open: "texts" }))}>Show ${texts.length - shown.length} more</button>`}
    </section>`;
  }

  const signed = (value) => (value === null || value === undefined ? "–" : (value > 0 ? "+" : "") + number(value));

  // The latents of a token, or of the whole text, as a table.
  function Rows({ model, rows, columns, marked, params, place, caption, name }) {
    const open = params.open.split(",");
    const shown = open.includes(name) ? rows : rows.slice(0, FIRST_SHOWN);
    const has = (name) => columns.includes(name);
    return html`<div class="scroll" tabindex="0" role="region" aria-label=${caption}><table class="fires"><caption class="sr">${caption}</caption><thead><tr><th scope="col">latent</th><th scope="col">label</th><th scope="col">${has("tokens") ? "tokens" : "activation"}</th>
      ${has("most") && html`<th scope="col">largest</th>`}${has("quantile") && html`<th scope="col" title="Share of its activations in the atlas that are smaller">quantile</th>`}
      ${has("loss_change") && html`<th scope="col" title="Of the next token's loss in nats when it is taken out here; above 0 where it helps">loss</th><th scope="col">without it</th>`}<th scope="col"><span class="sr">show</span></th></tr></thead>
      <tbody>${shown.map((row) => { const at = model.rowOf.get(row.latent); return html`<tr key=${row.latent} class=${row.latent === marked ? "current" : ""}>
        <td class="c-id"><a href=${route.format("latent", row.latent, route.listParams(params))}>${row.latent}</a></td>
        <td><span class="names"><${Label} model=${model} row=${at} /></span></td>
        <td class="value">${has("tokens") ? count(row.tokens) : number(row.act)}</td>
        ${has("most") && html`<td class="value">${number(row.act)}</td>`}${has("quantile") && html`<td class="value">${percent(row.quantile)}</td>`}
        ${has("loss_change") && html`<td class="value">${signed(row.loss_change)}</td><td><${Output} raised=${row.raised} lowered=${row.lowered} /></td>`}
        <td><button type="button" class="link" aria-pressed=${row.latent === marked} aria-label=${`Shade the text by latent ${row.latent}`} onClick=${() => route.replace(route.format("text", place, { ...params, mark: row.latent === marked ? "" : String(row.latent) }))}>shade</button></td>
      </tr>`; })}</tbody></table>
      ${shown.length < rows.length && html`<button type="button" class="link" onClick=${() => route.replace(route.format("text", place, { ...params, open: [...open.filter(Boolean), name].join(",") }))}>Show ${rows.length - shown.length} more</button>`}</div>`;
  }

  function ChosenText({ model, overview, place, params }) {
    const [state, setState] = useState({ text: null, error: null, place: -1 });
    const box = useRef(null);
    useEffect(() => {
      let stale = false;
      if (place >= overview.texts.length) { setState({ text: null, error: null, place }); return undefined; }
      S.source.text(place).then((text) => {
        if (stale) return;
        model.tokens.learn(text.tokens.token, text.tokens.text, text.tokens.bytes);
        setState({ text, error: null, place });
      }, (error) => { if (!stale) setState({ text: null, error, place }); });
      return () => { stale = true; };
    }, [place]);
    useEffect(() => { window.scrollTo(0, 0); }, [place]);
    const { text, error } = state;
    const pieces = useMemo(() => (text ? model.tokens.row(text.tokens.token) : []), [text]);
    const whole = useMemo(() => {
      const found = new Map();
      if (text) for (const here of text.latents) if (here) here.latent.forEach((latent, i) => {
        const row = found.get(latent) || { latent, tokens: 0, act: 0 };
        row.tokens += 1;
        if (Math.abs(here.act[i]) > Math.abs(row.act)) row.act = here.act[i]; // below 0, too: PCA, AbsTopK
        found.set(latent, row);
      });
      return [...found.values()].sort((a, b) => b.tokens - a.tokens || Math.abs(b.act) - Math.abs(a.act));
    }, [text]);
    const back = html`<p class="crumb"><a href=${route.format("list", null, route.listParams(params))}>← All latents</a>
      <span class="steps">${place > 0 ? html`<a class="step" href=${route.format("text", place - 1, { ...params, at: "", mark: "", open: "" })} aria-label="Previous text">←</a>` : null}${place + 1 < overview.texts.length ? html`<a class="step" href=${route.format("text", place + 1, { ...params, at: "", mark: "", open: "" })} aria-label="Next text">→</a>` : null}</span></p>`;
    if (place >= overview.texts.length) return html`<article class="chosen">${back}<h1>Text ${place + 1}</h1><p class="problem" role="alert">There is no text ${place}. ${overview.texts.length ? `Texts are numbered 0 to ${overview.texts.length - 1}.` : "This page was made without chosen texts."}</p></article>`;
    if (error) return html`<article class="chosen">${back}<h1>Text ${place + 1}</h1><p class="problem" role="alert">${error.message}</p></article>`;
    if (!text || state.place !== place) return html`<article class="chosen" aria-busy="true">${back}<h1>Text ${place + 1}</h1><p class="empty" role="status">Reading the text…</p></article>`;
    const marked = /^\d+$/.test(params.mark) ? Number(params.mark) : null;
    const acts = text.latents.map((here) => { const i = here && marked !== null ? here.latent.indexOf(marked) : -1; return i < 0 ? 0 : here.act[i]; });
    const fires = text.latents.map((here, i) => text.tokens.n_active[i] || (here ? here.latent.length : 0));
    const most = Math.max(1e-9, ...acts.map(Math.abs));
    // Not by how many latents fire: where k are kept on every token, all tokens would look alike.
    const nearest = text.latents.map((here) => (here ? here.latent.reduce((best, latent, i) => { const largest = model.index.max_act[model.rowOf.get(latent)]; return Math.max(best, largest ? Math.min(1, Math.abs(here.act[i]) / largest) : 0.5); }, 0) : 0));
    const shade = (i) => { const value = marked === null ? nearest[i] : Math.abs(acts[i]) / most; return value ? 0.1 + 0.9 * value : 0; };
    const asked = Number(params.at), first = text.latents.findIndex((here) => here);
    const at = params.at !== "" && asked >= 0 && asked < pieces.length ? asked : Math.max(first, 0);
    const here = text.latents[at];
    const rows = here ? here.latent.map((latent, i) => Object.fromEntries([["latent", latent], ...Object.keys(here).filter((name) => name !== "latent").map((name) => [name, here[name][i]])])).sort((a, b) => (b.quantile || 0) - (a.quantile || 0) || Math.abs(b.act) - Math.abs(a.act)) : [];
    const choose = (i) => route.replace(route.format("text", place, { ...params, at: String(i) }));
    const keys = (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || at + step < 0 || at + step >= pieces.length) return;
      event.preventDefault();
      choose(at + step);
      setTimeout(() => box.current && box.current.querySelector('[aria-pressed="true"]')?.focus());
    };
    return html`<article class="chosen">${back}
      <h1>Text ${place + 1} <span class="muted">of ${overview.texts.length}</span></h1>
      <p class="muted">${marked === null ? "A token is shaded by the latent that is nearest to its own maximum there" : html`Tokens are shaded by latent <a href=${route.format("latent", marked, route.listParams(params))}>${marked}</a>`}. Choose a token to see its latents.</p>
      <div class="text chosen-text" dir="auto" ref=${box} role="group" aria-label="The text's tokens; left and right arrows move" onKeyDown=${keys}>${pieces.map((piece, i) => html`<button type="button" key=${i} tabindex=${i === at ? 0 : -1} class=${"tok" + (shade(i) ? " on" : "") + (acts[i] < 0 ? " negative" : "") + (i === at ? " peak" : "") + (piece.continues ? " continues" : "") + (text.tokens.kept[i] ? "" : " outside")} style=${{ "--a": shade(i).toFixed(3) }}
        aria-pressed=${i === at} title=${text.tokens.kept[i] ? `${fires[i]} fire` : "not looked at"} onClick=${() => choose(i)}><${Runs} parts=${piece.parts} breaks /></button>`)}</div>
      <section class="at-token"><h2>On <span class="chip strong" dir="auto"><${Runs} parts=${model.tokens.alone(text.tokens.token[at])} /></span> <span class="muted">token ${at}${text.tokens.kept[at] ? `, ${count(fires[at])} fire${rows.length < fires[at] ? `, ${rows.length} shown` : ""}` : ": not looked at"}${text.tokens.loss_of_next[at] === null ? "" : `, loss of the next token ${number(text.tokens.loss_of_next[at])}`}</span></h2>
        ${rows.length ? html`<${Rows} key=${at} name="token" model=${model} rows=${rows} columns=${["act", ...["quantile", "loss_change"].filter((name) => name in here)]} marked=${marked} params=${params} place=${place} caption=${`Latents that fire on token ${at}`} />` : html`<p class="empty">No latent is shown here.</p>`}</section>
      <section class="in-text"><h2>In the whole text <span class="muted">by the number of tokens they fire on</span></h2>
        <${Rows} name="text" model=${model} rows=${whole} columns=${["tokens", "most"]} marked=${marked} params=${params} place=${place} caption="Latents that fire in this text" /></section>
    </article>`;
  }

  S.exampleTexts = { TextList, ChosenText };
})((window.Sememe = window.Sememe || {}));
