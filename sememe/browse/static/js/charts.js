// Small charts as SVG, and how numbers are written. Knows numbers; knows nothing about latents.
(function (S) {
  "use strict";
  const { h } = preact;
  const { useLayoutEffect, useRef, useState } = preactHooks;
  const html = htm.bind(h);

  const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);

  function number(value, digits = 3) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6) return trim((value / 1e6).toPrecision(digits)) + "M";
    if (size >= 10 ** digits) return S.text.grouped(Math.round(value));
    if (size < 1e-4) return value.toExponential(digits - 1).replaceAll("-", "−");
    return trim(value.toPrecision(digits)).replace("-", "−");
  }
  const percent = (share, digits = 3) => {
    if (share === null || share === undefined) return "–";
    const value = share * 100;
    if (value === 0) return "0%";
    if (value < 1e-4) return value.toExponential(1).replace("e-", "e−") + "%";
    return trim(value.toPrecision(digits)) + "%";
  };
  const count = (value) => (value === null || value === undefined ? "–" : S.text.grouped(value));
  const compact = (value) => {
    for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) if (value >= size) return trim((value / size).toPrecision(3)) + unit;
    return String(value);
  };

  // The width of an element, followed as it changes.
  function useWidth() {
    const ref = useRef(null);
    const [width, setWidth] = useState(0);
    useLayoutEffect(() => {
      const observer = new ResizeObserver(([entry]) => setWidth(Math.round(entry.contentRect.width)));
      observer.observe(ref.current);
      setWidth(Math.round(ref.current.getBoundingClientRect().width));
      return () => observer.disconnect();
    }, []);
    return [ref, width];
  }

  function niceTicks(low, high, n) {
    if (!(high > low)) return [low];
    const rough = (high - low) / n, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const out = [];
    for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-6; tick += step) out.push(Math.abs(tick) < step * 1e-9 ? 0 : tick);
    return out;
  }

  // Bars between edges. `edges` has one entry more than `counts`; ticks are written by formatX.
  // parts(i) splits a bar from its foot up, by share of its height: [{share, hue}], hue a class.
  // logY counts in powers of ten; shade(i) gives a bar's activation share; onPick(i, event) makes bars buttons.
  function Histogram({ counts, edges, label, xLabel, yLabel, formatX, xTicks, logY, shade, onPick, picked, describe, parts, height = 168 }) {
    const [ref, width] = useWidth();
    const margin = { left: 46, right: 10, top: 10, bottom: 38 };
    const inner = Math.max(width - margin.left - margin.right, 10), tall = height - margin.top - margin.bottom;
    const largest = Math.max(1, ...counts);
    const low = edges[0], high = edges[edges.length - 1];
    const x = (value) => margin.left + ((value - low) / (high - low || 1)) * inner;
    const y = (value) => {
      if (value <= 0) return margin.top + tall;
      const share = logY ? Math.log10(value * 2) / Math.log10(largest * 2) : value / largest;
      return margin.top + tall * (1 - share);
    };
    const yTicks = logY
      ? Array.from({ length: 12 }, (_, i) => 10 ** i).filter((tick) => tick <= largest)
      : niceTicks(0, largest, 4).filter((tick) => Number.isInteger(tick) && tick <= largest);
    const thin = logY && yTicks.length > 4 ? yTicks.filter((_, i) => i % 2 === 0) : yTicks;
    const ticks = xTicks || niceTicks(low, high, Math.max(2, Math.floor(inner / 90)));
    return html`<div class="chart" ref=${ref} style=${{ height: height + "px" }}>
      ${width > 0 && html`<svg width=${width} height=${height} role=${onPick ? "group" : "img"} aria-label=${label}>
        ${thin.map((tick) => html`<g key=${"y" + tick}>
          <line class="grid" x1=${margin.left} x2=${margin.left + inner} y1=${y(tick)} y2=${y(tick)} />
          <text class="tick" x=${margin.left - 6} y=${y(tick) + 3.5} text-anchor="end">${compact(tick)}</text>
        </g>`)}
        ${counts.map((value, i) => {
          const left = x(edges[i]), right = x(edges[i + 1]);
          const props = { x: left + 0.75, width: Math.max(right - left - 1.5, 1), y: y(value), height: Math.max(margin.top + tall - y(value), 0), rx: 1.5 };
          const said = describe ? describe(i) : "";
          return html`<g key=${i} class=${"bar" + (picked && !picked(i) ? " dim" : "")} style=${shade ? { "--a": shade(i) } : null}>
            <rect ...${props} />
            ${parts && value > 0 && parts(i).reduce((done, { share, hue }) => { const foot = done.length ? done[done.length - 1].y : props.y + props.height; const tallness = props.height * share; return [...done, { y: foot - tallness, height: tallness, hue }]; }, []).map(({ y: top, height: tallness, hue }, j) => html`<rect key=${j} class=${"part " + hue} x=${props.x} width=${props.width} y=${top} height=${tallness} />`)}
            <rect class="hit" x=${left} width=${Math.max(right - left, 1)} y=${margin.top} height=${tall}
              ...${onPick && value ? { tabindex: 0, role: "button", "aria-label": said, onClick: (e) => onPick(i, e),
                onKeyDown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); onPick(i, e); } } } : {}}>
              <title>${said}</title></rect>
          </g>`;
        })}
        <line class="axis" x1=${margin.left} x2=${margin.left + inner} y1=${margin.top + tall} y2=${margin.top + tall} />
        ${ticks.map((tick) => html`<g key=${"x" + tick}>
          <line class="axis" x1=${x(tick)} x2=${x(tick)} y1=${margin.top + tall} y2=${margin.top + tall + 4} />
          <text class="tick" x=${x(tick)} y=${margin.top + tall + 16} text-anchor="middle">${formatX(tick)}</text>
        </g>`)}
        <text class="name" x=${margin.left + inner / 2} y=${height - 4} text-anchor="middle">${xLabel}</text>
        <text class="name" transform=${`translate(11 ${margin.top + tall / 2}) rotate(-90)`} text-anchor="middle">${yLabel}</text>
      </svg>`}
    </div>`;
  }

  // Points in a plane, x on a log scale: {x, y, name, own}. Names go into titles, and beside the own point.
  function Scatter({ points, label, xLabel, yLabel, formatX, formatY, height = 190 }) {
    const [ref, width] = useWidth();
    const margin = { left: 52, right: 14, top: 12, bottom: 38 };
    const inner = Math.max(width - margin.left - margin.right, 10), tall = height - margin.top - margin.bottom;
    const logs = points.map((point) => Math.log10(point.x)), ys = points.map((point) => point.y);
    const left = Math.min(...logs) - 0.08, right = Math.max(...logs) + 0.08, high = Math.max(...ys) * 1.08 || 1;
    const x = (value) => margin.left + ((Math.log10(value) - left) / (right - left)) * inner;
    const y = (value) => margin.top + tall * (1 - value / high);
    const ticks = [];
    for (let power = Math.floor(left); power <= Math.ceil(right); power++) for (const m of [1, 2, 5]) { const tick = m * 10 ** power; if (Math.log10(tick) >= left && Math.log10(tick) <= right) ticks.push(tick); }
    return html`<div class="chart" ref=${ref} style=${{ height: height + "px" }}>
      ${width > 0 && html`<svg width=${width} height=${height} role="img" aria-label=${`${label}: ${points.map((p) => `${p.name} ${formatX(p.x)}, ${formatY(p.y)}`).join("; ")}`}>
        ${niceTicks(0, high, 4).map((tick) => html`<g key=${"y" + tick}><line class="grid" x1=${margin.left} x2=${margin.left + inner} y1=${y(tick)} y2=${y(tick)} />
          <text class="tick" x=${margin.left - 6} y=${y(tick) + 3.5} text-anchor="end">${formatY(tick)}</text></g>`)}
        <line class="axis" x1=${margin.left} x2=${margin.left + inner} y1=${margin.top + tall} y2=${margin.top + tall} />
        ${ticks.map((tick) => html`<text key=${tick} class="tick" x=${x(tick)} y=${margin.top + tall + 16} text-anchor="middle">${formatX(tick)}</text>`)}
        <polyline class="frontier-line" points=${points.map((p) => `${x(p.x)},${y(p.y)}`).join(" ")} />
        ${points.map((p, i) => html`<circle key=${i} class=${p.own ? "own" : "other"} cx=${x(p.x)} cy=${y(p.y)} r=${p.own ? 6 : 4.5}><title>${`${p.name}: ${formatX(p.x)} active, ${formatY(p.y)}`}</title></circle>`)}
        <text class="name" x=${margin.left + inner / 2} y=${height - 4} text-anchor="middle">${xLabel}</text>
        <text class="name" transform=${`translate(11 ${margin.top + tall / 2}) rotate(-90)`} text-anchor="middle">${yLabel}</text>
      </svg>`}
    </div>`;
  }

  // A number line: a band of one and two standard deviations around the mean, and marks where single values lie.
  function Strip({ mean, std, marks, label, xLabel, height = 92 }) {
    const [ref, width] = useWidth();
    const values = [mean - 2 * std, mean + 2 * std, ...marks.map(({ value }) => value)];
    const low = Math.min(...values), high = Math.max(...values), pad = (high - low) * 0.03 || 1;
    const inner = Math.max(width - 20, 10), x = (value) => 10 + ((value - low + pad) / (high - low + 2 * pad)) * inner;
    return html`<div class="chart strip" ref=${ref} style=${{ height: height + "px" }}>
      ${width > 0 && html`<svg width=${width} height=${height} role="img" aria-label=${label}>
        <rect class="band two" x=${x(mean - 2 * std)} width=${Math.max(x(mean + 2 * std) - x(mean - 2 * std), 1)} y="8" height="36" rx="2" />
        <rect class="band" x=${x(mean - std)} width=${Math.max(x(mean + std) - x(mean - std), 1)} y="8" height="36" rx="2" />
        ${marks.map(({ value, name }, i) => html`<line key=${i} class=${value < mean ? "mark-line low" : "mark-line"} x1=${x(value)} x2=${x(value)} y1="8" y2="44"><title>${name}: ${number(value)}</title></line>`)}
        <line class="axis" x1="10" x2=${10 + inner} y1="48" y2="48" />
        ${niceTicks(low, high, Math.max(2, Math.floor(inner / 80))).map((tick) => html`<text key=${tick} class="tick" x=${x(tick)} y="64" text-anchor="middle">${number(tick)}</text>`)}
        <text class="name" x=${10 + inner / 2} y=${height - 6} text-anchor="middle">${xLabel}</text>
      </svg>`}
    </div>`;
  }

  S.charts = { Histogram, Scatter, Strip, number, percent, count, compact, useWidth };
})((window.Sememe = window.Sememe || {}));
