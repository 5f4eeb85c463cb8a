// How a graph looks: on a canvas while one moves about in it, as an SVG to keep, and its pinned part as boxes.
// Knows graphs and their layout. Sign is told by shape and by dashes, and by colour besides.
(function (S) {
  "use strict";
  const { h } = preact;
  const html = htm.bind(h);
  const { number } = S.charts;

  const MARGIN = { left: 62, right: 12, top: 12, bottom: 66 };
  const WIDTHS = [0.7, 1.1, 1.8, 2.8, 4.2]; // of edges, by their share of what enters the target
  const ALPHAS = [0.22, 0.32, 0.45, 0.6, 0.8];
  const bucket = (share) => (share > 0.4 ? 4 : share > 0.2 ? 3 : share > 0.08 ? 2 : share > 0.02 ? 1 : 0);

  const inksOf = (element) => {
    const style = getComputedStyle(element), token = (name) => style.getPropertyValue(name).trim();
    return { up: token("--helps"), down: token("--hurts"), ink: token("--ink"), muted: token("--muted"), line: token("--line"), surface: token("--surface"), accent: token("--accent"), sans: token("--sans") || "sans-serif" };
  };

  const radius = (graph, i) => (graph.fixed[i] ? 5 : 3 + 6 * Math.sqrt(Math.abs(graph.nodes.effect[i]) / graph.largest));

  // From the layout's units to pixels. At zoom 1 the whole graph fills the frame, each axis in its own scale.
  function frameOf(layout, view, width, height) {
    const inner = [Math.max(width - MARGIN.left - MARGIN.right, 10), Math.max(height - MARGIN.top - MARGIN.bottom, 10)];
    const kx = (inner[0] / layout.width) * view.zoom, ky = (inner[1] / layout.height) * view.zoom;
    const cx = MARGIN.left + inner[0] / 2, cy = MARGIN.top + inner[1] / 2;
    return { kx, ky, width, height, inner, x: (v) => cx + (v - view.x) * kx, y: (v) => cy + (v - view.y) * ky, backX: (p) => (p - cx) / kx + view.x, backY: (p) => (p - cy) / ky + view.y };
  }

  const layerName = (graph, layer) => (layer < 0 ? "tokens" : graph.nodes.kind.some((kind, i) => kind === "logit" && graph.nodes.layer[i] === layer) ? "logits" : "layer " + layer);

  // Labels that do not run into each other: those of rows at the left, of tokens below.
  function labels(graph, layout, frame) {
    const rows = [], columns = [];
    let last = -Infinity;
    for (const [layer, { top, height }] of layout.rows) {
      const y = frame.y(top + height / 2);
      if (y < MARGIN.top || y > frame.height - MARGIN.bottom || y - last < 12) continue;
      rows.push({ y, text: layerName(graph, layer) });
      last = y;
    }
    last = -Infinity;
    layout.columns.forEach(({ left, width }, position) => {
      const x = frame.x(left + width / 2);
      if (x < MARGIN.left || x > frame.width - MARGIN.right || x - last < 13) return;
      const text = graph.token(position);
      columns.push({ x, text: text.length > 11 ? text.slice(0, 10) + "…" : text });
      last = x;
    });
    return { rows, columns };
  }

  function shape(context, graph, i, x, y, r) {
    context.beginPath();
    if (graph.fixed[i]) context.rect(x - r, y - r, 2 * r, 2 * r);
    else if (graph.nodes.effect[i] < 0) { const s = r * 1.25; context.moveTo(x, y - s); context.lineTo(x + s, y); context.lineTo(x, y + s); context.lineTo(x - s, y); context.closePath(); }
    else context.arc(x, y, r, 0, 7);
  }

  function curve(path, layout, frame, graph, e) {
    const a = graph.from[e], b = graph.to[e];
    const x1 = frame.x(layout.x[a]), y1 = frame.y(layout.y[a]), x2 = frame.x(layout.x[b]), y2 = frame.y(layout.y[b]), middle = (y1 + y2) / 2;
    if (Math.max(x1, x2) < MARGIN.left || Math.min(x1, x2) > frame.width || Math.max(y1, y2) < 0 || Math.min(y1, y2) > frame.height) return;
    path.moveTo(x1, y1);
    path.bezierCurveTo(x1, middle, x2, middle, x2, y2);
  }

  function strokes(context, graph, layout, frame, edges, inks, strong) {
    const paths = new Map();
    for (const e of edges) {
      const key = (graph.weight[e] < 0 ? 10 : 0) + bucket(graph.share[e]);
      if (!paths.has(key)) paths.set(key, new Path2D());
      curve(paths.get(key), layout, frame, graph, e);
    }
    for (const [key, path] of [...paths].sort(([p], [q]) => (p % 10) - (q % 10))) {
      context.strokeStyle = key >= 10 ? inks.down : inks.up;
      context.lineWidth = WIDTHS[key % 10] + (strong ? 0.5 : 0);
      context.globalAlpha = strong ? Math.min(1, ALPHAS[key % 10] + 0.35) : ALPHAS[key % 10];
      context.setLineDash(key >= 10 ? [5, 4] : []);
      context.stroke(path);
    }
    context.setLineDash([]);
    context.globalAlpha = 1;
  }

  function prepared(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1, context = canvas.getContext("2d");
    if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
    if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    return context;
  }

  function clipped(context, frame) {
    context.save();
    context.beginPath();
    context.rect(MARGIN.left - 8, 0, frame.width - MARGIN.left + 8, frame.height - MARGIN.bottom + 8);
    context.clip();
  }

  // Everything but what follows the pointer. While one moves, `few` edges are enough.
  function draw(canvas, graph, layout, shown, frame, pinned, few) {
    const context = prepared(canvas, frame.width, frame.height), inks = inksOf(canvas);
    const { rows, columns } = labels(graph, layout, frame);
    context.font = "11px " + inks.sans;
    context.strokeStyle = inks.line;
    context.lineWidth = 1;
    context.fillStyle = inks.muted;
    context.textAlign = "right";
    for (const { y, text } of rows) context.fillText(text, MARGIN.left - 14, y + 4);
    for (const { x, text } of columns) {
      context.save();
      context.translate(x + 3, frame.height - MARGIN.bottom + 16);
      context.rotate(-0.62);
      context.fillText(text, 0, 4);
      context.restore();
    }
    clipped(context, frame);
    context.beginPath();
    for (const { top } of layout.rows.values()) { const y = Math.round(frame.y(top)) + 0.5; context.moveTo(MARGIN.left - 8, y); context.lineTo(frame.width, y); }
    context.stroke();
    strokes(context, graph, layout, frame, few ? shown.edges.slice(0, few) : shown.edges, inks, false);
    for (const i of [...shown.list].reverse()) { // the strongest on top
      const x = frame.x(layout.x[i]), y = frame.y(layout.y[i]), r = radius(graph, i);
      if (x < MARGIN.left - 12 || x > frame.width + 12 || y < -12 || y > frame.height) continue;
      const ink = graph.nodes.kind[i] === "token" || graph.nodes.kind[i] === "logit" ? inks.ink : graph.nodes.effect[i] < 0 ? inks.down : inks.up;
      shape(context, graph, i, x, y, r);
      context.fillStyle = graph.nodes.kind[i] === "error" ? inks.surface : ink;
      context.fill();
      context.strokeStyle = graph.nodes.kind[i] === "error" ? ink : inks.surface;
      context.lineWidth = graph.nodes.kind[i] === "error" ? 1.5 : 1;
      context.stroke();
      if (pinned.has(i)) { context.beginPath(); context.arc(x, y, r + 4, 0, 7); context.strokeStyle = inks.ink; context.lineWidth = 2; context.stroke(); }
    }
    context.restore();
  }

  // What follows the pointer: a node's own edges, strongly.
  function drawFocus(canvas, graph, layout, shown, frame, focus) {
    const context = prepared(canvas, frame.width, frame.height);
    if (focus === null || !shown.nodes[focus]) return;
    const inks = inksOf(canvas);
    clipped(context, frame);
    const own = [...graph.ins[focus], ...graph.outs[focus]].filter((e) => shown.nodes[graph.from[e]] && shown.nodes[graph.to[e]]).slice(0, 400);
    strokes(context, graph, layout, frame, own, inks, true);
    for (const i of new Set(own.flatMap((e) => [graph.from[e], graph.to[e]]))) {
      shape(context, graph, i, frame.x(layout.x[i]), frame.y(layout.y[i]), radius(graph, i));
      context.lineWidth = 1.5; context.strokeStyle = inks.ink; context.stroke();
    }
    context.beginPath();
    context.arc(frame.x(layout.x[focus]), frame.y(layout.y[focus]), radius(graph, focus) + 5, 0, 7);
    context.lineWidth = 2.5; context.strokeStyle = inks.accent; context.stroke();
    context.restore();
  }

  // ---- SVG: built as elements, so that every text stays a text

  const NS = "http://www.w3.org/2000/svg";
  function element(name, attributes, text) {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function svgOf(graph, layout, shown, inks) {
    const width = Math.max(640, layout.width * 1.6) + MARGIN.left + MARGIN.right, height = Math.max(360, layout.height * 1.6) + MARGIN.top + MARGIN.bottom;
    const frame = frameOf(layout, { x: layout.width / 2, y: layout.height / 2, zoom: 1 }, width, height);
    const root = element("svg", { viewBox: `0 0 ${Math.round(width)} ${Math.round(height)}`, "font-family": "sans-serif", "font-size": "11" });
    root.append(element("title", {}, `${graph.payload.metric.text || graph.payload.metric.name || "graph"}`), element("rect", { width: "100%", height: "100%", fill: inks.surface }));
    const round = (value) => value.toFixed(1);
    for (const e of [...shown.edges].reverse()) {
      const a = graph.from[e], b = graph.to[e], x1 = frame.x(layout.x[a]), y1 = frame.y(layout.y[a]), x2 = frame.x(layout.x[b]), y2 = frame.y(layout.y[b]), middle = (y1 + y2) / 2;
      const k = bucket(graph.share[e]);
      root.append(element("path", { d: `M${round(x1)} ${round(y1)}C${round(x1)} ${round(middle)} ${round(x2)} ${round(middle)} ${round(x2)} ${round(y2)}`, fill: "none", stroke: graph.weight[e] < 0 ? inks.down : inks.up, "stroke-width": WIDTHS[k], "stroke-opacity": ALPHAS[k], ...(graph.weight[e] < 0 ? { "stroke-dasharray": "5 4" } : {}) }));
    }
    for (const i of [...shown.list].reverse()) {
      const x = frame.x(layout.x[i]), y = frame.y(layout.y[i]), r = radius(graph, i), hollow = graph.nodes.kind[i] === "error";
      const ink = graph.fixed[i] ? inks.ink : graph.nodes.effect[i] < 0 ? inks.down : inks.up;
      const look = { fill: hollow ? inks.surface : ink, stroke: hollow ? ink : inks.surface };
      const made = graph.fixed[i] ? element("rect", { x: round(x - r), y: round(y - r), width: 2 * r, height: 2 * r, ...look })
        : graph.nodes.effect[i] < 0 ? element("path", { d: `M${round(x)} ${round(y - r * 1.25)}L${round(x + r * 1.25)} ${round(y)}L${round(x)} ${round(y + r * 1.25)}L${round(x - r * 1.25)} ${round(y)}Z`, ...look })
          : element("circle", { cx: round(x), cy: round(y), r: round(r), ...look });
      made.append(element("title", {}, `${graph.name(i)}, at ${graph.token(graph.nodes.position[i])}, effect ${number(graph.nodes.effect[i])}`));
      root.append(made);
    }
    const { rows, columns } = labels(graph, layout, frame);
    for (const { y, text } of rows) root.append(element("text", { x: MARGIN.left - 14, y: round(y + 4), "text-anchor": "end", fill: inks.muted }, text));
    for (const { x, text } of columns) root.append(element("text", { transform: `translate(${round(x + 3)} ${round(height - MARGIN.bottom + 20)}) rotate(-35)`, "text-anchor": "end", fill: inks.muted }, text));
    return new XMLSerializer().serializeToString(root);
  }

  // ---- the pinned part: boxes by layer and token, and what goes between them

  const BOX = { width: 158, height: 44, gap: 26, row: 96 };

  function placedBoxes(boxes, width) {
    const layers = [...new Set(boxes.map((box) => Math.round(box.layer)))].sort((a, b) => b - a);
    let widest = 0;
    layers.forEach((layer, row) => {
      let right = 0;
      const last = Math.max(1, ...boxes.map((box) => box.position));
      boxes.filter((box) => Math.round(box.layer) === layer).sort((a, b) => a.position - b.position).forEach((box) => {
        box.x = Math.max(right, (box.position / last) * Math.max(0, width - BOX.width));
        box.y = row * BOX.row;
        right = box.x + BOX.width + BOX.gap;
      });
      widest = Math.max(widest, right - BOX.gap);
    });
    return { width: Math.max(widest, BOX.width) + 2, height: (layers.length - 1) * BOX.row + BOX.height + 2 };
  }

  function Subgraph({ graph, pinned, groups, width, select }) {
    const { boxes, edges } = graph.subgraph(pinned, groups);
    const size = placedBoxes(boxes, width - 4);
    const nameOf = (box) => box.name === null ? graph.name(box.members[0]) : box.name;
    const short = (text, most = 24) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
    const under = (box) => (box.name === null ? `at ${short(graph.token(graph.nodes.position[box.members[0]]), 14)} · ${number(box.effect)}` : `${box.members.length} nodes · ${number(box.effect)}`);
    return html`<div class="subgraph scroll" tabindex="0" role="region" aria-label="The pinned nodes and what goes between them">
      <svg width=${size.width} height=${size.height} role="img" aria-label=${`${boxes.length} boxes, ${edges.length} edges: ` + edges.slice(0, 12).map(({ a, b, weight }) => `${nameOf(boxes[a])} to ${nameOf(boxes[b])} ${number(weight)}`).join("; ")}>
        ${[...edges].reverse().map(({ a, b, weight, share }) => {
          const p = boxes[a], q = boxes[b], x1 = p.x + BOX.width / 2, x2 = q.x + BOX.width / 2, y1 = p.y, y2 = q.y + BOX.height, middle = (y1 + y2) / 2;
          return html`<path key=${a + "-" + b} class=${"flow" + (weight < 0 ? " negative" : "")} d=${`M${x1} ${y1}C${x1} ${middle} ${x2} ${middle} ${x2} ${y2}`} stroke-width=${Math.max(1, Math.min(9, 9 * share))}><title>${nameOf(p)} → ${nameOf(q)}: ${number(weight)}</title></path>`;
        })}
        ${boxes.map((box, i) => html`<g key=${i} class=${"box" + (box.name === null ? "" : " grouped") + (box.effect < 0 ? " negative" : "")} transform=${`translate(${box.x + 1} ${box.y + 1})`} onClick=${() => select(box.members[0])}>
          <rect width=${BOX.width} height=${BOX.height} rx=${box.name === null ? 4 : 14} />
          <text x=${BOX.width / 2} y="18" text-anchor="middle">${short(nameOf(box))}</text>
          <text class="small" x=${BOX.width / 2} y="34" text-anchor="middle">${under(box)}</text><title>${box.members.map((m) => graph.name(m)).join("; ")}</title></g>`)}
      </svg></div>`;
  }

  S.graphDrawing = { MARGIN, frameOf, radius, draw, drawFocus, svgOf, inksOf, Subgraph };
})((window.Sememe = window.Sememe || {}));
