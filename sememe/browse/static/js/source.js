// Where the page's data comes from: the server's JSON, or scripts beside the page. The rest of the page cannot tell.
(function (S) {
  "use strict";

  // A map that forgets what was asked for longest ago.
  class Recent {
    constructor(capacity) { this.capacity = capacity; this.map = new Map(); }
    get(key) {
      const value = this.map.get(key);
      if (value !== undefined) { this.map.delete(key); this.map.set(key, value); }
      return value;
    }
    set(key, value) {
      this.map.set(key, value);
      if (this.map.size > this.capacity) this.map.delete(this.map.keys().next().value);
      return value;
    }
    delete(key) { this.map.delete(key); }
    once(key, make) {
      const known = this.get(key);
      if (known) return known;
      const promise = make();
      promise.catch(() => this.delete(key)); // a failed request may be tried again
      return this.set(key, promise);
    }
  }

  // ---- static: data scripts call Sememe.shard(name, packed)
  const arriving = new Map();

  async function inflate(packed) {
    const stream = new DecompressionStream("gzip"), into = stream.writable.getWriter();
    into.write(bytesOf(packed)).catch(() => undefined); // what is wrong with them, the reader is told, too
    into.close().catch(() => undefined);
    return new Response(stream.readable).json();
  }

  function bytesOf(packed) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(packed);
    const binary = atob(packed), bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return bytes;
  }

  S.shard = (name, packed) => {
    const waiting = arriving.get(name);
    if (waiting) waiting.resolve(packed);
  };

  function loadScript(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const done = () => { arriving.delete(name); script.remove(); };
      arriving.set(name, { resolve: (packed) => { done(); resolve(inflate(packed)); } });
      script.onerror = () => { done(); reject(new Error("data/" + name + ".js could not be loaded. Copy the whole folder, or export the site again.")); };
      script.onload = () => { if (arriving.has(name)) { done(); reject(new Error("data/" + name + ".js holds no data. Export the site again.")); } };
      script.src = "data/" + name + ".js";
      document.head.appendChild(script);
    });
  }

  // Of several atlases, the first has the plain names; the others have a folder each.
  const named = (number, name) => (number ? "atlas-" + number + "/" + name : name);

  class StaticSource {
    constructor(number = 0) {
      this.number = number;
      this.shards = new Recent(160);
      this.whole = new Recent(8);
    }
    overview() { return this.whole.once("overview", () => loadScript(named(this.number, "overview"))); }
    index() { return this.whole.once("index", () => loadScript(named(this.number, "index"))); }
    tokens() { return this.whole.once("tokens", () => loadScript(named(this.number, "tokens"))); }
    search() { return this.whole.once("search", () => loadScript(named(this.number, "search"))); }
    session() { return this.whole.once("session", () => loadScript("session")); }
    compare(other) { return this.whole.once("compare" + other, () => loadScript(`compare-${this.number}-${other}`)); }
    details() { return this.whole.once("details", () => loadScript(named(this.number, "details"))); }
    text(place) { return this.shard("texts", place); }
    graph(place) { return this.shard("graphs", place); }
    shard(folder, number) {
      const name = folder + "/" + String(number).padStart(5, "0");
      return this.shards.once(name, () => loadScript(named(this.number, name)));
    }
    async latent(id, row) {
      const { shards } = await this.overview();
      const shard = await this.shard("latents", Math.floor(row / shards.latents_per_shard));
      const found = shard.latents.find((latent) => latent.id === id);
      if (!found) throw new Error("There is no latent " + id + " in its data script. Export the site again.");
      return found;
    }
    async contexts(ids) {
      const { shards } = await this.overview();
      if (shards.context_ids && !this.placeOfContext)
        this.placeOfContext = new Map(shards.context_ids.map((id, place) => [id, place]));
      const place = (id) => (this.placeOfContext ? this.placeOfContext.get(id) : id);
      const numbers = new Set(ids.map((id) => Math.floor(place(id) / shards.contexts_per_shard)));
      const found = await Promise.all(Array.from(numbers, (number) => this.shard("contexts", number)));
      return gather(found, ids);
    }
  }

  // ---- served
  async function request(path, number, options) {
    let response;
    if (number) path += (path.includes("?") ? "&" : "?") + "atlas=" + number;
    try { response = await fetch("api/" + path, options); } catch (error) {
      throw new Error("The server does not answer. Start `sememe browse` again, then reload this page.");
    }
    const payload = await response.json();
    if (!response.ok) throw new Error(payload.error || response.statusText);
    return payload;
  }

  class ServedSource {
    constructor(number = 0) {
      this.number = number;
      this.whole = new Recent(8);
      this.latents = new Recent(300);
      this.known = new Recent(4000);
    }
    overview() { return this.whole.once("overview", () => request("overview", this.number)); }
    index() { return this.whole.once("index", () => request("index", this.number)); }
    tokens() { return this.whole.once("tokens", () => request("tokens", this.number)); }
    search() { return this.whole.once("search", () => request("search", this.number)); }
    session() { return this.whole.once("session", () => request("session")); }
    compare(other) { return this.whole.once("compare" + other, () => request("compare?with=" + other, this.number)); }
    latent(id) { return this.latents.once(id, () => request("latents/" + id, this.number)); }
    details() { return this.whole.once("details", () => request("details", this.number)); }
    embeddings() { return this.whole.once("embeddings", () => request("embeddings", this.number)); }
    text(place) { return this.whole.once("text " + place, () => request("texts/" + place, this.number)); }
    graph(place) { return this.whole.once("graph " + place, () => request("graphs/" + place, this.number)); }
    async contexts(ids) {
      const missing = ids.filter((id) => !this.known.get(id));
      for (let start = 0; start < missing.length; start += 200) {
        const batch = missing.slice(start, start + 200);
        const promise = request("contexts?ids=" + batch.join(","), this.number);
        for (const id of batch) this.known.once(id, () => promise);
      }
      return gather(await Promise.all(ids.map((id) => this.known.get(id))), ids);
    }
  }

  function gather(payloads, ids) {
    const contexts = new Map(), documents = new Map();
    for (const payload of new Set(payloads)) {
      for (const [id, document] of Object.entries(payload.documents)) documents.set(Number(id), document);
      for (const id of ids) if (payload.contexts[id]) contexts.set(id, payload.contexts[id]);
    }
    return { contexts, documents };
  }

  S.isStatic = document.documentElement.dataset.mode === "static";
  const sources = new Map();
  S.sourceOf = (number) => {
    if (!sources.has(number)) sources.set(number, S.isStatic ? new StaticSource(number) : new ServedSource(number));
    return sources.get(number);
  };
  // Asks the server for something that a static site cannot do: PUT a note, POST a question to the model.
  S.send = (method, path, body, number) => request(path, number, { method, headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  S.ask = request;
  S.atlas = Number(new URLSearchParams(location.search).get("atlas")) || 0; // which one the address asks for
  S.source = S.sourceOf(S.atlas);
  // What every page needs is asked for before the page's other scripts run; whoever asks later gets the same promise.
  for (const name of ["overview", "index", "tokens", "session"]) S.source[name]().catch(() => undefined);
})((window.Sememe = window.Sememe || {}));
