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
    if (size >= 10 ** digits) return Math.round(value).toLocaleString("en");
    if (size < 1e-4) return value.toExponential(digits - 1).replace("e-", "e−");
    return trim(value.toPrecision(digits)).replace("-", "−");
  }
  const percent = (share, digits = 3) => {
    if (share === null || share === undefined) return "–";
    const value = share * 100;
    if (value === 0) return "0%";
    if (value < 1e-4) return value.toExponential(1).replace("e-", "e−") + "%";
    return trim(value.toPrecision(digits)) + "%";
  };
  const count = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en"));
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
  // logY counts in powers of ten; shade(i) gives a bar's activation share; onPick(i, event) makes bars buttons.
  function Histogram({ counts, edges, label, xLabel, yLabel, formatX, xTicks, logY, shade, onPick, picked, describe, height = 168 }) {
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

  S.charts = { Histogram, number, percent, count, compact, useWidth };
})((window.Sememe = window.Sememe || {}));
