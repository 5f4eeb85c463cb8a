// The graph of a prompt as numbers: what is shown, where it lies, what leads where. Knows columns; draws nothing.
(function (S) {
  "use strict";

  const PER_ROW = 6; // nodes side by side in a cell, before the next begin a row of their own
  const STEP = 15; // between nodes of a cell, in the layout's units
  const PAD = 12;

  class Graph {
    constructor(payload) {
      this.payload = payload;
      const { nodes, edges, prompt } = payload;
      this.nodes = nodes;
      this.n = nodes.id.length;
      this.m = edges.weight.length;
      this.from = Int32Array.from(edges.from);
      this.to = Int32Array.from(edges.to);
      this.weight = Float64Array.from(edges.weight);
      this.tokens = prompt.tokens;
      this.placeOf = new Map(nodes.id.map((id, i) => [id, i]));
      this.ins = Array.from({ length: this.n }, () => []);
      this.outs = Array.from({ length: this.n }, () => []);
      const total = new Float64Array(this.n);
      for (let e = 0; e < this.m; e++) {
        this.ins[this.to[e]].push(e);
        this.outs[this.from[e]].push(e);
        total[this.to[e]] += Math.abs(this.weight[e]);
      }
      // An edge as a share of all that enters its target: weights into latents and logits have different units.
      this.share = Float64Array.from(this.weight, (w, e) => Math.abs(w) / (total[this.to[e]] || 1));
      for (const list of [...this.ins, ...this.outs]) list.sort((a, b) => this.share[b] - this.share[a]);
      this.fixed = nodes.kind.map((kind) => kind === "token" || kind === "logit");
      this.largest = Math.max(1e-12, ...nodes.effect.map((value, i) => (this.fixed[i] ? 0 : Math.abs(value))));
      // How much a node matters where only some are shown: its effect, or where that says nothing its influence.
      const matters = (i) => (this.fixed[i] ? Infinity : Math.abs(nodes.effect[i]) / this.largest + 1e-6 * (nodes.influence[i] || 0));
      this.order = Array.from({ length: this.n }, (_, i) => i).sort((a, b) => matters(b) - matters(a) || a - b);
      const through = (e) => this.share[e] * (nodes.influence[this.to[e]] === null ? 1 : 0.02 + nodes.influence[this.to[e]] + (nodes.kind[this.to[e]] === "logit" ? nodes.effect[this.to[e]] : 0));
      const rank = Float64Array.from({ length: this.m }, (_, e) => through(e));
      this.edgeOrder = Array.from({ length: this.m }, (_, e) => e).sort((a, b) => rank[b] - rank[a] || a - b);
      this.nFixed = this.fixed.filter(Boolean).length;
    }

    // Everything from which a node can be reached, or that it reaches; with the node.
    reach(start, up) {
      const seen = new Uint8Array(this.n), queue = [start];
      seen[start] = 1;
      while (queue.length) {
        const i = queue.pop();
        for (const e of up ? this.ins[i] : this.outs[i]) {
          const next = up ? this.from[e] : this.to[e];
          if (!seen[next]) { seen[next] = 1; queue.push(next); }
        }
      }
      return seen;
    }

    // The nodes and edges that are shown: the strongest of what is asked for, pinned ones always.
    shown({ nNodes, nEdges, of, up, pinned }) {
      const within = of === null ? null : this.reach(of, up);
      const nodes = new Uint8Array(this.n);
      let left = nNodes;
      for (const i of this.order) {
        if (within && !within[i]) continue;
        if (!this.fixed[i] && left-- <= 0) continue;
        nodes[i] = 1;
      }
      for (const i of pinned) nodes[i] = 1;
      if (of !== null) nodes[of] = 1;
      const edges = [];
      for (const e of this.edgeOrder) {
        if (edges.length >= nEdges) break;
        if (nodes[this.from[e]] && nodes[this.to[e]]) edges.push(e);
      }
      return { nodes, edges, list: this.order.filter((i) => nodes[i]) };
    }

    // Where each shown node lies: columns are tokens, rows are layers from below up, as far apart as the fullest cell asks.
    layout(nodes) {
      const cells = new Map();
      for (let i = 0; i < this.n; i++) {
        if (!nodes[i]) continue;
        const key = this.nodes.layer[i] + " " + this.nodes.position[i];
        if (!cells.has(key)) cells.set(key, []);
        cells.get(key).push(i);
      }
      const layers = [...new Set(Array.from({ length: this.n }, (_, i) => i).filter((i) => nodes[i]).map((i) => this.nodes.layer[i]))].sort((a, b) => a - b);
      const widest = new Map(), tallest = new Map();
      for (const list of cells.values()) {
        const { layer, position } = { layer: this.nodes.layer[list[0]], position: this.nodes.position[list[0]] };
        widest.set(position, Math.max(widest.get(position) || 1, Math.min(list.length, PER_ROW)));
        tallest.set(layer, Math.max(tallest.get(layer) || 1, Math.ceil(list.length / PER_ROW)));
      }
      const columns = [], rows = new Map();
      let width = 0, height = 0;
      for (let position = 0; position < this.tokens.length; position++) {
        const size = (widest.get(position) || 1) * STEP + PAD;
        columns.push({ left: width, width: size });
        width += size;
      }
      for (const layer of [...layers].reverse()) { // the last layer on top
        const size = tallest.get(layer) * STEP + PAD;
        rows.set(layer, { top: height, height: size });
        height += size;
      }
      const x = new Float64Array(this.n), y = new Float64Array(this.n);
      for (const list of cells.values()) {
        const column = columns[this.nodes.position[list[0]]], row = rows.get(this.nodes.layer[list[0]]);
        const nRows = Math.ceil(list.length / PER_ROW), across = Math.min(list.length, PER_ROW);
        list.forEach((i, k) => {
          x[i] = column.left + column.width / 2 + ((k % PER_ROW) - (Math.min(across, list.length - Math.floor(k / PER_ROW) * PER_ROW) - 1) / 2) * STEP;
          y[i] = row.top + row.height / 2 + (Math.floor(k / PER_ROW) - (nRows - 1) / 2) * STEP;
        });
      }
      return { x, y, columns, rows, width: Math.max(width, 1), height: Math.max(height, 1) };
    }

    // Pinned nodes and groups of them as boxes, and the direct edges between them, summed.
    subgraph(pinned, groups) {
      const owner = new Map(), boxes = [];
      for (const { name, members } of groups) {
        const inside = members.filter((i) => pinned.includes(i));
        if (!inside.length) continue;
        inside.forEach((i) => owner.set(i, boxes.length));
        boxes.push({ name, members: inside });
      }
      for (const i of pinned) if (!owner.has(i)) { owner.set(i, boxes.length); boxes.push({ name: null, members: [i] }); }
      const mean = (list, values) => list.reduce((sum, i) => sum + values[i], 0) / list.length;
      for (const box of boxes) {
        box.layer = mean(box.members, this.nodes.layer);
        box.position = mean(box.members, this.nodes.position);
        box.effect = box.members.reduce((sum, i) => sum + this.nodes.effect[i], 0);
      }
      const sums = new Map();
      for (const i of pinned) for (const e of this.outs[i]) {
        const a = owner.get(i), b = owner.get(this.to[e]);
        if (b === undefined || a === b) continue;
        const key = a + " " + b, found = sums.get(key) || { a, b, weight: 0, share: 0 };
        found.weight += this.weight[e];
        found.share += this.share[e] / boxes[b].members.length;
        sums.set(key, found);
      }
      return { boxes, edges: [...sums.values()].sort((p, q) => Math.abs(q.share) - Math.abs(p.share)) };
    }

    // The file as it was written, for whoever wants it.
    file() {
      const { name, nodes, edges, ...rest } = this.payload;
      return {
        ...rest,
        nodes: nodes.id.map((_, i) => Object.fromEntries(Object.keys(nodes).map((key) => [key, nodes[key][i]]))),
        edges: edges.weight.map((weight, e) => ({ from: nodes.id[edges.from[e]], to: nodes.id[edges.to[e]], weight })),
      };
    }

    // What a node is called: plain text, with what would be invisible escaped.
    name(i) {
      const { kind, latent, label, layer } = this.nodes;
      const said = label[i] ? S.text.flat(label[i]).replace(/·/g, " ") : "";
      if (kind[i] === "token") return `token “${said.trim() || said}”`;
      if (kind[i] === "logit") return said ? `logit “${said.trim() || said}”` : "metric";
      if (kind[i] === "error") return `error of layer ${layer[i]}`;
      return `latent ${latent[i]}${said ? ": " + said : ""}`;
    }

    token(position) { return S.text.flat(this.tokens[position] || ""); }
  }

  // ---- the address: pinned nodes and groups by id; nothing that is read is trusted to be there

  const pins = (graph, text) => [...new Set((text || "").split(",").map((id) => graph.placeOf.get(id)).filter((i) => i !== undefined))];

  function groups(graph, text) {
    try {
      return JSON.parse(text || "[]").filter((one) => Array.isArray(one) && typeof one[0] === "string" && Array.isArray(one[1])).slice(0, 50)
        .map(([name, ids]) => ({ name: name.slice(0, 60), members: ids.map((id) => graph.placeOf.get(id)).filter((i) => i !== undefined) })).filter(({ members }) => members.length);
    } catch (error) { return []; }
  }
  const formatGroups = (graph, list) => (list.length ? JSON.stringify(list.map(({ name, members }) => [name, members.map((i) => graph.nodes.id[i])])) : "");

  S.graphs = { Graph, pins, groups, formatGroups };
})((window.Sememe = window.Sememe || {}));
