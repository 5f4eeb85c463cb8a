// The frame: header, overview, about, and which page the address asks for.
(function (S) {
  "use strict";
  const { h, render } = preact;
  const { useEffect, useState } = preactHooks;
  const html = htm.bind(h);
  const { count } = S.charts;
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
      <p class="keys"><kbd>←</kbd> <kbd>→</kbd> previous and next latent in the list's order; <kbd>Esc</kbd> back to the list; <kbd>/</kbd> search. <kbd>Tab</kbd> comes to each example's strongest token; there <kbd>←</kbd> <kbd>→</kbd> <kbd>Home</kbd> <kbd>End</kbd> move from token to token and show what is known of it.</p>
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
      <${S.Tools} overview=${overview} /><a class="about-link" href="#/about">About</a></header>`;
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

  // The rest of the latents' figures, for the map and for what sorts or filters by them.
  S.needDetails = (model) => {
    if (!model || model.details || model.asking) return;
    model.asking = true;
    S.source.details().then((payload) => { model.setDetails(payload); S.redraw(); }, (error) => { model.withoutDetails = error.message; S.redraw(); });
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
    useEffect(() => { if (model && model.needsDetails(address.params)) S.needDetails(model); }, [model, address]);
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
      document.title = [address.page === "latent" ? `Latent ${address.latent}${label}` : address.page === "about" ? "About" : address.page === "text" ? "Text" : S.pages[address.page] ? S.pages[address.page].title : "", name, "Sememe"].filter(Boolean).join(" – ");
    }, [address, overview, model]);
    if (error) return html`<${Header} /><main class="failed"><h1>This atlas cannot be shown</h1><p class="problem" role="alert">${error.message}</p></main>`;
    if (!overview || !S.session) return html`<${Header} /><main aria-busy="true"></main>`;
    let body;
    if (S.pages[address.page]) body = model ? html`<${S.pages[address.page].Page} model=${model} overview=${overview} query=${address.query} place=${address.place || 0} />` : html`<p class="empty" role="status">Reading the latents…</p>`;
    else if (address.page === "about") body = html`<${About} overview=${overview} />`;
    else if (address.page === "text") body = model ? html`<${S.exampleTexts.ChosenText} model=${model} overview=${overview} place=${address.text} params=${address.params} />` : html`<p class="empty" role="status">Reading the latents…</p>`;
    else if (address.page === "latent") body = model ? html`<${S.latentViews.Latent} model=${model} overview=${overview} id=${address.latent} params=${address.params} />` : html`<p class="empty" role="status">Reading the latents…</p>`;
    else body = html`<h1 class="sr">Latents of ${overview.dictionary.name || "this dictionary"}</h1><${S.landing.Overview} overview=${overview} model=${model} params=${address.params} /><${S.TryBox} /><${S.listViews.List} model=${model} overview=${overview} params=${address.params} />`;
    return html`<${Header} overview=${overview} /><main class=${"page-" + address.page}>${body}</main><${Footer} overview=${overview} />`;
  }

  render(html`<${App} />`, document.getElementById("app"));
})((window.Sememe = window.Sememe || {}));
