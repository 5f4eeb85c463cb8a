// Stars, tags, notes and explanations by hand: kept beside the atlas where the server may write, else in this browser.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useEffect, useRef, useState } = preactHooks;
  const html = htm.bind(h);

  const listeners = new Set();
  const tell = () => listeners.forEach((listener) => listener());
  const isEmpty = (note) => !note.star && !(note.tags && note.tags.length) && !note.note && !note.explanation;

  // Nothing that was read is trusted to have the right shape.
  function clean(note) {
    const found = {};
    if (!note || typeof note !== "object") return found;
    if (note.star === true) found.star = true;
    if (Array.isArray(note.tags)) found.tags = [...new Set(note.tags.filter((tag) => typeof tag === "string" && tag).map((tag) => tag.slice(0, 60)))].slice(0, 30);
    for (const name of ["note", "explanation", "changed"]) if (typeof note[name] === "string" && note[name]) found[name] = note[name].slice(0, 10000);
    return found;
  }

  const VERDICTS = ["monosemantic", "unclear", "polysemantic"];
  const cleanRating = (one) => (one && typeof one === "object" && Number.isInteger(one.latent) && one.latent >= 0 && VERDICTS.includes(one.verdict) && typeof one.session === "string" && one.session
    ? { session: one.session, source: String(one.source || ""), latent: one.latent, stratum: String(one.stratum || ""), verdict: one.verdict, ...(typeof one.changed === "string" ? { changed: one.changed } : {}) } : null);

  // Whose notes a document says it holds: its fingerprints, where it has any.
  const whose = (document) => Object.fromEntries(["atlas", "dictionary"].filter((name) => document[name]).map((name) => [name, String(document[name])]));
  const ratingKey = (one) => JSON.stringify([one.session, one.source || "", one.latent]);

  class Notes {
    constructor() {
      this.latents = new Map();
      this.ratings = [];
      // What a server that only reads knows: what is taken away of it here must be remembered, or it would come back.
      this.theirs = { latents: new Set(), ratings: new Set() };
      this.emptied = new Set(); // latents
      this.withdrawn = new Map(); // ratings, by key
      this.write = false; // whether the server keeps them
      this.ready = false;
      this.problem = null;
      this.about = {};
      this.model = null;
      this.sending = Promise.resolve();
    }

    async load() {
      const session = await S.whenSession();
      const mine = session.atlases[S.atlas] || {};
      this.about = { atlas: mine.fingerprint || "", dictionary: mine.dictionary || "" };
      this.key = "sememe-notes " + (mine.dictionary || mine.fingerprint || "");
      if (!S.isStatic) {
        try {
          const found = await S.ask("notes", S.atlas);
          this.write = found.write === true;
          this.take(found);
        } catch (error) { this.problem = error.message; }
      }
      if (!this.write) {
        this.theirs = { latents: new Set(this.latents.keys()), ratings: new Set(this.ratings.map(ratingKey)) };
        try { this.take(JSON.parse(localStorage.getItem(this.key) || "{}")); } catch (error) { this.problem = "This browser keeps nothing for this page: export before you leave."; }
        window.addEventListener("storage", (event) => { if (event.key === this.key && event.newValue) { try { this.latents.clear(); this.ratings = []; this.emptied.clear(); this.withdrawn.clear(); this.take(JSON.parse(event.newValue)); this.changed(); } catch (error) { /* not ours */ } } });
      }
      this.ready = true;
      this.changed();
    }

    take(document) {
      for (const [latent, note] of Object.entries(document.latents || {})) {
        const found = clean(note);
        if (!/^\d{1,9}$/.test(latent)) continue;
        this.put(Number(latent), found);
      }
      for (const rating of (Array.isArray(document.ratings) ? document.ratings : []).map(cleanRating)) if (rating) this.setRating(rating);
      for (const one of Array.isArray(document.withdrawn) ? document.withdrawn : []) if (one && typeof one === "object") this.setRating({ session: String(one.session), source: String(one.source || ""), latent: one.latent, verdict: null });
    }

    put(latent, note) {
      const empty = isEmpty(note);
      if (empty) this.latents.delete(latent); else this.latents.set(latent, note);
      if (empty && this.theirs.latents.has(latent)) this.emptied.add(latent); else this.emptied.delete(latent);
    }

    attach(model) { this.model = model; this.changed(); }

    changed() {
      const { model } = this;
      if (model) {
        model.byHand = new Map();
        for (const [latent, { explanation }] of this.latents) if (explanation && model.rowOf.has(latent)) model.byHand.set(model.rowOf.get(latent), explanation);
        model.explanations = [...new Set([...Object.keys(model.index.explanation).map(Number), ...model.byHand.keys()])];
        model.wordKeys.label = null;
        model.lowerExplanations = null;
        model.last = null;
      }
      tell();
      if (S.redraw) S.redraw();
    }

    document() {
      return { kind: "notes", format_version: 1, ...this.about, latents: Object.fromEntries([...this.latents].sort(([a], [b]) => a - b)), ratings: this.ratings };
    }

    // What this browser keeps: with what was taken away of the server's.
    kept() {
      const found = this.document();
      for (const latent of this.emptied) found.latents[latent] = {};
      return this.withdrawn.size ? { ...found, withdrawn: [...this.withdrawn.values()] } : found;
    }

    get(latent) { return this.latents.get(latent) || {}; }

    // One request after another, so that the last that was typed is the last that is kept.
    keep(request) {
      if (this.write) {
        this.sending = this.sending.then(request).then(() => { this.problem = null; tell(); }, (error) => { this.problem = error.message; tell(); });
        return this.sending;
      }
      try { localStorage.setItem(this.key, JSON.stringify(this.kept())); this.problem = null; } catch (error) { this.problem = "This browser keeps nothing for this page: export before you leave."; }
      return Promise.resolve();
    }

    set(latent, changes) {
      const note = clean({ ...this.get(latent), ...changes });
      if (!this.write) note.changed = new Date().toISOString();
      this.put(latent, note);
      const { changed, ...body } = note;
      this.keep(() => S.send("PUT", "notes/" + latent, body, S.atlas));
      this.changed();
    }

    setRating(rating) {
      this.ratings = this.ratings.filter((one) => one.session !== rating.session || one.source !== rating.source || one.latent !== rating.latent);
      if (rating.verdict !== null) this.ratings.push(rating);
      const key = ratingKey(rating);
      if (rating.verdict === null && this.theirs.ratings.has(key)) this.withdrawn.set(key, { session: rating.session, source: rating.source || "", latent: rating.latent }); else this.withdrawn.delete(key);
    }

    rate(rating) {
      this.setRating(rating);
      this.keep(() => S.send("PUT", "ratings", rating, S.atlas));
      tell();
    }

    // What the server checks as well: numbers mean nothing in another dictionary.
    check(document) {
      const said = Object.values(whose(document)), mine = Object.values(this.about).filter(Boolean);
      if (said.length && !said.some((value) => mine.includes(value))) throw new Error(`Notes to import must be of this atlas's dictionary (${(this.about.dictionary || "a null, which has none").slice(0, 16)}), got notes of ${String(document.dictionary || document.atlas).slice(0, 16)}. Open the atlas that they were exported from, or choose another file.`);
      const { model } = this;
      const stranger = model && Object.keys(document.latents || {}).find((latent) => !model.rowOf.has(Number(latent)) && !this.latents.has(Number(latent)));
      if (stranger) throw new Error(`A latent of notes must be one of the atlas's, got latent ${String(stranger).slice(0, 20)}, which it does not have. Open the atlas that they were exported from, or leave it out.`);
    }

    async import(document) {
      if (!document || document.kind !== "notes") throw new Error(`A file to import must be exported notes, got ${document && typeof document === "object" ? "kind " + String(document.kind).slice(0, 40) : typeof document}. Choose another file.`);
      this.check(document);
      if (this.write) this.take(await S.send("POST", "notes", { ...whose(document), kind: "notes", latents: document.latents || {}, ratings: document.ratings || [] }, S.atlas));
      else { this.take(document); this.keep(); }
      this.changed();
    }

    tags() { return [...new Set([...this.latents.values()].flatMap(({ tags }) => tags || []))].sort(); }

    // For the list: which latents to show. "" all (null), "starred", "noted", "tag:NAME".
    test(value) {
      if (!value) return null;
      if (value === "starred") return (latent) => this.get(latent).star === true;
      if (value === "noted") return (latent) => this.latents.has(latent);
      if (value.startsWith("tag:")) { const tag = value.slice(4); return (latent) => (this.get(latent).tags || []).includes(tag); }
      return null;
    }
    options() { return [["", "all"], ["starred", "starred"], ["noted", "noted"], ...this.tags().map((tag) => ["tag:" + tag, S.honest(tag)])]; }
    place() { return this.write ? "kept beside the atlas" : "kept in this browser"; }
  }

  S.notes = new Notes();
  S.useNotes = () => {
    const [, redraw] = useState(0);
    useEffect(() => { const listener = () => redraw((n) => n + 1); listeners.add(listener); return () => listeners.delete(listener); }, []);
    return S.notes;
  };
  S.notes.load();

  // A text box that is saved a moment after the last letter, and at once when it is left.
  function Kept({ value, save, area, ...rest }) {
    const [text, setText] = useState(value), timer = useRef(null), last = useRef(value);
    useEffect(() => { if (value !== last.current && timer.current === null) { last.current = value; setText(value); } }, [value]);
    const now = (typed) => { clearTimeout(timer.current); timer.current = null; if (typed !== last.current) { last.current = typed; save(typed); } };
    const latest = useRef(text);
    latest.current = text;
    useEffect(() => () => { if (timer.current !== null) now(latest.current); }, []);
    const input = (event) => { const typed = event.target.value; setText(typed); clearTimeout(timer.current); timer.current = setTimeout(() => now(typed), 500); };
    return h(area ? "textarea" : "input", { ...rest, value: text, onInput: input, onBlur: (event) => now(event.target.value), dir: "auto" });
  }

  S.Notes = function ({ latent }) {
    const notes = S.useNotes();
    const note = notes.get(latent);
    const [tag, setTag] = useState("");
    const [open, setOpen] = useState(null);
    useEffect(() => {
      const keys = (event) => {
        if (event.key !== "s" || event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
        event.preventDefault();
        notes.set(latent, { star: !notes.get(latent).star });
      };
      window.addEventListener("keydown", keys);
      return () => window.removeEventListener("keydown", keys);
    }, [latent]);
    if (!notes.ready) return html`<div class="notes" aria-busy="true"></div>`;
    const tags = note.tags || [];
    const shown = open === null ? Boolean(note.note || note.explanation) : open;
    const add = (event) => {
      event.preventDefault();
      const value = tag.trim().slice(0, 60);
      const now = notes.get(latent).tags || [];
      if (value && !now.includes(value)) notes.set(latent, { tags: [...now, value] });
      setTag("");
    };
    return html`<section class="notes" aria-label="Notes">
      <div class="notes-line">
        <button type="button" class=${"star" + (note.star ? " on" : "")} aria-pressed=${note.star === true} title="Star (s)" onClick=${() => notes.set(latent, { star: !note.star })}><span aria-hidden="true">${note.star ? "★" : "☆"}</span> ${note.star ? "Starred" : "Star"}</button>
        ${tags.map((one) => html`<span key=${one} class="tag"><a href=${S.pageAddress("notes", { show: "tag:" + one })} dir="auto">${S.honest(one)}</a><button type="button" aria-label=${"Remove the tag " + S.honest(one)} onClick=${() => notes.set(latent, { tags: (notes.get(latent).tags || []).filter((other) => other !== one) })}>×</button></span>`)}
        <form class="add-tag" onSubmit=${add}><input type="text" name="tag" value=${tag} onInput=${(e) => setTag(e.target.value)} maxlength="60" placeholder="Add a tag" aria-label="Add a tag" autocomplete="off" list="known-tags" /><datalist id="known-tags">${notes.tags().filter((one) => !tags.includes(one)).map((one) => html`<option key=${one} value=${one}></option>`)}</datalist></form>
        <button type="button" class="link" aria-expanded=${shown} onClick=${() => setOpen(!shown)}>${shown ? "Hide the note" : note.note || note.explanation ? "Show the note" : "Write a note"}</button>
        <span class="kept muted" role="status">${notes.problem ? "" : isEmpty(note) ? "" : notes.place()}</span>
      </div>
      ${shown && html`<div class="notes-text">
        <label>What it stands for, in your words<${Kept} key=${"e" + latent} name="explanation" value=${note.explanation || ""} save=${(explanation) => notes.set(latent, { explanation })} maxlength="10000" placeholder="Shown as its name instead of any other" autocomplete="off" /></label>
        <label>Note<${Kept} area key=${"n" + latent} name="note" rows="3" value=${note.note || ""} save=${(text) => notes.set(latent, { note: text })} maxlength="10000" /></label>
      </div>`}
      ${notes.problem && html`<p class="problem" role="alert">${notes.problem}</p>`}
    </section>`;
  };

  S.NotesFiles = function ({ name }) {
    const notes = S.useNotes();
    const [said, setSaid] = useState(null);
    const file = async (event) => {
      const [chosen] = event.target.files;
      event.target.value = "";
      if (!chosen) return;
      try { await notes.import(await S.readFile(chosen)); setSaid({ text: `Imported; there are ${notes.latents.size} latents with notes and ${notes.ratings.length} ratings now.` }); } catch (error) { setSaid({ text: error.message, problem: true }); }
    };
    return html`<div class="files"><button type="button" class="button" onClick=${() => S.keepFile(name, notes.document())}>Export as JSON</button>
      <label class="button">Import<input type="file" class="sr" accept=".json,application/json" onChange=${file} /></label>
      <span class=${said && said.problem ? "problem" : "muted"} role="status">${said ? said.text : notes.place()}</span></div>`;
  };

  function Page({ model, query }) {
    const notes = S.useNotes();
    if (!notes.ready) return html`<p class="empty" role="status">Reading the notes…</p>`;
    const value = query.show || "";
    const test = notes.test(value) || (() => true);
    const found = [...notes.latents.keys()].filter((latent) => test(latent)).sort((a, b) => a - b);
    return html`<article class="tool"><h1>Notes</h1>
      <p class="lead">Stars, tags, notes and explanations by hand. Open a latent to write one; <kbd>s</kbd> stars it.</p>
      <div class="tool-bar"><label class="field"><span>show</span><select name="show" onChange=${(e) => S.route.replace(S.pageAddress("notes", { show: e.target.value }))}>
        ${notes.options().map(([option, text]) => html`<option key=${option} value=${option} selected=${option === value}>${text}</option>`)}</select></label>
        <${S.NotesFiles} name="notes.json" /></div>
      ${notes.problem && html`<p class="problem" role="alert">${notes.problem}</p>`}
      ${found.length === 0 ? html`<p class="empty">${notes.latents.size ? "No latent has that." : "Nothing yet."}</p>` : html`<ul class="noted">${found.map((latent) => {
        const note = notes.get(latent), row = model.rowOf.get(latent);
        return html`<li key=${latent}><div class="noted-head"><button type="button" class=${"star" + (note.star ? " on" : "")} aria-pressed=${note.star === true} aria-label=${"Star latent " + latent} onClick=${() => notes.set(latent, { star: !note.star })}>${note.star ? "★" : "☆"}</button>
          <a href=${S.route.format("latent", latent, {})}>Latent ${latent}</a> <span class="names">${row === undefined ? html`<span class="nameless">not in this atlas</span>` : html`<${S.tokenViews.Label} model=${model} row=${row} />`}</span></div>
          ${note.tags && html`<p class="tags">${note.tags.map((tag) => html`<span key=${tag} class="tag" dir="auto">${S.honest(tag)}</span>`)}</p>`}
          ${note.note && html`<p class="note-text" dir="auto">${S.honest(note.note)}</p>`}</li>`;
      })}</ul>`}
    </article>`;
  }

  S.pages.notes = { title: "Notes", Page };
})((window.Sememe = window.Sememe || {}));
