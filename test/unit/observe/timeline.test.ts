import { expect, test } from 'vitest';
import { Timeline } from '../../../src/observe/timeline.ts';

test('the timeline orders marks of several clocks and gives the time between them', () => {
  const timeline = new Timeline();
  timeline.mark('request', 1010.5);
  timeline.mark('created', 3000);
  timeline.mark('launcher', 1000);
  timeline.mark('kernel-up', 2000.25);
  expect(JSON.parse(JSON.stringify(timeline))).toEqual({
    marks: [
      { name: 'launcher', atMs: 1000, sinceStartMs: 0, sincePreviousMs: 0 },
      { name: 'request', atMs: 1010.5, sinceStartMs: 10.5, sincePreviousMs: 10.5 },
      { name: 'kernel-up', atMs: 2000.25, sinceStartMs: 1000.25, sincePreviousMs: 989.75 },
      { name: 'created', atMs: 3000, sinceStartMs: 2000, sincePreviousMs: 999.75 },
    ],
    totalMs: 2000,
  });
  expect(timeline.between('request', 'created')).toBe(1989.5);
  expect(timeline.between('request', 'exited')).toBeUndefined();
});

test('the first note of a moment counts', () => {
  const timeline = new Timeline();
  timeline.mark('exited', 5);
  timeline.mark('exited', 9);
  expect(timeline.at('exited')).toBe(5);
});

test('a mark without a time is now, and does not run backwards', () => {
  const before = Date.now();
  const timeline = new Timeline();
  timeline.mark('created');
  timeline.mark('started');
  expect(timeline.at('created')).toBeGreaterThan(before - 5);
  expect(timeline.at('started')).toBeLessThan(Date.now() + 5);
  expect(timeline.toJSON().marks.map(({ name }) => name)).toEqual(['created', 'started']);
});

test('an empty timeline is a valid one', () => {
  expect(new Timeline().toJSON()).toEqual({ marks: [], totalMs: 0 });
});
