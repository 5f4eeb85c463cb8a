// The address is the page's state: #/?sort=max, #/latent/12?q=river&open=3, #/about.
(function (S) {
  "use strict";

  const DEFAULTS = { q: "", in: "any", status: "alive", lang: "", min: "", max: "", sort: "", dir: "", note: "", open: "", rank: "",
    cluster: "", script: "", f: "", lasso: "", color: "", view: "", at: "", mark: "" };

  function parse(hash) {
    const [path, query] = hash.replace(/^#/, "").split("?");
    const params = { ...DEFAULTS };
    for (const [key, value] of new URLSearchParams(query || "")) if (key in DEFAULTS) params[key] = value;
    const latent = /^\/latent\/(\d{1,9})$/.exec(path);
    if (latent) return { page: "latent", latent: Number(latent[1]), params };
    const text = /^\/text\/(\d{1,4})$/.exec(path);
    if (text) return { page: "text", latent: null, text: Number(text[1]), params };
    // A page of several things, as #/graph/1; #/graph is the first of them.
    const one = /^\/([a-z]+)\/(\d{1,4})$/.exec(path);
    if (one && S.pages && S.pages[one[1]] && S.pages[one[1]].many) return { page: one[1], latent: null, params, place: Number(one[2]), query: Object.fromEntries(new URLSearchParams(query || "")) };
    if (S.pages && S.pages[path.slice(1)]) return { page: path.slice(1), latent: null, params, query: Object.fromEntries(new URLSearchParams(query || "")) };
    return { page: path === "/about" ? "about" : "list", latent: null, params };
  }

  function format(page, latent, params) {
    const query = new URLSearchParams();
    for (const key of Object.keys(DEFAULTS)) {
      const value = params[key] === undefined ? DEFAULTS[key] : String(params[key]);
      if (value !== DEFAULTS[key]) query.set(key, value);
    }
    const path = page === "latent" || page === "text" ? `/${page}/${latent}` : page === "about" ? "/about" : "/";
    const text = query.toString();
    return "#" + path + (text ? "?" + text : "");
  }

  const listeners = new Set();
  const tell = () => listeners.forEach((listener) => listener(parse(location.hash)));
  window.addEventListener("hashchange", tell);

  S.route = {
    DEFAULTS,
    parse,
    format,
    current: () => parse(location.hash),
    listen: (listener) => { listeners.add(listener); return () => listeners.delete(listener); },
    go: (hash) => { location.hash = hash; },
    replace: (hash) => { history.replaceState(null, "", hash); tell(); },
    // The list's own parameters: what stays when one moves between latents.
    listParams: (params) => ({ ...params, open: "", rank: "", at: "" }),
  };
})((window.Sememe = window.Sememe || {}));
