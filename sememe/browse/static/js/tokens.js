// Tokens on the page: chips, shaded running text, and the tooltip over it. All text goes in as text nodes.
(function (S) {
  "use strict";
  const { h, Component, Fragment } = preact;
  const { useEffect, useMemo, useRef, useState } = preactHooks;
  const html = htm.bind(h);
  const { number, percent } = S.charts;

  // Long runs of blanks are counted where lines do not break: an indent of 32 would push the words away.
  const blanks = (run, breaks) => (!breaks && run.kind === "blank" && /^·{7,}$/.test(run.text) ? "·×" + run.text.length : run.text);

  // A function of its own, beside the component: a component for each of thousands of tokens takes longer than their
  // text. One plain run, as most tokens are, is one string.
  function drawn(parts, breaks) {
    if (parts.length === 1 && !parts[0].kind) return parts[0].text;
    return parts.map((run, i) => {
      if (!run.kind) return run.text;
      return html`<${Fragment} key=${i}><span class=${"mark " + run.kind} dir="ltr">${blanks(run, breaks)}</span>${breaks && run.kind === "newline" ? "\n" : null}<//>`;
    });
  }

  const Runs = ({ parts, breaks }) => drawn(parts, breaks);

  function Chip({ tokens, id, strong }) {
    return h("span", { class: "chip" + (strong ? " strong" : ""), dir: "auto" }, drawn(tokens.alone(id)));
  }

  // A latent's name: its explanation, else its tokens as chips.
  function Label({ model, row }) {
    const text = model.explanation(row);
    if (text !== undefined) return html`<span class="explained">${S.text.flat(text).replace(/·/g, " ")}</span>`;
    const tokens = model.labelTokens(row);
    if (!tokens.length) return html`<span class="nameless">${model.index.n_active[row] ? "no examples" : "dead"}</span>`;
    return tokens.map((id, i) => html`<${Chip} key=${id} tokens=${model.tokens} id=${id} strong=${i === 0} />`);
  }

  // A string that came with its own text, such as an output token of the model.
  function TextChip({ text }) {
    return html`<span class="chip" dir="auto"><${Runs} parts=${S.text.runs(text, "all")} /></span>`;
  }

  // Output tokens that become likelier (raised) and less likely (lowered): [[token, text, change]].
  function Output({ raised, lowered }) {
    const side = (rows, sign, title) => rows && rows.length > 0 && html`<span class="moved" title=${title}><span aria-hidden="true">${sign}</span><span class="sr">${title}: </span>${rows.slice(0, 4).map(([token, text, change], i) => html`<span key=${i} title=${`${change > 0 ? "+" : ""}${number(change)} nats`}><${TextChip} text=${text} /></span>`)}</span>`;
    return html`<span class="output">${side(raised, "↑", "likelier without it")}${side(lowered, "↓", "less likely without it")}</span>`;
  }

  // The share of a latent's activations that are smaller, from its histogram; null where there is none.
  function quantile(latent, edges, act) {
    const total = latent.histogram.reduce((sum, n) => sum + n, 0);
    if (!total || !latent.max_act) return null;
    const share = Math.min(1, Math.abs(act) / latent.max_act);
    let below = 0, low = 0;
    for (let i = 0; i < edges.length; i++) {
      if (share <= edges[i]) return (below + latent.histogram[i] * ((share - low) / (edges[i] - low || 1))) / total;
      below += latent.histogram[i];
      low = edges[i];
    }
    return 1;
  }

  const signed = (value) => (value > 0 ? "+" : "") + number(value);

  // How strongly a token is shaded, 0 to 1; the smallest activation can still be seen.
  const shadeOf = (act, largest) => (act === 0 || !largest ? 0 : 0.1 + 0.9 * Math.min(1, Math.abs(act) / largest));

  // One example: the window around its peak, or the whole row when open.
  function Example({ model, latent, context, documents, example, open, onToggle, name, edges, largestLoss, underlined }) {
    const [tip, setTip] = useState(null);
    // The one token that Tab comes to, the peak at first; arrows move it, and what is known of it is shown.
    const [stop, setStop] = useState(null);
    const box = useRef(null);
    const moved = useRef(false);
    useEffect(() => {
      if (!moved.current) return;
      moved.current = false;
      box.current?.querySelector(`[data-i="${stop}"]`)?.focus();
    }, [stop]);
    const pieces = useMemo(() => (context ? model.tokens.row(context.tokens) : []), [context]);
    const docs = useMemo(() => {
      const out = [];
      for (const [document, length] of context ? context.documents : []) for (let i = 0; i < length; i++) out.push(document);
      return out;
    }, [context]);
    const acts = useMemo(() => new Map(example.positions.map((position, i) => [position, example.acts[i]])), [example]);
    const without = useMemo(() => new Map(example.removals ? example.removals.removed.map((position, i) => [position, example.removals.act[i]]) : []), [example]);
    const { effect } = example;
    useEffect(() => {
      if (!tip) return undefined;
      const close = (event) => { if (!box.current || !box.current.contains(event.target)) setTip(null); };
      document.addEventListener("pointerdown", close);
      return () => document.removeEventListener("pointerdown", close);
    }, [tip]);
    if (!context) return html`<li class="example missing">This example's text is not in the atlas.</li>`;

    let from = open ? 0 : example.start, to = open ? context.tokens.length : example.stop;
    while (open && to > from && docs[to - 1] === -1) to--; // padding says nothing
    const show = (event) => {
      const target = event.target.closest("[data-i]");
      if (!target) { setTip(null); return; }
      const area = box.current.getBoundingClientRect(), place = target.getClientRects()[0];
      if (!place) return;
      const left = Math.max(0, Math.min(place.left - area.left, area.width - 190));
      setTip({ position: Number(target.dataset.i), left, top: place.bottom - area.top + 6 });
    };
    const within = (i) => i !== null && i >= from && i < to;
    const at = within(stop) ? stop : within(example.position) ? example.position : from;
    const keys = (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
      if (event.key === "Escape" && tip) { event.preventDefault(); event.stopPropagation(); setTip(null); return; }
      const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: from, End: to - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      event.stopPropagation(); // outside of the tokens, arrows step through latents
      if (!within(next) || next === at) return;
      moved.current = true;
      setStop(next);
    };
    const source = documents.get(example.document);
    const spans = [];
    for (let i = from; i < to; i++) {
      const act = acts.get(i) || 0;
      const outside = i < example.start || i >= example.stop;
      const classes = ["tok"];
      if (act) classes.push(act < 0 ? "on negative" : "on");
      if (i === example.position && example.kind !== "random") classes.push("peak");
      if (outside) classes.push("outside");
      else if (docs[i] !== example.document) classes.push("other");
      if (pieces[i].continues) classes.push("continues");
      if (i > from && docs[i] !== docs[i - 1]) spans.push(html`<span class="seam" key=${"s" + i} title="Another document begins">‖</span>`);
      let style = act ? { "--a": shadeOf(act, latent.max_act).toFixed(3) } : null;
      // Underlined by effect: the peak by what the loss does without the latent, tokens before it by what the
      // activation does without them.
      if (underlined && i === example.position && effect && effect.loss_change !== null) {
        classes.push(effect.loss_change >= 0 ? "helps" : "hurts");
        style = { ...style, "--e": Math.min(1, Math.abs(effect.loss_change) / (largestLoss || 1)).toFixed(3) };
      }
      if (underlined && without.has(i) && example.act) {
        const drop = 1 - without.get(i) / example.act;
        if (Math.abs(drop) >= 0.05) { classes.push(drop > 0 ? "needed" : "against"); style = { ...style, "--r": Math.min(1, Math.abs(drop)).toFixed(3) }; }
      }
      const reached = i === at ? { tabindex: 0, "aria-describedby": tip && tip.position === i ? `tip-${example.key}` : undefined } : null;
      spans.push(h("span", { key: i, "data-i": i, class: classes.join(" "), style, ...reached }, drawn(pieces[i].parts, open)));
    }
    const tipToken = tip && context.tokens[tip.position];
    const recorded = tip && tip.position >= example.start && tip.position < example.stop;
    return html`<li class=${"example" + (open ? " open" : "")}>
      <div class="act" title=${"Largest activation: " + number(example.act, 4)}>${example.kind === "random" ? "silent" : number(example.act)}</div>
      <div class="body" ref=${box} onPointerOver=${(e) => e.pointerType !== "touch" && show(e)} onPointerLeave=${() => setTip(null)} onClick=${show}>
        <div class="text" dir="auto" role="group" aria-label=${`Tokens of ${name}; left and right arrows move`} onKeyDown=${keys} onFocusCapture=${show} onBlurCapture=${() => setTip(null)}>
          ${!open && from > 0 && html`<span class="cut">…</span>`}${spans}${!open && to < context.tokens.length && html`<span class="cut">…</span>`}
        </div>
        ${tip && html`<div class="tip" role="tooltip" id=${`tip-${example.key}`} style=${{ left: tip.left + "px", top: tip.top + "px" }}>
          <div><${Chip} tokens=${model.tokens} id=${tipToken} strong /> <span class="muted">id ${tipToken}</span></div>
          <dl>
            <dt>activation</dt><dd>${recorded ? number(acts.get(tip.position) || 0, 4) : "not recorded"}</dd>
            ${recorded && latent.max_act > 0 && html`<dt>of its maximum</dt><dd>${percent((acts.get(tip.position) || 0) / latent.max_act)}</dd>`}
            ${recorded && !!acts.get(tip.position) && html`<dt>quantile</dt><dd>${percent(quantile(latent, edges, acts.get(tip.position)))}</dd>`}
            ${without.has(tip.position) && html`<dt>peak without it</dt><dd>${number(without.get(tip.position), 4)}${example.act ? ` (${signed((without.get(tip.position) / example.act - 1) * 100)}%)` : ""}</dd>`}
            ${tip.position === example.position && effect && html`<dt>loss without the latent</dt><dd>${effect.loss_change === null ? "–" : signed(effect.loss_change) + " nats"}</dd>
              ${effect.n_after > 0 && html`<dt>over the next ${effect.n_after}</dt><dd>${signed(effect.loss_change_after)}</dd>`}<dt>KL</dt><dd>${number(effect.kl)}</dd>`}
            <dt>position</dt><dd>${tip.position} of ${context.tokens.length}</dd>
          </dl>
          ${tip.position === example.position && effect && html`<${Output} raised=${effect.raised} lowered=${effect.lowered} />`}
        </div>`}
      </div>
      <button class="expand" type="button" aria-expanded=${open} title=${open ? "Show less" : "Show the whole context"} onClick=${onToggle}>
        <span class="sr">${(open ? "Show less of " : "Show the whole context of ") + name} </span>
        <span class="meta" title=${source ? S.text.flat([source.title, source.source, source.language].filter(Boolean).join(", ")).replace(/·/g, " ") : null}>${source ? html`<span class="source">${S.text.flat(source.title || source.source).replace(/·/g, " ")}</span>${source.title ? html` <span>${source.source}</span>` : null}${source.language ? html` <span class="language">${source.language}</span>` : null}` : null}</span>
        <span class="arrow" aria-hidden="true">${open ? "−" : "+"}</span>
      </button>
    </li>`;
  }

  // Drawn again only when what it shows changes: what surrounds an example is drawn again for each letter and each step.
  class SteadyExample extends Component {
    shouldComponentUpdate(next) { return Object.keys(next).some((name) => name !== "onToggle" && next[name] !== this.props[name]); }
    render(props) { return h(Example, props); }
  }

  S.tokenViews = { Chip, Example: SteadyExample, Label, Output, Runs, TextChip };
})((window.Sememe = window.Sememe || {}));
