import { expect, it } from 'vitest';
import { bars, lines } from '../../bench/plot.ts';

const bar = (label: string, value: number) => ({ label, colour: 0, value });
const numbersOf = (svg: string, pattern: RegExp): number[] =>
  [...svg.matchAll(pattern)].map((found) => Number(found[1]));

/** Every element is closed, in order, and no text holds what would be markup. */
function assertWellFormed(svg: string): void {
  const open: string[] = [];
  for (const [, end, name = '', attributes = '', self] of svg.matchAll(
    /<(\/?)([a-z]+)((?: [\w:-]+="[^"<]*")*)(\/?)>/gi,
  )) {
    if (end === '/') expect(open.pop()).toBe(name);
    else if (self !== '/') open.push(name);
    expect(attributes).not.toMatch(/NaN|Infinity|undefined/);
  }
  expect(open).toEqual([]);
  expect(svg.replaceAll(/<\/?[a-z]+(?: [\w:-]+="[^"<]*")*\/?>/gi, '')).not.toMatch(/[<>]|&(?!amp;|lt;|gt;|quot;)/);
}

it('bars are as long as their values, from the same zero', () => {
  const svg = bars({ title: 'starts', unit: 'ms', groups: [[bar('runc', 120)], [bar('cold', 4800), bar('pool', 0)]] });
  assertWellFormed(svg);
  const [runc = 0, cold = 0, pool] = numbersOf(svg, /class="bar" [^>]*width="([\d.]+)"/g);
  // Drawn to a tenth of a pixel.
  expect(Math.abs(cold / 40 - runc)).toBeLessThan(0.1);
  expect(pool).toBe(0);
  expect(new Set(numbersOf(svg, /class="bar" x="([\d.]+)"/g)).size).toBe(1);
  expect(svg).toContain('>ms</text>');
  for (const label of ['runc', 'cold', 'pool', '4800', '120']) expect(svg).toContain(`>${label}</text>`);
});

it('a value that is none has a label and no bar', () => {
  const svg = bars({ title: 'a < b & "c"', unit: 's', groups: [[bar('all failed', Number.NaN), bar('one', 1)]] });
  assertWellFormed(svg);
  expect(numbersOf(svg, /class="bar" [^>]*width="([\d.]+)"/g).length).toBe(1);
  expect(svg).toContain('>none</text>');
  assertWellFormed(bars({ title: 'nothing', unit: 's', groups: [] }));
});

it('lines have a point for each pair, higher for more, and axes with units', () => {
  const panel = {
    title: 'start',
    x: 'running',
    y: 'ms',
    lines: [
      {
        name: 'start',
        points: [
          [1, 100],
          [2, 50],
        ] as const,
      },
    ],
  };
  const other = {
    ...panel,
    y: 'MiB',
    lines: [
      {
        name: 'VMM',
        points: [
          [1, Number.NaN],
          [2, 0.3],
        ] as const,
      },
    ],
  };
  const svg = lines([panel, other]);
  assertWellFormed(svg);
  const heights = numbersOf(svg, /<circle [^>]*cy="([\d.]+)"/g);
  expect(heights.length).toBe(3);
  expect(heights[0]).toBeLessThan(heights[1] ?? 0);
  for (const label of ['running', 'ms', 'MiB', 'start', 'VMM']) expect(svg).toContain(`>${label}</text>`);
  assertWellFormed(lines([{ ...panel, lines: [{ name: 'none', points: [] }] }]));
});
