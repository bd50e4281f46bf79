/**
 * Plots as SVG, by hand. Text and axes are of the colour around them where a page holds the SVG itself, and follow the
 * reader's light or dark where it is an image; the colours of the data are legible on both.
 */

export interface Bar {
  readonly label: string;
  /** 0 is grey, for what the others are compared with; each other number is a colour of its own. */
  readonly colour: number;
  readonly value: number;
}

export interface BarPlot {
  readonly title: string;
  /** Of the values, on the axis. */
  readonly unit: string;
  /** From top to bottom, with room between groups. */
  readonly groups: readonly (readonly Bar[])[];
}

export interface Line {
  readonly name: string;
  readonly points: readonly (readonly [x: number, y: number])[];
}

export interface LinePanel {
  readonly title: string;
  /** What the axes show, with units. */
  readonly x: string;
  readonly y: string;
  readonly lines: readonly Line[];
}

const width = 760;
const margin = 16;
const lineHeight = 20;
const barHeight = 18;
const barStep = 24;
const groupGap = 12;
/** Room for the numbers on the vertical axis, and for its label. */
const leftOfPanel = 70;
const panelHeight = 220;

/** Middling colours, which differ in lightness as well. */
const colours = ['#8a8a8a', '#d9812e', '#3d8bd4', '#2ca089', '#b06ac4', '#c4a000'];

/** Horizontal bars from zero, each with its value. What is not a finite number has no bar. */
export function bars({ title, unit, groups }: BarPlot): string {
  const all = groups.flat();
  const left = margin + 8 * Math.max(0, ...all.map(({ label }) => label.length));
  const scale = scaleOf(
    all.map(({ value }) => value),
    [left, width - 70],
  );
  const top = margin + 2 * lineHeight;
  let y = top;
  const marks: string[] = [];
  for (const group of groups) {
    for (const { label, colour, value } of group) {
      const middle = y + barHeight / 2;
      marks.push(text(label, { x: left - 8, y: middle, anchor: 'end' }));
      if (Number.isFinite(value)) {
        const length = scale.at(value) - left;
        marks.push(
          `<rect class="bar" x="${px(left)}" y="${px(y)}" width="${px(length)}" height="${barHeight}" fill="${colourOf(colour)}"/>`,
        );
      }
      marks.push(text(numberOf(value), { x: (Number.isFinite(value) ? scale.at(value) : left) + 6, y: middle }));
      y += barStep;
    }
    y += groupGap;
  }
  const grid = scale.ticks.flatMap((tick) => {
    const x = scale.at(tick);
    return [rule(x, top - 4, x, y), text(String(tick), { x, y: y + 12, anchor: 'middle' })];
  });
  const axis = text(unit, { x: (left + width - 70) / 2, y: y + 12 + lineHeight, anchor: 'middle' });
  return svg(title, y + 2 * lineHeight + margin, [heading(title, margin), ...grid, ...marks, axis]);
}

/** Lines over a common kind of x, a panel for each unit, from top to bottom. */
export function lines(panels: readonly LinePanel[]): string {
  const step = panelHeight + 6 * lineHeight;
  return svg(
    panels.map(({ title }) => title).join('; '),
    panels.length * step + margin,
    panels.flatMap((panel, index) => drawPanel(panel, margin + index * step)),
  );
}

