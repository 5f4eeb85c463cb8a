// Try: the latents of a text, token by token, and what the model writes when some of them are turned up. Served only.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useEffect, useMemo, useRef, useState } = preactHooks;
  const html = htm.bind(h);
  const { number, percent, count } = S.charts;

  const jobName = () => "page-" + Math.random().toString(36).slice(2) + Date.now().toString(36);

  // What the model's process is doing: asked often while something runs, now and then while it loads.
  function useLive(busy, there) {
    const [status, setStatus] = useState(null);
    useEffect(() => {
      if (!there) return undefined;
      let timer = null, stale = false;
      const look = async () => {
        let found;
        try { found = await S.ask("live"); } catch (error) { found = { state: "failed", reason: error.message }; }
        if (stale) return;
        setStatus(found);
        const wait = busy || found.state === "busy" ? 300 : found.state === "loading" ? 700 : found.state === "failed" ? 3000 : 0;
        if (wait) timer = setTimeout(look, wait);
      };
      look();
      return () => { stale = true; clearTimeout(timer); };
    }, [busy, there]);
    return status;
  }

  // One question at a time from each form: {run, cancel, running, error, answer}.
  function useQuestion(verb) {
    const [state, setState] = useState({ answer: null, error: null, job: null });
    const current = useRef(null);
    const run = async (body) => {
      const job = jobName();
      if (current.current) cancel();
      current.current = job;
      setState((old) => ({ ...old, error: null, job }));
      try {
        const answer = await S.send("POST", "live/" + verb, { ...body, job });
        if (current.current === job) setState({ answer: { ...answer, asked: body }, error: null, job: null });
      } catch (error) {
        if (current.current === job) setState((old) => ({ ...old, error: / got cancelled\. /.test(error.message) ? "Cancelled." : error.message, job: null }));
      }
      if (current.current === job) current.current = null;
    };
    const cancel = () => { if (current.current) S.send("POST", "live/cancel", { job: current.current }).catch(() => undefined); };
    useEffect(() => cancel, []);
    return { ...state, run, cancel, running: state.job !== null };
  }

  function Status({ status }) {
    if (!status) return html`<p class="live-state" role="status">Asking for the model…</p>`;
    const { state, about, reason, waiting } = status;
    const text = {
      off: "The model is not loaded; the first question loads it.", loading: "The model is loading…", ready: "Ready", busy: "Busy", failed: "The model cannot be used",
    }[state];
    return html`<p class=${"live-state " + state} role="status"><i aria-hidden="true"></i>${text}${about ? html` <span class="muted">${about.model} on ${about.device}, ${about.hookpoints.join(", ")}; at most ${count(about.context_length)} tokens</span>` : null}${waiting ? html` <span class="muted">${waiting} waiting</span>` : null}
      ${state === "failed" && html`<span class="problem">${reason}</span>`}</p>`;
  }

  function Progress({ question, status, name }) {
    if (!question.running) return question.error ? html`<p class=${question.error === "Cancelled." ? "muted" : "problem"} role="alert">${question.error}</p>` : null;
    const mine = status && status.job && status.job.name === question.job && status.job.of > 1;
    return html`<div class="progress"><progress aria-label=${name} max=${mine ? status.job.of : null} value=${mine ? status.job.done : null}></progress>
      <span class="muted" role="status">${status && status.state === "loading" ? "loading the model" : mine ? `${status.job.done} of ${status.job.of} tokens` : "working"}</span>
      <button type="button" class="button" onClick=${question.cancel}>Cancel</button></div>`;
  }

  const rowLabel = (model, latent) => (model.rowOf.has(latent) ? html`<span class="names"><${S.tokenViews.Label} model=${model} row=${model.rowOf.get(latent)} /></span>` : html`<span class="nameless">not in this atlas</span>`);

  // ---- which latents fire

  // Latents of the whole text: how often each fires, where most.
  function summed(tokens) {
    const found = new Map();
    tokens.forEach((token, position) => token.latents.forEach((row) => {
      const old = found.get(row.latent) || { latent: row.latent, n: 0, best: null, at: 0, writes: 0, loss: 0 };
      old.n += 1;
      old.writes += row.writes;
      old.loss += row.loss_change || 0;
      if (!old.best || Math.abs(row.act) > Math.abs(old.best.act)) { old.best = row; old.at = position; } // below 0, too: PCA, AbsTopK
      found.set(row.latent, old);
    }));
    return [...found.values()].sort((a, b) => (b.best.share_of_max || 0) - (a.best.share_of_max || 0) || b.writes - a.writes);
  }

  // `start`: the token and the latent that the address names, for the first answer; `remember` writes them there.
  function Fired({ model, answer, steer, start, remember }) {
    const { tokens, ablated } = answer;
    const pieces = useMemo(() => S.foreignTokens(tokens), [answer]);
    const wanted = (text) => (/^\d{1,9}$/.test(text || "") ? Number(text) : null);
    const [picked, setPicked] = useState(wanted(start.at) < tokens.length ? wanted(start.at) : null); // a token
    const [lit, setLit] = useState(wanted(start.lit)); // a latent
    const first = useRef(answer);
    useEffect(() => { if (first.current !== answer) { first.current = null; setPicked(null); setLit(null); } }, [answer]);
    const pick = (i) => { setPicked(i); remember({ at: i }); };
    const light = (latent) => { setLit(latent); remember({ lit: latent }); };
    const all = useMemo(() => summed(tokens), [answer]);
    const share = (token) => {
      const rows = lit === null ? token.latents : token.latents.filter(({ latent }) => latent === lit);
      return rows.reduce((most, row) => Math.max(most, row.share_of_max === null || row.share_of_max === undefined ? 0.5 : row.share_of_max), 0);
    };
    const at = picked === null ? null : tokens[picked];
    const said = (token, i) => `${token.text.trim() || "blank"}: ${token.kept ? `${token.n_active} latents fire` : "not looked at"}`;
    return html`<div class="fired">
      <div class="try-text" role="group" aria-label="Tokens" dir="auto">${tokens.map((token, i) => html`<button type="button" key=${i} class=${"tok" + (share(token) > 0 ? " on" : "") + (i === picked ? " picked" : "") + (token.kept ? "" : " other")} aria-pressed=${i === picked} aria-label=${said(token, i)}
        style=${share(token) > 0 ? { "--a": (0.1 + 0.9 * Math.min(1, share(token))).toFixed(3) } : null} onMouseEnter=${() => setPicked(i)} onFocus=${() => pick(i)} onClick=${() => pick(i)}><${S.tokenViews.Runs} parts=${pieces[i].parts} breaks /></button>`)}</div>
      <p class="muted">${lit === null ? "A token is shaded by the latent that is nearest to its own maximum there." : html`Shaded by latent ${lit}. <button type="button" class="link" onClick=${() => light(null)}>Shade by all</button>`}</p>
      <div class="fired-columns">
        <section aria-label="Latents at the token"><h3>${at ? html`At <span class="chip"><${S.tokenViews.Runs} parts=${pieces[picked].parts} /></span>` : "At a token"} <span class="muted">${at ? (at.kept ? `${at.n_active} fire${at.loss_of_next !== null && at.loss_of_next !== undefined ? `, loss of the next token ${number(at.loss_of_next)}` : ""}` : "the dictionary does not look here") : "point at one, or go through them with Tab"}</span></h3>
          ${at && html`<ol class="fires">${at.latents.map((row) => html`<li key=${row.latent}><a href=${S.route.format("latent", row.latent, {})}>${row.latent}</a>${rowLabel(model, row.latent)}
            <span class="figures">${number(row.act)}${row.quantile !== null && row.quantile !== undefined ? html` <span class="muted" title="share of its activations in the atlas that are smaller">over ${percent(row.quantile, 3)}</span>` : null}${ablated && row.loss_change !== null ? html` <span class=${row.loss_change > 0 ? "helps" : "muted"} title="change of the next token's loss without it">${row.loss_change > 0 ? "+" : ""}${number(row.loss_change)}</span>` : null}</span></li>`)}</ol>`}</section>
        <section aria-label="Latents on the text"><h3>On the text <span class="muted">${all.length} latents, those nearest to their maximum first</span></h3>
          <ol class="fires">${all.slice(0, 40).map((row) => html`<li key=${row.latent} class=${lit === row.latent ? "lit" : ""}><a href=${S.route.format("latent", row.latent, {})}>${row.latent}</a>${rowLabel(model, row.latent)}
            <span class="figures">${row.n}× <span class="muted">up to ${number(row.best.act)}${row.best.share_of_max ? `, ${Math.round(row.best.share_of_max * 100)}% of its maximum` : ""}</span></span>
            <span class="acts"><button type="button" class="link" aria-pressed=${lit === row.latent} aria-label=${`Shade by latent ${row.latent}`} onClick=${() => light(lit === row.latent ? null : row.latent)}>shade</button> <button type="button" class="link" aria-label=${`Steer with latent ${row.latent}`} onClick=${() => steer(row.latent)}>steer</button></span></li>`)}</ol></section>
      </div></div>`;
  }

  // ---- steering

  function parseSteer(text) {
    return (text || "").split(",").map((part) => /^(\d{1,9}):(-?[\d.]{1,8})$/.exec(part)).filter(Boolean).map(([, latent, strength]) => ({ latent: Number(latent), strength: Math.max(-20, Math.min(20, Number(strength) || 0)) })).slice(0, 20);
  }

  function Written({ title, written, note }) {
    return html`<section class="written"><h3>${title} <span class="muted">${note}</span></h3>
      <p class="try-text" dir="auto">${S.foreignTokens(written.tokens).map((piece, i) => html`<span key=${i}><${S.tokenViews.Runs} parts=${piece.parts} breaks /></span>`)}</p>
      <p class="muted">perplexity to the unsteered model ${number(written.perplexity)}</p></section>`;
  }

  function Page({ model, query }) {
    const session = S.session;
    const fired = useQuestion("prompt"), written = useQuestion("generate");
    const status = useLive(fired.running || written.running, Boolean(session && session.live));
    const [text, setText] = useState(query.text || "");
    const [perToken, setPerToken] = useState(Number(query.k) || 5);
    const [ablate, setAblate] = useState(query.loss === "1");
    const [prompt, setPrompt] = useState(query.prompt || "");
    const [steering, setSteering] = useState(parseSteer(query.steer));
    const [adding, setAdding] = useState("");
    const [nTokens, setTokens] = useState(Number(query.n) || 40);
    const [temperature, setTemperature] = useState(Number(query.t) || 0);
    const [seed, setSeed] = useState(Number(query.seed) || 0);
    const asked = useRef({});
    const remember = (changes) => {
      asked.current = { ...asked.current, ...changes };
      S.route.replace(S.pageAddress("try", asked.current));
    };
    const ask = (event) => { if (event) event.preventDefault(); if (!text) return; remember({ text, k: perToken === 5 ? "" : perToken, loss: ablate ? "1" : "", at: "", lit: "" }); fired.run({ text, n_latents: perToken, ablate }); };
    const write = (event) => {
      if (event) event.preventDefault();
      if (!prompt) return;
      remember({ prompt, steer: steering.map(({ latent, strength }) => latent + ":" + strength).join(","), n: nTokens, t: temperature || "", seed: seed || "" });
      written.run({ prompt, steer: steering, n_tokens: nTokens, temperature, seed });
    };
    useEffect(() => {
      asked.current = { ...query };
      if (session && session.live && query.text) fired.run({ text: query.text, n_latents: perToken, ablate });
    }, [session]);
    const add = (latent) => { if (!steering.some((one) => one.latent === latent)) setSteering([...steering, { latent, strength: 2 }]); };
    const addTyped = (event) => { event.preventDefault(); const latent = Number(adding); if (/^\d{1,9}$/.test(adding.trim()) && model.rowOf.has(latent)) { add(latent); setAdding(""); } };
    const unknown = adding.trim() !== "" && !(/^\d{1,9}$/.test(adding.trim()) && model.rowOf.has(Number(adding)));
    if (!session) return html`<p class="empty" role="status">Asking for the model…</p>`;
    if (S.isStatic || !session.live) return html`<article class="tool"><h1>Try</h1><p class="empty">${S.isStatic ? "This is a site without a server." : "The server was started without a model."} To try texts and to steer, run <code>sememe browse ATLAS --live</code>.</p></article>`;
    const submit = (then) => (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); then(); } };
    return html`<article class="tool try"><h1>Try</h1>
      <${Status} status=${status} />
      <section aria-label="Which latents fire"><h2>Which latents fire on a text?</h2>
        <form onSubmit=${ask}><label class="wide-field"><span class="sr">Text</span><textarea name="text" rows="3" maxlength="20000" value=${text} onInput=${(e) => setText(e.target.value)} onKeyDown=${submit(ask)} placeholder="Type or paste a text" dir="auto"></textarea></label>
          <div class="tool-bar"><button class="button main" disabled=${!text}>Show latents</button>
            <label class="field"><span>latents per token</span><input type="number" name="k" min="1" max="50" value=${perToken} onChange=${(e) => setPerToken(Math.max(1, Math.min(50, Math.round(Number(e.target.value)) || 5)))} /></label>
            <label class="field check"><input type="checkbox" name="loss" checked=${ablate} onChange=${(e) => setAblate(e.target.checked)} /><span>what each does to the loss (slower)</span></label></div></form>
        <${Progress} question=${fired} status=${status} name="Latents" />
        ${fired.answer && html`<div class=${fired.running ? "stale" : ""}><${Fired} model=${model} answer=${fired.answer} start=${asked.current} remember=${remember} steer=${(latent) => { add(latent); if (!prompt) setPrompt(fired.answer.asked.text); document.getElementById("steer").scrollIntoView({ block: "start" }); }} /></div>`}
      </section>
      <section aria-label="Steer" id="steer"><h2>What does the model write with latents turned up?</h2>
        <form onSubmit=${write}><label class="wide-field"><span class="sr">Prompt</span><textarea name="prompt" rows="2" maxlength="20000" value=${prompt} onInput=${(e) => setPrompt(e.target.value)} onKeyDown=${submit(write)} placeholder="The model goes on from here" dir="auto"></textarea></label>
          <ul class="steering">${steering.map(({ latent, strength }, i) => html`<li key=${latent}><a href=${S.route.format("latent", latent, {})}>${latent}</a>${rowLabel(model, latent)}
            <input type="range" min="-10" max="10" step="0.25" value=${strength} aria-label=${`Strength of latent ${latent}`} aria-valuetext=${`${strength} times its maximum`} onInput=${(e) => setSteering(steering.map((one, j) => (j === i ? { ...one, strength: Number(e.target.value) } : one)))} />
            <output title="multiples of its largest activation in the atlas, added at every position">${strength > 0 ? "+" : ""}${number(strength)}×</output>
            <button type="button" class="link" aria-label=${`Remove latent ${latent}`} onClick=${() => setSteering(steering.filter((_, j) => j !== i))}>remove</button></li>`)}</ul>
          <div class="tool-bar"><label class="field"><span>add latent</span><input type="text" inputmode="numeric" name="latent" value=${adding} onInput=${(e) => setAdding(e.target.value)} onKeyDown=${(e) => { if (e.key === "Enter") addTyped(e); }} aria-invalid=${unknown} /></label><button type="button" class="button" onClick=${addTyped} disabled=${!adding || unknown}>Add</button>
            <label class="field"><span>tokens</span><input type="number" name="n" min="1" max="1000" value=${nTokens} onChange=${(e) => setTokens(Math.max(1, Math.min(1000, Math.round(Number(e.target.value)) || 40)))} /></label>
            <label class="field"><span>temperature</span><input type="number" name="t" min="0" max="10" step="0.1" value=${temperature} onChange=${(e) => setTemperature(Math.max(0, Math.min(10, Number(e.target.value) || 0)))} /></label>
            <label class="field"><span>seed</span><input type="number" name="seed" min="0" max="2147483647" value=${seed} onChange=${(e) => setSeed(Math.max(0, Math.min(2147483647, Math.round(Number(e.target.value)) || 0)))} /></label>
            <button class="button main" disabled=${!prompt}>Generate</button></div></form>
        <${Progress} question=${written} status=${status} name="Generation" />
        ${written.answer && html`<div class=${"side-by-side" + (written.running ? " stale" : "")}><${Written} title="Unsteered" note="as it is" written=${written.answer.unsteered} />
          ${written.answer.steered ? html`<${Written} title="Steered" note=${written.answer.added.map(({ latent, strength }) => `${latent} ${strength > 0 ? "+" : ""}${number(strength)}×`).join(", ")} written=${written.answer.steered} />` : html`<section class="written"><h3>Steered</h3><p class="empty">Add a latent, and give it a strength.</p></section>`}</div>`}
      </section>
    </article>`;
  }

  // A line for the landing page that leads here.
  S.TryBox = function () {
    const [text, setText] = useState("");
    if (!S.session || !S.session.live || S.atlas) return null;
    return html`<form class="try-box" onSubmit=${(event) => { event.preventDefault(); if (text) S.route.go(S.pageAddress("try", { text })); }}>
      <input type="text" name="try" value=${text} onInput=${(e) => setText(e.target.value)} maxlength="2000" placeholder="Which latents fire on this text?" aria-label="Which latents fire on this text?" autocomplete="off" dir="auto" /><button class="button" disabled=${!text}>Try</button></form>`;
  };

  S.firedOnText = summed;
  S.pages.try = { title: "Try", Page, when: (session) => session.live && !S.atlas };
})((window.Sememe = window.Sememe || {}));
