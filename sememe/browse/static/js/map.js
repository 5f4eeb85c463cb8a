// The map: every latent at its place among the others' directions, on a canvas. Knows the model's columns and the
// address; what is drawn follows the list's filters, and a lasso drawn here filters the list.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useEffect, useLayoutEffect, useMemo, useRef, useState } = preactHooks;
  const html = htm.bind(h);
  const { number, percent, count, useWidth } = S.charts;
  const { Label } = S.tokenViews;
  const { route } = S;

  const SIZE = 9999; // places are whole numbers from 0 to this
  const STEPS = 24; // colours of a scale
  const CELLS = 64; // of the grid in which the nearest latent is looked for
  const REACH = 12; // pixels around the pointer
  const MANY = 20000; // latents from which they are drawn as squares of pixels
  const MAX_CORNERS = 40;
  const N_NAMES = 10;
  // Eight hues that stay apart for colour-blind readers (Okabe and Ito), by lightness too; clusters take turns.
  const HUES = { light: ["#0072b2", "#b8590a", "#007a58", "#a3447c", "#4b4b9c", "#7a6400", "#1f7fa8", "#8c2d19"], dark: ["#56b4e9", "#e69f00", "#2fbf97", "#d98cb8", "#9fa2ee", "#e5d84c", "#8fd3f0", "#f0805c"] };

  const scale = (dark) => Array.from({ length: STEPS }, (_, i) => {
    const t = i / (STEPS - 1);
    return dark ? `oklch(${0.4 + 0.48 * t} ${0.07 + 0.06 * t} ${40 + 45 * t})` : `oklch(${0.84 - 0.46 * t} ${0.08 + 0.05 * t} ${85 - 50 * t})`;
  });

  // What a colouring says of each row: a step of the scale, or -1 where there is nothing to say.
  function colouring(model, by) {
    const { index, details } = model, steps = new Int8Array(model.n).fill(-1);
    if (by === "cluster") {
      details.cluster.forEach((cluster, row) => { if (cluster !== null) steps[row] = cluster % 8; });
      return { kind: "groups", steps };
    }
    const values = by === "score" ? details.score : index.density;
    const shown = by === "score" ? (value) => value : (value) => (value > 0 ? Math.log10(value) : null);
    // The scale spans all but the outermost hundredths, which else would leave one colour for nearly everything.
    const sorted = Float64Array.from(Array.from(values, (value) => (value === null ? null : shown(value))).filter((at) => at !== null)).sort();
    const low = sorted[Math.floor(sorted.length * 0.01)], high = sorted[Math.ceil(sorted.length * 0.99) - 1];
    const write = by === "score" ? (at) => number(at, 2) : (at) => percent(10 ** at, 2);
    values.forEach((value, row) => {
      const at = value === null ? null : shown(value);
      if (at !== null) steps[row] = Math.max(0, Math.min(STEPS - 1, Math.floor(((at - low) / (high - low || 1)) * STEPS)));
    });
    return { kind: "scale", steps, ends: sorted.length ? [write(low), write(high)] : ["", ""] };
  }

  // Small squares by the ten thousand, as pixels: much quicker than one drawing call for each.
  const scratch = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  function pixelOf(colour) {
    scratch.clearRect(0, 0, 1, 1);
    scratch.fillStyle = colour;
    scratch.fillRect(0, 0, 1, 1);
    return new Uint32Array(scratch.getImageData(0, 0, 1, 1).data.buffer)[0];
  }
  function drawSquares(context, groups, colours, sides, ratio) {
    const { width, height } = context.canvas, image = context.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    groups.forEach((points, group) => {
      const colour = pixelOf(colours[group]), side = Math.max(1, Math.round(sides[group] * ratio));
      for (let i = 0; i < points.length; i += 2) {
        const left = Math.max(0, Math.round(points[i] * ratio - side / 2)), top = Math.max(0, Math.round(points[i + 1] * ratio - side / 2));
        const right = Math.min(width, left + side), bottom = Math.min(height, top + side);
        for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) pixels[y * width + x] = colour;
      }
    });
    context.putImageData(image, 0, 0);
  }

  function parseView(text) {
    const [x, y, zoom] = (text || "").split("_").map(Number);
    return [x, y, zoom].every(Number.isFinite) && zoom >= 1 && zoom <= 400 ? { x, y, zoom } : { x: SIZE / 2, y: SIZE / 2, zoom: 1 };
  }
  const formatView = ({ x, y, zoom }) => (zoom === 1 && x === SIZE / 2 && y === SIZE / 2 ? "" : `${Math.round(x)}_${Math.round(y)}_${Number(zoom.toPrecision(3))}`);

  function grid(details) {
    const cells = Array.from({ length: CELLS * CELLS }, () => []);
    const cell = (value) => Math.min(CELLS - 1, Math.max(0, Math.floor((value / (SIZE + 1)) * CELLS)));
    details.x.forEach((x, row) => { if (x !== null) cells[cell(details.y[row]) * CELLS + cell(x)].push(row); });
    return { cells, cell };
  }

  // The names of the largest clusters, at the middle of their latents.
  function centres(overview, details) {
    const sums = new Map();
    details.cluster.forEach((cluster, row) => {
      if (cluster === null || details.x[row] === null) return;
      const sum = sums.get(cluster) || [0, 0, 0];
      sum[0] += details.x[row]; sum[1] += details.y[row]; sum[2] += 1;
      sums.set(cluster, sum);
    });
    return overview.clusters.filter(({ id }) => sums.has(id)).sort((a, b) => b.n - a.n).slice(0, 60).map(({ id, label, explanation }) => {
      const [x, y, n] = sums.get(id);
      const name = S.text.flat(explanation || label).replace(/·/g, " ");
      return { x: x / n, y: y / n, name: name.length > 26 ? name.slice(0, 25) + "…" : name };
    });
  }

  function LatentMap({ model, overview, params, rows, change }) {
    const [box, width] = useWidth();
    const canvas = useRef(null), live = useRef({ view: parseView(params.view), drag: null, corners: null });
    const [hover, setHover] = useState(null);
    const [lassoing, setLassoing] = useState(false);
    const dark = S.useMedia("(prefers-color-scheme: dark)");
    const { details } = model || {};
    const ready = !!(details && details.x);
    const height = width && width < 520 ? 300 : 380;
    const by = params.color === "cluster" && overview.clusters.length ? "cluster" : params.color === "score" && ready && details.score ? "score" : "density";
    const paint = useMemo(() => (ready ? colouring(model, by) : null), [ready, by, model]);
    const cells = useMemo(() => (ready ? grid(details) : null), [ready]);
    const names = useMemo(() => (ready ? centres(overview, details) : []), [ready]);
    const shown = useMemo(() => { const flags = new Uint8Array(model ? model.n : 0); for (const row of rows) flags[row] = 1; return flags; }, [rows]);

    const scaleOf = () => (Math.min(width, height) * 0.94 * live.current.view.zoom) / SIZE;
    const toScreen = (x, y) => { const k = scaleOf(), { view } = live.current; return [(x - view.x) * k + width / 2, (y - view.y) * k + height / 2]; };
    const toMap = (px, py) => { const k = scaleOf(), { view } = live.current; return [(px - width / 2) / k + view.x, (py - height / 2) / k + view.y]; };

    const draw = () => {
      const element = canvas.current;
      if (!element || !ready || !width) return;
      const ratio = window.devicePixelRatio || 1, context = element.getContext("2d");
      if (element.width !== Math.round(width * ratio)) element.width = Math.round(width * ratio);
      if (element.height !== Math.round(height * ratio)) element.height = Math.round(height * ratio);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, width, height);
      const style = getComputedStyle(element), token = (name) => style.getPropertyValue(name).trim();
      const colours = by === "cluster" ? HUES[dark ? "dark" : "light"] : scale(dark);
      const { view } = live.current, k = scaleOf();
      const size = Math.min(7, Math.max(1.5, Math.min(4, 260 / Math.sqrt(model.n)) * view.zoom ** 0.35));
      const groups = Array.from({ length: colours.length + 2 }, () => []);
      const { x, y } = details;
      for (let row = 0; row < model.n; row++) {
        if (x[row] === null) continue;
        const px = (x[row] - view.x) * k + width / 2, py = (y[row] - view.y) * k + height / 2;
        if (px < -8 || py < -8 || px > width + 8 || py > height + 8) continue;
        groups[!shown[row] ? 0 : paint.steps[row] + 2].push(px, py);
      }
      const inks = [token("--line"), token("--faint"), ...colours], sides = groups.map((_, group) => (group === 0 ? Math.max(1.2, size * 0.7) : size));
      if (model.n > MANY) drawSquares(context, groups, inks, sides, ratio);
      else groups.forEach((points, group) => {
        context.fillStyle = inks[group];
        for (let i = 0; i < points.length; i += 2) { context.beginPath(); context.arc(points[i], points[i + 1], sides[group] / 2, 0, 7); context.fill(); }
      });
      // Names that do not overlap, the largest clusters first.
      context.font = "600 11px " + (token("--sans") || "sans-serif");
      context.textAlign = "center";
      const taken = [];
      for (const { x: cx, y: cy, name } of names) {
        if (taken.length >= N_NAMES) break;
        const [px, py] = toScreen(cx, cy), half = context.measureText(name).width / 2 + 4;
        if (px - half < 0 || px + half > width || py < 14 || py > height - 6) continue;
        if (taken.some(([tx, ty, th]) => Math.abs(tx - px) < th + half && Math.abs(ty - py) < 22)) continue;
        taken.push([px, py, half]);
        context.lineWidth = 3.5; context.lineJoin = "round"; context.strokeStyle = token("--surface"); context.strokeText(name, px, py + 4);
        context.fillStyle = token("--ink"); context.fillText(name, px, py + 4);
      }
      const corners = live.current.corners || S.fields.parseLasso(params.lasso);
      if (corners.length > 1) {
        context.beginPath();
        corners.forEach(([cx, cy], i) => { const [px, py] = toScreen(cx, cy); if (i) context.lineTo(px, py); else context.moveTo(px, py); });
        context.closePath();
        context.lineWidth = 1.5; context.setLineDash([5, 4]); context.strokeStyle = token("--accent"); context.stroke(); context.setLineDash([]);
      }
      if (hover !== null && x[hover.row] !== null) {
        const [px, py] = toScreen(x[hover.row], y[hover.row]);
        context.beginPath(); context.arc(px, py, size / 2 + 4, 0, 7); context.lineWidth = 2; context.strokeStyle = token("--ink"); context.stroke();
      }
    };
    const frame = useRef(0);
    const redraw = () => { cancelAnimationFrame(frame.current); frame.current = requestAnimationFrame(draw); };
    useLayoutEffect(() => { live.current.view = parseView(params.view); }, [params.view]);
    useEffect(() => { redraw(); return () => cancelAnimationFrame(frame.current); });

    const keep = () => change({ view: formatView(live.current.view) });
    const zoomBy = (factor, px = width / 2, py = height / 2) => {
      const { view } = live.current, [mx, my] = toMap(px, py);
      const zoom = Math.min(400, Math.max(1, view.zoom * factor));
      live.current.view = { ...view, zoom };
      const [nx, ny] = toMap(px, py);
      live.current.view = zoom === 1 ? { x: SIZE / 2, y: SIZE / 2, zoom } : { x: view.x + mx - nx, y: view.y + my - ny, zoom };
      redraw();
    };
    const later = useRef(0);
    const keepSoon = () => { clearTimeout(later.current); later.current = setTimeout(keep, 200); };
    useEffect(() => () => clearTimeout(later.current), []);

    const nearest = (px, py) => {
      const [mx, my] = toMap(px, py), reach = REACH / scaleOf();
      let best = null, distance = reach * reach;
      for (let cy = cells.cell(my - reach); cy <= cells.cell(my + reach); cy++)
        for (let cx = cells.cell(mx - reach); cx <= cells.cell(mx + reach); cx++)
          for (const row of cells.cells[cy * CELLS + cx]) {
            if (!shown[row]) continue;
            const d = (details.x[row] - mx) ** 2 + (details.y[row] - my) ** 2;
            if (d < distance) { distance = d; best = row; }
          }
      return best;
    };
    const at = (event) => { const area = canvas.current.getBoundingClientRect(); return [event.clientX - area.left, event.clientY - area.top]; };
    const point = (row) => { if (row === null) setHover(null); else { const [px, py] = toScreen(details.x[row], details.y[row]); setHover({ row, px, py }); } };

    const down = (event) => {
      if (event.button !== 0 || !ready) return;
      const [px, py] = at(event);
      if (lassoing || event.shiftKey) { live.current.corners = [toMap(px, py)]; canvas.current.setPointerCapture(event.pointerId); setHover(null); }
      else { live.current.drag = { px, py, view: live.current.view, moved: false }; if (event.pointerType !== "touch") canvas.current.setPointerCapture(event.pointerId); }
    };
    const move = (event) => {
      if (!ready) return;
      const [px, py] = at(event), { corners, drag } = live.current;
      if (corners) {
        const last = toScreen(...corners[corners.length - 1]);
        if (Math.hypot(last[0] - px, last[1] - py) > 3) corners.push(toMap(px, py));
        redraw();
      } else if (drag) {
        if (Math.hypot(px - drag.px, py - drag.py) > 4) drag.moved = true;
        if (drag.moved) { const k = scaleOf(); live.current.view = { ...drag.view, x: drag.view.x - (px - drag.px) / k, y: drag.view.y - (py - drag.py) / k }; setHover(null); redraw(); }
      } else point(nearest(px, py));
    };
    const up = (event) => {
      const { corners, drag } = live.current;
      live.current.corners = live.current.drag = null;
      if (corners) {
        const every = Math.ceil(corners.length / MAX_CORNERS);
        const few = corners.filter((_, i) => i % every === 0);
        setLassoing(false);
        if (few.length > 2) change({ lasso: S.fields.formatLasso(few), view: formatView(live.current.view) });
        else redraw();
      } else if (drag && drag.moved) keep();
      else if (drag) {
        const row = nearest(...at(event));
        if (row !== null) route.go(route.format("latent", model.index.id[row], route.listParams(params)));
      }
    };
    const cancel = () => { live.current.corners = live.current.drag = null; redraw(); };
    useEffect(() => {
      const element = canvas.current;
      if (!element) return undefined;
      // The wheel scrolls the page, unless the map was clicked into or Ctrl is held.
      const wheel = (event) => {
        if (!ready || !(event.ctrlKey || event.metaKey || document.activeElement === element)) return;
        event.preventDefault();
        zoomBy(1.0015 ** -event.deltaY, ...at(event));
        keepSoon();
      };
      element.addEventListener("wheel", wheel, { passive: false });
      return () => element.removeEventListener("wheel", wheel);
    });

    // With the keyboard: arrows go to the next latent in that direction, Enter opens it.
    const keys = (event) => {
      if (!ready || event.ctrlKey || event.metaKey || event.altKey) return;
      const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      const done = () => { event.preventDefault(); event.stopPropagation(); };
      if (direction) {
        done();
        const from = hover ? [details.x[hover.row], details.y[hover.row]] : [live.current.view.x, live.current.view.y];
        let best = null, cost = Infinity;
        for (const row of rows) {
          if (details.x[row] === null || (hover && row === hover.row)) continue;
          const dx = details.x[row] - from[0], dy = details.y[row] - from[1];
          const along = dx * direction[0] + dy * direction[1], across = Math.abs(dx * direction[1]) + Math.abs(dy * direction[0]);
          if (hover && along <= 0) continue;
          const price = hover ? along + 2.5 * across : Math.hypot(dx, dy);
          if (price < cost) { cost = price; best = row; }
        }
        if (best === null) return;
        const [px, py] = toScreen(details.x[best], details.y[best]);
        if (px < 0 || py < 0 || px > width || py > height) { live.current.view = { ...live.current.view, x: details.x[best], y: details.y[best] }; keepSoon(); }
        point(best);
      } else if (event.key === "Enter" && hover) { done(); route.go(route.format("latent", model.index.id[hover.row], route.listParams(params))); }
      else if (event.key === "+" || event.key === "=" || event.key === "-") { done(); zoomBy(event.key === "-" ? 1 / 1.6 : 1.6, ...(hover ? [hover.px, hover.py] : [])); keepSoon(); }
      else if (event.key === "0") { done(); live.current.view = parseView(""); setHover(null); keep(); }
      else if (event.key === "Escape" && (params.lasso || hover)) { done(); setHover(null); if (params.lasso) change({ lasso: "" }); }
    };
    const zoomButton = (factor) => () => { zoomBy(factor); keep(); };
    const value = (row) => (by === "score" ? (details.score[row] === null ? "no score" : "score " + number(details.score[row])) : "active on " + percent(model.index.density[row]) + " of tokens");
    const options = [["density", "density"], ...(ready && details.score ? [["score", "score"]] : []), ...(overview.clusters.length ? [["cluster", "cluster"]] : [])];
    const tipLeft = hover ? Math.max(0, Math.min(hover.px + 12, width - 230)) : 0;
    return html`<div class="map">
      <div class="map-head"><h2>Map <span class="muted">latents whose directions are alike lie together</span></h2>
        <label class="field"><span>colour</span><select name="color" value=${by} onChange=${(e) => change({ color: e.target.value === "density" ? "" : e.target.value })}>
          ${options.map(([key, name]) => html`<option key=${key} value=${key} selected=${by === key}>${name}</option>`)}</select></label></div>
      <div class="map-box" ref=${box} style=${{ height: height + "px" }}>
        <canvas ref=${canvas} tabindex="0" role="application" aria-label=${`Map of ${count(overview.placed)} latents`} aria-describedby="map-help"
          style=${{ width: "100%", height: height + "px" }} class=${lassoing ? "lassoing" : ""}
          onPointerDown=${down} onPointerMove=${move} onPointerUp=${up} onPointerCancel=${cancel} onPointerLeave=${() => !live.current.drag && setHover(null)} onKeyDown=${keys}></canvas>
        ${hover && html`<div class="tip map-tip" role="tooltip" style=${{ left: tipLeft + "px", top: (hover.py > height - 90 ? hover.py - 78 : hover.py + 12) + "px" }}>
          <div><span class="c-id">${model.index.id[hover.row]}</span> <span class="names"><${Label} model=${model} row=${hover.row} /></span></div>
          <div class="muted">${value(hover.row)}${details.cluster[hover.row] === null ? "" : html` · <span>${clusterName(overview, details.cluster[hover.row])}</span>`}</div></div>`}
        ${!ready && (model && model.withoutDetails ? html`<p class="problem" role="alert">${model.withoutDetails}</p>` : html`<p class="empty" role="status">Reading the map…</p>`)}
      </div>
      <div class="map-foot">
        <span class="map-buttons"><button type="button" onClick=${zoomButton(1.6)} aria-label="Zoom in">+</button><button type="button" onClick=${zoomButton(1 / 1.6)} aria-label="Zoom out">−</button>
          <button type="button" onClick=${() => { live.current.view = parseView(""); keep(); }}>Whole map</button>
          <button type="button" aria-pressed=${lassoing} onClick=${() => setLassoing(!lassoing)}>Lasso</button></span>
        ${paint && paint.kind === "scale" && html`<span class="map-legend"><span>${paint.ends[0]}</span><svg width="96" height="9" aria-hidden="true">${scale(dark).map((colour, i) => html`<rect key=${i} x=${i * 4} width="4.2" height="9" fill=${colour} />`)}</svg><span>${paint.ends[1]}</span></span>`}
        ${paint && paint.kind === "groups" && html`<span class="map-legend"><span>hues repeat; gray is in no cluster</span></span>`}
      </div>
      <p class="sr" id="map-help">Arrow keys go from latent to latent, Enter opens one, plus and minus zoom, 0 shows the whole map. The cluster filter of the list chooses by group.</p>
      <p class="sr" role="status">${hover ? `Latent ${model.index.id[hover.row]}, ${model.label(hover.row) || "without a label"}, ${value(hover.row)}` : ""}</p>
    </div>`;
  }

  function clusterName(overview, id) {
    const found = overview.clusters.find((cluster) => cluster.id === id);
    return found ? S.text.flat(found.explanation || found.label).replace(/·/g, " ") : "cluster " + id;
  }

  S.mapViews = { LatentMap, clusterName };
})((window.Sememe = window.Sememe || {}));
