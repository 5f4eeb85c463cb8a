// The page of a graph: what feeds what on a prompt. Its state is the address: what is shown, pinned and grouped.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useEffect, useLayoutEffect, useMemo, useRef, useState } = preactHooks;
  const html = htm.bind(h);
  const { number, count, percent, useWidth } = S.charts;
  const { MARGIN, frameOf, draw, drawFocus, svgOf, inksOf, Subgraph } = S.graphDrawing;

  const HEIGHT = 560;
  const REACH = 13; // pixels around the pointer
  const FEW = 1500; // edges drawn while one moves
  const FIRST = { nodes: 250, edges: 900 };
  const WHOLE = (layout) => ({ x: layout.width / 2, y: layout.height / 2, zoom: 1 });

  const saved = (name, text, type) => {
    const url = URL.createObjectURL(new Blob([text], { type }));
    const link = document.createElement("a");
    link.href = url;
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  };

  // The page of a latent, where an atlas of its dictionary is shown as well.
  function latentAddress(graph, i) {
    const dictionary = graph.payload.dictionaries[graph.nodes.dictionary[i]];
    const place = dictionary && S.session ? S.session.atlases.findIndex((atlas) => atlas.dictionary && atlas.dictionary === dictionary.fingerprint) : -1;
    if (place < 0) return null;
    return (place === S.atlas ? "" : (location.pathname || "") + (place ? "?atlas=" + place : "")) + S.route.format("latent", graph.nodes.latent[i], {});
  }

  function Name({ graph, i }) {
    const address = graph.nodes.kind[i] === "latent" ? latentAddress(graph, i) : null;
    return address ? html`<a href=${address}>${graph.name(i)}</a>` : html`<span>${graph.name(i)}</span>`;
  }

  function Canvas({ graph, layout, shown, pinned, focus, setFocus, toggle, chosen }) {
    const [box, width] = useWidth();
    const base = useRef(null), top = useRef(null), live = useRef({ view: WHOLE(layout), drag: null, frame: 0 });
    const [hover, setHover] = useState(null);
    const [, again] = useState(0);
    const dark = S.useMedia("(prefers-color-scheme: dark)");
    const frame = () => frameOf(layout, live.current.view, width, HEIGHT);
    useLayoutEffect(() => { live.current.view = WHOLE(layout); setHover(null); }, [layout.width, layout.height]);
    const paint = (few) => { if (base.current && width) draw(base.current, graph, layout, shown, frame(), pinned, few); };
    const paintFocus = () => { if (top.current && width) drawFocus(top.current, graph, layout, shown, frame(), hover === null ? focus : hover); };
    useEffect(() => { paint(0); }, [graph, layout, shown, pinned, width, dark]);
    useEffect(() => { paintFocus(); });
    const moved = (few) => {
      cancelAnimationFrame(live.current.frame);
      live.current.frame = requestAnimationFrame(() => { paint(few); paintFocus(); });
    };
    useEffect(() => () => cancelAnimationFrame(live.current.frame), []);

    const nearest = (px, py) => {
      const f = frame();
      let best = null, distance = REACH * REACH;
      for (const i of shown.list) {
        const d = (f.x(layout.x[i]) - px) ** 2 + (f.y(layout.y[i]) - py) ** 2;
        if (d < distance) { distance = d; best = i; }
      }
      return best;
    };
    const at = (event) => { const area = top.current.getBoundingClientRect(); return [event.clientX - area.left, event.clientY - area.top]; };
    const zoomBy = (factor, px = width / 2, py = HEIGHT / 2) => {
      const f = frame(), { view } = live.current, mx = f.backX(px), my = f.backY(py), zoom = Math.min(40, Math.max(1, view.zoom * factor));
      live.current.view = { ...view, zoom };
      const g = frame();
      live.current.view = zoom === 1 ? WHOLE(layout) : { x: view.x + mx - g.backX(px), y: view.y + my - g.backY(py), zoom };
      moved(0);
    };
    const down = (event) => {
      if (event.button !== 0) return;
      const [px, py] = at(event);
      live.current.drag = { px, py, view: live.current.view, moved: false };
      if (event.pointerType !== "touch") top.current.setPointerCapture(event.pointerId);
    };
    const move = (event) => {
      const [px, py] = at(event), { drag } = live.current;
      if (!drag) { const found = nearest(px, py); if (found !== hover) setHover(found); return; }
      if (Math.hypot(px - drag.px, py - drag.py) > 4) drag.moved = true;
      if (drag.moved) { const f = frame(); live.current.view = { ...drag.view, x: drag.view.x - (px - drag.px) / f.kx, y: drag.view.y - (py - drag.py) / f.ky }; setHover(null); moved(FEW); }
    };
    const up = (event) => {
      const { drag } = live.current;
      live.current.drag = null;
      if (drag && drag.moved) moved(0);
      else if (drag) { const found = nearest(...at(event)); if (found !== null) { setFocus(found); toggle(found); } else setFocus(null); }
    };
    useEffect(() => {
      const element = top.current;
      const wheel = (event) => { // scrolls the page, unless Ctrl is held or the graph was clicked into
        if (!(event.ctrlKey || event.metaKey || document.activeElement === element)) return;
        event.preventDefault();
        zoomBy(1.0015 ** -event.deltaY, ...at(event));
      };
      element.addEventListener("wheel", wheel, { passive: false });
      return () => element.removeEventListener("wheel", wheel);
    });
    const keys = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      const done = () => { event.preventDefault(); event.stopPropagation(); };
      if (direction) {
        done();
        const f = frame(), from = focus !== null && shown.nodes[focus] ? focus : null;
        let best = null, cost = Infinity;
        for (const i of shown.list) {
          if (i === from) continue;
          const dx = f.x(layout.x[i]) - (from === null ? width / 2 : f.x(layout.x[from])), dy = f.y(layout.y[i]) - (from === null ? HEIGHT / 2 : f.y(layout.y[from]));
          const along = dx * direction[0] + dy * direction[1], across = Math.abs(dx * direction[1]) + Math.abs(dy * direction[0]);
          if (from !== null && along <= 0.5) continue;
          const price = from === null ? Math.hypot(dx, dy) : along + 2.5 * across;
          if (price < cost) { cost = price; best = i; }
        }
        if (best !== null) setFocus(best);
      } else if (event.key === "Enter" && focus !== null) { done(); toggle(focus); }
      else if (event.key === "+" || event.key === "=" || event.key === "-") { done(); zoomBy(event.key === "-" ? 1 / 1.5 : 1.5); }
      else if (event.key === "0") { done(); live.current.view = WHOLE(layout); moved(0); }
      else if (event.key === "Escape" && focus !== null) { done(); setFocus(null); }
    };
    const f = width ? frame() : null, tip = hover;
    const left = tip !== null && f ? Math.max(0, Math.min(f.x(layout.x[tip]) + 12, width - 250)) : 0, above = tip !== null && f ? f.y(layout.y[tip]) : 0;
    return html`<div><div class="graph-box" ref=${box} style=${{ height: HEIGHT + "px" }}>
        <canvas ref=${base} style=${{ height: HEIGHT + "px" }} aria-hidden="true"></canvas>
        <canvas ref=${top} style=${{ height: HEIGHT + "px" }} tabindex="0" role="application" aria-label=${`Graph of ${count(shown.list.length)} nodes by layer and token`} aria-describedby="graph-help"
          onPointerDown=${down} onPointerMove=${move} onPointerUp=${up} onPointerCancel=${() => { live.current.drag = null; }} onPointerLeave=${() => !live.current.drag && setHover(null)} onKeyDown=${keys}></canvas>
        ${tip !== null && f && html`<div class="tip graph-tip" role="tooltip" style=${{ left: left + "px", top: (above > HEIGHT - 110 ? above - 84 : above + 14) + "px" }}>
          <div><b>${graph.name(tip)}</b></div><div class="muted">at ${graph.token(graph.nodes.position[tip])} · activation ${number(graph.nodes.act[tip])} · effect ${number(graph.nodes.effect[tip])}</div></div>`}
      </div>
      <div class="map-foot"><span class="map-buttons"><button type="button" onClick=${() => zoomBy(1.5)} aria-label="Zoom in">+</button><button type="button" onClick=${() => zoomBy(1 / 1.5)} aria-label="Zoom out">−</button>
          <button type="button" onClick=${() => { live.current.view = WHOLE(layout); moved(0); again((k) => k + 1); }}>Whole graph</button></span>
        <${Legend} /></div>
      <p class="sr" id="graph-help">Arrow keys go from node to node, Enter pins one, plus and minus zoom, 0 shows the whole graph. The table below lists the same nodes.</p>
      <p class="sr" role="status">${chosen}</p></div>`;
  }

  const Legend = () => html`<ul class="graph-legend">
    <li><svg width="14" height="14" aria-hidden="true"><circle class="up" cx="7" cy="7" r="5" /></svg>raises</li>
    <li><svg width="14" height="14" aria-hidden="true"><path class="down" d="M7 1L13 7L7 13L1 7Z" /></svg>lowers</li>
    <li><svg width="14" height="14" aria-hidden="true"><circle class="hollow" cx="7" cy="7" r="5" /></svg>error</li>
    <li><svg width="14" height="14" aria-hidden="true"><rect class="fixed" x="2" y="2" width="10" height="10" /></svg>token, logit</li>
    <li><svg width="26" height="14" aria-hidden="true"><path class="line-up" d="M1 7H25" /></svg>gives</li>
    <li><svg width="26" height="14" aria-hidden="true"><path class="line-down" d="M1 7H25" /></svg>takes</li></ul>`;

  function Ends({ graph, edges, other, title, select }) {
    return html`<div><h3>${title} <span class="muted">${count(edges.length)}</span></h3>
      ${edges.length ? html`<ol class="ends">${edges.slice(0, 8).map((e) => html`<li key=${e}><button type="button" class="link" onClick=${() => select(other(e))}>${graph.name(other(e))}</button> <span class="muted">at ${graph.token(graph.nodes.position[other(e)])}</span> <span class="value">${graph.weight[e] > 0 ? "+" : ""}${number(graph.weight[e])}</span></li>`)}</ol>` : html`<p class="muted">none</p>`}</div>`;
  }

  function Details({ graph, i, pinned, toggle, select, follow }) {
    if (i === null) return html`<aside class="graph-details" aria-label="Node"><h2>No node chosen</h2><p class="muted">Point at a node to see what it is; click it to pin it. Pinned nodes stay, and make a graph of their own below.</p></aside>`;
    const { nodes } = graph;
    const facts = [["activation", nodes.act[i]], ["effect", nodes.effect[i]], ["exact effect", nodes.exact[i]], ["influence", nodes.influence[i]]].filter(([, value]) => value !== null);
    return html`<aside class="graph-details" aria-label="Node"><h2><${Name} graph=${graph} i=${i} /></h2>
      <p class="muted">${nodes.kind[i]} in ${nodes.layer[i] < 0 ? "the embedding" : "layer " + nodes.layer[i]}, at token ${nodes.position[i]} <span class="chip">${graph.token(nodes.position[i])}</span></p>
      <dl class="graph-facts">${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${name === "influence" ? percent(value) : number(value)}</dd></div>`)}</dl>
      <p class="graph-actions"><button type="button" class="button" onClick=${() => toggle(i)}>${pinned.has(i) ? "Unpin" : "Pin"}</button>
        <button type="button" class="button" onClick=${() => follow(i, "up")}>What leads here</button><button type="button" class="button" onClick=${() => follow(i, "down")}>What follows</button></p>
      <${Ends} graph=${graph} edges=${graph.ins[i]} other=${(e) => graph.from[e]} title="From" select=${select} />
      <${Ends} graph=${graph} edges=${graph.outs[i]} other=${(e) => graph.to[e]} title="To" select=${select} /></aside>`;
  }

  function Pinned({ graph, pinned, groups, change, select }) {
    const [box, width] = useWidth();
    const [ticked, setTicked] = useState([]);
    const [name, setName] = useState("");
    const keep = (list) => change({ groups: S.graphs.formatGroups(graph, list) });
    const grouped = new Set(groups.flatMap(({ members }) => members));
    const chosen = ticked.filter((i) => pinned.includes(i) && !grouped.has(i));
    const join = (event) => {
      event.preventDefault();
      if (!chosen.length || !name.trim()) return;
      keep([...groups, { name: name.trim().slice(0, 60), members: chosen }]);
      setTicked([]);
      setName("");
    };
    return html`<section class="pinned" ref=${box}><h2>Pinned <span class="muted">${count(pinned.length)}</span></h2>
      ${!pinned.length ? html`<p class="muted">Nothing is pinned.</p>` : html`<div>
        <ul class="pins">${pinned.filter((i) => !grouped.has(i)).map((i) => html`<li key=${i}><label><input type="checkbox" checked=${ticked.includes(i)} onChange=${(e) => setTicked(e.target.checked ? [...ticked, i] : ticked.filter((t) => t !== i))} /> ${graph.name(i)} <span class="muted">at ${graph.token(graph.nodes.position[i])}</span></label></li>`)}
          ${groups.map((group, k) => html`<li key=${"g" + k} class="group"><b>${S.honest(group.name)}</b> <span class="muted">${group.members.length} nodes</span> <button type="button" class="link" onClick=${() => keep(groups.filter((_, other) => other !== k))} aria-label=${"Ungroup " + S.honest(group.name)}>ungroup</button></li>`)}</ul>
        <form class="graph-actions" onSubmit=${join}><label class="field"><span>name</span><input class="group-name" value=${name} maxlength="60" onInput=${(e) => setName(e.target.value)} /></label>
          <button type="submit" class="button" disabled=${!chosen.length || !name.trim()}>Group the ${chosen.length || ""} ticked</button>
          <button type="button" class="button" onClick=${() => change({ pin: "", groups: "" })}>Unpin all</button></form>
        ${width > 0 && html`<${Subgraph} graph=${graph} pinned=${pinned} groups=${groups.map((group) => ({ ...group, name: S.honest(group.name) }))} width=${width} select=${select} />`}</div>`}</section>`;
  }

  function Table({ graph, list, pinned, toggle, select }) {
    const [most, setMost] = useState(50);
    const { nodes } = graph;
    return html`<section class="graph-table"><h2 id="graph-nodes">Nodes <span class="muted">${count(list.length)} shown: tokens and logits, then the largest effects first</span></h2>
      <div class="scroll" tabindex="0" role="region" aria-labelledby="graph-nodes"><table><thead><tr>${["node", "layer", "token", "activation", "effect", "exact effect", "influence"].map((name) => html`<th key=${name} scope="col">${name}</th>`)}<th scope="col"><span class="sr">pin</span></th></tr></thead>
        <tbody>${list.slice(0, most).map((i) => html`<tr key=${i} class=${pinned.has(i) ? "current" : ""}><th scope="row"><${Name} graph=${graph} i=${i} /></th><td>${nodes.layer[i] < 0 ? "–" : nodes.layer[i]}</td><td><span class="chip">${graph.token(nodes.position[i])}</span> ${nodes.position[i]}</td>
          <td>${number(nodes.act[i])}</td><td>${number(nodes.effect[i])}</td><td>${number(nodes.exact[i])}</td><td>${percent(nodes.influence[i])}</td>
          <td><button type="button" class="link" onClick=${() => { toggle(i); select(i); }} aria-label=${`${pinned.has(i) ? "unpin" : "pin"} ${graph.name(i)} at token ${nodes.position[i]}`}>${pinned.has(i) ? "unpin" : "pin"}</button></td></tr>`)}</tbody></table></div>
      ${list.length > most && html`<button type="button" class="link" onClick=${() => setMost(most + 100)}>Show ${count(Math.min(100, list.length - most))} more</button>`}</section>`;
  }

  function Shown({ graph, name, place, query, overview }) {
    const change = (changes) => S.route.replace(S.pageAddress("graph/" + place, { ...query, ...changes }));
    const number_ = (text, first, most) => { const value = Number(text); return text && Number.isInteger(value) && value >= 0 ? Math.min(value, most) : Math.min(first, most); };
    const free = graph.n - graph.nFixed;
    // Sliders move at once; the address follows when they rest.
    const [slid, setSlid] = useState({}), later = useRef(0);
    const slide = (changes) => { const next = { ...slid, ...changes }; setSlid(next); clearTimeout(later.current); later.current = setTimeout(() => { setSlid({}); change(next); }, 250); };
    useEffect(() => () => clearTimeout(later.current), []);
    const asked = { ...query, ...slid };
    const nNodes = number_(asked.n, FIRST.nodes, free), nEdges = number_(asked.e, FIRST.edges, graph.m);
    const of = graph.placeOf.has(query.of) ? graph.placeOf.get(query.of) : null, up = query.way !== "down";
    const list = useMemo(() => S.graphs.pins(graph, query.pin), [graph, query.pin]);
    const pinned = useMemo(() => new Set(list), [list]);
    const groups = useMemo(() => S.graphs.groups(graph, query.groups), [graph, query.groups]);
    const shown = useMemo(() => graph.shown({ nNodes, nEdges, of, up, pinned: list }), [graph, nNodes, nEdges, of, up, list]);
    const layout = useMemo(() => graph.layout(shown.nodes), [shown]);
    const [focus, setFocus] = useState(null);
    const page = useRef(null);
    const ids = (some) => some.map((i) => graph.nodes.id[i]).join(",");
    const toggle = (i) => change({ pin: ids(pinned.has(i) ? list.filter((other) => other !== i) : [...list, i]) });
    const follow = (i, way) => change({ of: graph.nodes.id[i], way: way === "down" ? "down" : "" });
    const { payload } = graph, { metric, scores, checks } = payload;
    const facts = [...Object.entries(scores), ...Object.entries(checks)].filter(([, value]) => typeof value === "number" || value === null);
    const text = payload.prompt.tokens.join("");
    return html`<div ref=${page}>
      <h1>${S.honest(name)} <span class="muted">${payload.kind === "linear" ? "what feeds what, through transcoders" : "what the metric owes to what"}</span></h1>
      <p class="graph-prompt" dir="auto">${S.honest(text)}</p>
      <p class="lead">Explains <b>${S.honest(metric.text || metric.name || "a metric")}</b>${typeof metric.clean === "number" ? `: ${number(metric.clean)}` : ""}${typeof metric.patched === "number" ? `, ${number(metric.patched)} on the other run` : ""}.</p>
      ${facts.length > 0 && html`<dl class="facts graph-scores">${facts.map(([key, value]) => html`<div key=${key}><dt>${S.honest(key.replaceAll("_", " "))}</dt><dd>${number(value)}</dd></div>`)}</dl>`}
      <div class="tool-bar">
        ${overview.graphs.length > 1 && html`<label class="field"><span>graph</span><select name="graph" value=${place} onChange=${(e) => S.route.go("#/graph/" + e.target.value)}>${overview.graphs.map((one, i) => html`<option key=${i} value=${i} selected=${i === place}>${S.honest(one.name)}</option>`)}</select></label>`}
        <label class="field graph-slider"><span>nodes</span><input type="range" min="0" max=${free} value=${nNodes} onInput=${(e) => slide({ n: e.target.value })} aria-valuetext=${`${nNodes} of ${free}`} /><output>${count(nNodes)} of ${count(free)}</output></label>
        <label class="field graph-slider"><span>edges</span><input type="range" min="0" max=${graph.m} value=${nEdges} onInput=${(e) => slide({ e: e.target.value })} aria-valuetext=${`${nEdges} of ${graph.m}`} /><output>${count(Math.min(nEdges, shown.edges.length))} of ${count(graph.m)}</output></label>
        ${list.length > 0 && html`<label class="field check"><input type="checkbox" checked=${query.n === "0"} onChange=${(e) => change({ n: e.target.checked ? "0" : "" })} /><span>pinned only</span></label>`}
        ${of !== null && html`<button type="button" class="set" onClick=${() => change({ of: "", way: "" })} aria-label="Show the whole graph again">${up ? "leads to" : "follows from"} ${graph.name(of)} ×</button>`}
        <button type="button" class="button" onClick=${() => S.keepFile("graph.json", graph.file())}>JSON</button>
        <button type="button" class="button" onClick=${() => saved("graph.svg", svgOf(graph, layout, shown, inksOf(page.current)), "image/svg+xml")}>SVG</button></div>
      <div class="graph-layout"><${Canvas} graph=${graph} layout=${layout} shown=${shown} pinned=${pinned} focus=${focus} setFocus=${setFocus} toggle=${toggle} chosen=${focus === null ? "" : `${graph.name(focus)}, at ${graph.token(graph.nodes.position[focus])}, effect ${number(graph.nodes.effect[focus])}${pinned.has(focus) ? ", pinned" : ""}`} />
        <${Details} graph=${graph} i=${focus} pinned=${pinned} toggle=${toggle} select=${setFocus} follow=${follow} /></div>
      <${Pinned} graph=${graph} pinned=${list} groups=${groups} change=${change} select=${setFocus} />
      <${Table} graph=${graph} list=${shown.list} pinned=${pinned} toggle=${toggle} select=${setFocus} /></div>`;
  }

  function Page({ overview, query, place }) {
    const [state, setState] = useState({ graph: null, error: null, place: null });
    const graphs = overview.graphs || [], known = place < graphs.length;
    useEffect(() => {
      if (!known) return undefined;
      let stale = false;
      S.source.graph(place).then((payload) => { if (!stale) setState({ graph: new S.graphs.Graph(payload), error: null, place }); }, (error) => { if (!stale) setState({ graph: null, error, place }); });
      return () => { stale = true; };
    }, [place, known]);
    const found = state.place === place ? state : { graph: null, error: null };
    return html`<article class="tool graph-page">${!known ? html`<p class="problem" role="alert">There is no graph ${place}. ${graphs.length ? `Graphs are numbered 0 to ${graphs.length - 1}.` : "This page was made without graphs: name some with --graph."}</p>`
      : found.error ? html`<p class="problem" role="alert">${found.error.message}</p>`
        : found.graph ? html`<${Shown} key=${place} graph=${found.graph} name=${graphs[place].name} place=${place} query=${query} overview=${overview} />`
          : html`<p class="empty" role="status">Reading the graph…</p>`}</article>`;
  }

  S.pages.graph = { title: "Graph", Page, many: true, when: (session, overview) => Boolean(overview && overview.graphs && overview.graphs.length) };
})((window.Sememe = window.Sememe || {}));
