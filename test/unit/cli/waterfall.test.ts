import { expect, test } from 'vitest';
import { drawHtml, drawText } from '../../../src/cli/waterfall.ts';
import { Timeline } from '../../../src/observe/timeline.ts';

const timeline = new Timeline();
timeline.mark('launcher', 1000);
timeline.mark('request', 1004.25);
timeline.mark('agent-connected', 1400);
timeline.mark('started', 1800);

test('a timeline is drawn as text, each bar from where the one before ends', () => {
  expect(drawText({ namespace: 'default', id: 'c1', ...timeline.toJSON() })).toBe(
    [
      'default/c1: 800 ms',
      '                     at ms      + ms',
      'launcher               0.0       0.0  ▏',
      'request                4.3       4.3  ▏',
      `agent-connected      400.0     395.8  ${'█'.repeat(24)}`,
      `started              800.0     400.0  ${' '.repeat(24)}${'█'.repeat(24)}`,
      '',
    ].join('\n'),
  );
});

test('one with a single moment is drawn, too', () => {
  const single = new Timeline();
  single.mark('launcher', 5);
  const drawn = { namespace: 'default', id: 'c1', ...single.toJSON() };
  expect(drawText(drawn)).toContain('default/c1: 0 ms');
  expect(drawHtml(drawn)).toContain('margin-left:0.00%;width:0.00%');
});

test('a page has a bar for each moment and loads nothing', () => {
  const page = drawHtml({ namespace: 'a<b', id: '"c"', ...timeline.toJSON() });
  expect(page).toContain('<title>a&lt;b/&quot;c&quot;: 800 ms</title>');
  expect(page.match(/<div style=/g)).toHaveLength(4);
  expect(page).toContain('<th>started</th><td>800.0</td><td>400.0</td>');
  expect(page).toContain('margin-left:50.00%;width:50.00%');
  expect(page).not.toMatch(/src=|href=|<script|url\(/);
});