function drawPanel({ title, x, y, lines: drawn }: LinePanel, top: number): string[] {
  const left = margin + leftOfPanel;
  const right = width - margin;
  const upper = top + 2.5 * lineHeight;
  const lower = upper + panelHeight;
  const points = drawn.flatMap((line) => line.points);
  const across = scaleOf(
    points.map(([value]) => value),
    [left, right],
  );
  const up = scaleOf(
    points.map(([, value]) => value),
    [lower, upper],
  );
  const grid = [
    ...up.ticks.flatMap((tick) => [
      rule(left, up.at(tick), right, up.at(tick)),
      text(String(tick), { x: left - 8, y: up.at(tick), anchor: 'end' }),
    ]),
    ...across.ticks.map((tick) => text(String(tick), { x: across.at(tick), y: lower + 12, anchor: 'middle' })),
    text(x, { x: (left + right) / 2, y: lower + 12 + lineHeight, anchor: 'middle' }),
    text(y, { x: margin, y: (upper + lower) / 2, anchor: 'middle', turned: true }),
  ];
  let legendX = left;
  const data = drawn.flatMap(({ name, points: all }, index) => {
    const colour = colourOf(index + 1);
    const finite = all.filter(([one, other]) => Number.isFinite(one) && Number.isFinite(other));
    const path = finite.map(([one, other]) => `${px(across.at(one))},${px(up.at(other))}`).join(' ');
    const legendY = top + 1.5 * lineHeight;
    const legend = [
      `<rect x="${px(legendX)}" y="${px(legendY - 2)}" width="16" height="4" fill="${colour}"/>`,
      text(name, { x: legendX + 22, y: legendY }),
    ];
    legendX += 22 + 7.5 * name.length + 20;
    return [
      ...legend,
      `<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="2"/>`,
      ...finite.map(([one, other]) => {
        return `<circle cx="${px(across.at(one))}" cy="${px(up.at(other))}" r="2.5" fill="${colour}"/>`;
      }),
    ];
  });
  return [heading(title, top), ...grid, ...data];
}

interface Scale {
  /** Where a value lies. */
  readonly at: (value: number) => number;
  readonly ticks: readonly number[];
}

/** From zero to a round number that holds all values. */
function scaleOf(values: readonly number[], [from, to]: readonly [number, number]): Scale {
  const most = Math.max(0, ...values.filter(Number.isFinite)) || 1;
  const power = 10 ** Math.floor(Math.log10(most / 4));
  const step = ([1, 2, 5].find((factor) => factor * power * 5 >= most) ?? 10) * power;
  const count = Math.ceil(most / step);
  const ticks = Array.from({ length: count + 1 }, (_, n) => Number((n * step).toPrecision(6)));
  return { at: (value) => from + ((to - from) * value) / (count * step), ticks };
}

const px = (value: number): string => value.toFixed(1);
const colourOf = (index: number): string => colours[index % colours.length] ?? 'currentColor';

function numberOf(value: number): string {
  if (!Number.isFinite(value)) return 'none';
  return value >= 10 ? value.toFixed(0) : value.toPrecision(2);
}

function rule(x1: number, y1: number, x2: number, y2: number): string {
  return `<path d="M${px(x1)} ${px(y1)}L${px(x2)} ${px(y2)}" stroke="currentColor" stroke-opacity="0.2"/>`;
}

interface Place {
  readonly x: number;
  readonly y: number;
  readonly anchor?: 'start' | 'middle' | 'end';
  readonly turned?: boolean;
}

function text(words: string, { x, y, anchor = 'start', turned = false }: Place): string {
  const turn = turned ? ` transform="rotate(-90 ${px(x)} ${px(y)})"` : '';
  return `<text x="${px(x)}" y="${px(y)}" text-anchor="${anchor}"${turn}>${escapeXml(words)}</text>`;
}

function heading(words: string, y: number): string {
  return `<text x="${margin}" y="${px(y)}" font-weight="bold">${escapeXml(words)}</text>`;
}

/** Text is placed by its middle. As an image, an SVG has no colour around it: then it is the style's. */
function svg(title: string, height: number, parts: readonly string[]): string {
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${Math.ceil(height)}" width="${width}" height="${Math.ceil(height)}" font-family="system-ui, sans-serif" font-size="13" fill="currentColor">
<title>${escapeXml(title)}</title>
<style>svg:root { color: #333; } @media (prefers-color-scheme: dark) { svg:root { color: #ddd; } } text { dominant-baseline: central; }</style>
${parts.join('\n')}
</svg>
`;
}

function escapeXml(words: string): string {
  return words.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;').replaceAll('"', '&quot;');
}
