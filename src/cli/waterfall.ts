/** A container's timeline, drawn: one bar per moment, from the moment before. */
import type { TimelineJson } from '../observe/timeline.ts';

export interface NamedTimeline extends TimelineJson {
  readonly namespace: string;
  readonly id: string;
}

const columns = 48;

/** For a terminal. */
export function drawText(timeline: NamedTimeline): string {
  const rows = timeline.marks.map(({ name, sinceStartMs, sincePreviousMs }) => {
    const begin = columnOf(sinceStartMs - sincePreviousMs, timeline);
    const end = columnOf(sinceStartMs, timeline);
    // What takes less than a column is a thin line.
    const bar = `${' '.repeat(begin)}${end > begin ? '█'.repeat(end - begin) : '▏'}`;
    return `${name.padEnd(16)}${ms(sinceStartMs)}${ms(sincePreviousMs)}  ${bar}`;
  });
  return [titleOf(timeline), `${' '.repeat(16)}${'at ms'.padStart(10)}${'+ ms'.padStart(10)}`, ...rows, ''].join('\n');
}

/** A page that needs nothing else. */
export function drawHtml(timeline: NamedTimeline): string {
  const share = (of: number) => `${((of / (timeline.totalMs || 1)) * 100).toFixed(2)}%`;
  const rows = timeline.marks.map(({ name, sinceStartMs, sincePreviousMs }) => {
    const bar = `margin-left:${share(sinceStartMs - sincePreviousMs)};width:${share(sincePreviousMs)}`;
    const numbers = [sinceStartMs, sincePreviousMs].map((value) => `<td>${value.toFixed(1)}</td>`).join('');
    return `<tr><th>${name}</th>${numbers}<td class="bars"><div style="${bar}"></div></td></tr>`;
  });
  const title = escapeHtml(titleOf(timeline));
  return `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>${title}</title>
<style>
body { font: 14px/1.6 system-ui, sans-serif; margin: 2em; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: normal; white-space: nowrap; }
td { text-align: right; padding-left: 1em; font-variant-numeric: tabular-nums; }
td.bars { width: 75%; }
td.bars div { background: #c2410c; height: 1em; min-width: 1px; }
tr:nth-child(even) { background: #f6f6f4; }
</style>
<h1>${title}</h1>
<table>
<tr><th></th><td>at ms</td><td>+ ms</td><td></td></tr>
${rows.join('\n')}
</table>
</html>
`;
}

function titleOf({ namespace, id, totalMs }: NamedTimeline): string {
  return `${namespace}/${id}: ${totalMs.toFixed(0)} ms`;
}

function columnOf(sinceStartMs: number, { totalMs }: TimelineJson): number {
  return totalMs === 0 ? 0 : Math.round((sinceStartMs / totalMs) * columns);
}

function ms(value: number): string {
  return value.toFixed(1).padStart(10);
}

function escapeHtml(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;').replaceAll('"', '&quot;');
}
